"""Inputs that are no text: which positions are rows, whose processor made them, and wrong data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_plain
import torch

import asi_lens as al
from asi_lens.base.errors import (
    DataError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
)
from asi_lens.inputs import media_inputs, media_items, models, own_tokens

pytestmark = pytest.mark.model_facing


def residual(model: Any, inputs: al.Inputs, items: slice = slice(None)) -> torch.Tensor:
    """The last layer's stream, [item position d]."""
    found: list[torch.Tensor] = []
    last = model.cfg.n_layers - 1
    hooks = {models.hook_name(model, "resid_post", last): lambda x: found.append(x.clone())}
    models.forward(model, inputs.batch(items), hooks)
    return found[0]


def test_rows_are_counted_until_there_are_enough(plain: Any) -> None:
    model, pictures = plain("vit"), small_plain.pictures(6)
    inputs = al.load_inputs(pictures, model, n_rows=33)
    assert len(inputs) == 3, "16 patches a picture; the third is taken whole"
    assert inputs.n_rows == 48
    later = al.load_inputs(pictures, model, n_rows=33, offset=len(inputs))
    assert torch.equal(
        later.arrays["pixel_values"][0], al.load_inputs(pictures, model).arrays["pixel_values"][3]
    )
    with pytest.raises(DataError, match=r"96 rows in 6 items; asked for n_rows=97"):
        al.load_inputs(pictures, model, n_rows=97)
    with pytest.raises(DataError, match="shorter than the model's width 24"):
        al.load_inputs(pictures[:1], model)
    with pytest.raises(DataError, match="after skipping 9"):
        al.load_inputs(pictures, model, offset=9)


def test_a_slice_holds_those_items(plain: Any) -> None:
    inputs = al.load_inputs(small_plain.sequences(), plain("esm"), name="proteins")
    part = inputs[1:3]
    assert (len(part), part.corpus, part.kind) == (2, "proteins", "sequences")
    assert torch.equal(part.arrays["input_ids"], inputs.arrays["input_ids"][1:3])
    assert part.fingerprint not in ("", inputs.fingerprint)
    assert inputs[:].fingerprint == inputs.fingerprint
    with pytest.raises((OptionError, TypeError)):
        inputs[0]  # type: ignore[index]
    assert "sequences" in inputs._repr_html_().lower()


def test_the_fingerprint_changes_with_every_part(plain: Any) -> None:
    inputs = al.load_inputs(small_plain.sequences(), plain("esm"))
    ids, kept = inputs.arrays["input_ids"].clone(), inputs.kept.clone()
    ids[0, 1] += 1
    kept[0, 1] = False
    arrays = {**inputs.arrays, "input_ids": ids}
    others = [
        al.Inputs(arrays, inputs.kept, "c", inputs.kind, ""),
        al.Inputs(inputs.arrays, kept, "c", inputs.kind, ""),
        inputs[:-1],
    ]
    known = {one.fingerprint for one in [inputs, *others]}
    assert len(known) == 4
    inputs.arrays["attention_mask"][0, 1] = 0  # edited in place
    assert inputs.fingerprint not in known
    with pytest.raises(OptionError, match="as many items"):
        al.Inputs(inputs.arrays, kept[:-1], "c", inputs.kind, "")
    kept[1] = False
    with pytest.raises(OptionError, match=r"kept='no position of items \[1\]' .* of each item"):
        al.Inputs(inputs.arrays, kept, "c", inputs.kind, "")
    assert len(inputs[2:2]) == 0


def test_inputs_are_of_the_models_kind_and_processor(plain: Any, tiny_llama: Any) -> None:
    pictures, proteins = small_plain.pictures(6), small_plain.sequences()
    of_pictures = al.load_inputs(pictures, plain("vit"))
    of_proteins = al.load_inputs(proteins, plain("esm"))
    own_tokens.require_own_tokens(plain("deit"), of_pictures)  # the same processor
    with pytest.raises(OptionError, match="made by"):
        own_tokens.require_own_tokens(plain("dinov2"), of_pictures)
    with pytest.raises(OptionError, match="takes pictures"):
        own_tokens.require_own_tokens(plain("vit"), of_proteins)
    tokens = al.Tokens(torch.ones(2, 8, dtype=torch.int64), "text", "", 8)
    with pytest.raises(OptionError, match="takes pictures"):
        own_tokens.require_own_tokens(plain("vit"), tokens)
    with pytest.raises(OptionError, match="load_tokens"):
        al.load_inputs(proteins, tiny_llama)
    with pytest.raises(OptionError, match="load_tokens"):
        own_tokens.require_own_tokens(tiny_llama, of_proteins)
    of_speech = al.load_inputs(small_plain.clips((1.0, 1.0)), plain("whisper"))
    with pytest.raises(OptionError, match="not made for a decoder"):
        own_tokens.require_own_tokens(plain("whisper", "decoder"), of_speech)


def test_text_for_a_model_of_pictures_and_pictures_for_one_of_text(plain: Any) -> None:
    with pytest.raises(DataError, match="picture 0 is no picture"):
        al.load_inputs([3.5], plain("vit"))
    with pytest.raises(DataError, match="picture 0 is no picture that can be read"):
        al.load_inputs(["a text"], plain("vit"))
    with pytest.raises(DataError, match="sequence 0 is no text"):
        al.load_inputs(small_plain.pictures(1), plain("esm"))
    with pytest.raises(DataError, match="clip 0 is no speech"):
        al.load_inputs([np.zeros(9)], plain("whisper"))
    with pytest.raises(UnsupportedModelError, match="no tokenizer"):
        al.load_tokens(["a text"], plain("vit"), 8)


def test_options_are_checked(plain: Any, tmp_path: Path) -> None:
    model, data = plain("vit"), small_plain.pictures(2)
    with pytest.raises(OptionError, match="n_rows"):
        al.load_inputs(data, model, n_rows=0)
    with pytest.raises(OptionError, match="offset"):
        al.load_inputs(data, model, offset=-1)
    with pytest.raises(OptionError, match="join"):
        al.load_inputs(data, model, join=True)
    with pytest.raises(OptionError, match="data"):
        al.load_inputs(7, model)
    with pytest.raises(UnknownNameError, match="not a file or a folder of pictures"):
        al.load_inputs("no-such-data", model)
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DataError, match="holds no pictures"):
        al.load_inputs(tmp_path, model)


def test_a_folder_without_a_processor_says_so(plain_folder: Any, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((plain_folder("vit") / name).read_bytes())
    model = al.load_model(tmp_path, dtype="float32")
    assert al.verify(model).holds, "sites need no processor"
    with pytest.raises(UnsupportedModelError, match="preprocessor_config"):
        al.load_inputs(small_plain.pictures(3), model)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(DataError, match="preprocessor_config"):
        al.load_model(tmp_path)


def test_packaged_data_is_taken_by_name(plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_items, "items_of", lambda name: iter(small_plain.sequences()))
    inputs = al.load_inputs("antibodies", plain("esm"))
    assert (inputs.corpus, len(inputs)) == ("antibodies", len(small_plain.sequences()))
    with pytest.raises(DataError, match="holds sequences; the model takes pictures"):
        al.load_inputs("antibodies", plain("vit"))
    monkeypatch.undo()
    with pytest.raises(UnknownNameError, match="packaged: pictures-skimage"):
        al.load_inputs("pictures-skimag", plain("vit"))


def test_what_a_model_reads(plain: Any, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {kind: media_inputs.data_kind(plain(kind)) for kind in ("vit", "whisper", "esm", "bert-masked")}
    assert kinds == {"vit": "pictures", "whisper": "speech", "esm": "sequences", "bert-masked": "sequences"}
    assert media_inputs.data_kind(tiny_llama) == "text"
    monkeypatch.setattr(media_inputs, "_TEXT_VOCABULARY", 25)  # words, not residues
    assert media_inputs.data_kind(plain("esm")) == "text"
