"""Dictionaries from elsewhere: opened as their folders say, refused by name, measured as ours are."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import some_dictionaries
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from asi_lens.activations.harvest_store import harvest_stores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError, FetchError, OptionError
from asi_lens.experiments.released import (
    EXAMPLES,
    NEEDED,
    SAVE,
    open_dictionaries,
    released_rows,
    told,
)
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.models import model_info
from asi_lens.results.tables import write_rows
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.evaluate import evaluate
from asi_lens.sae.initialize import initialize

D = 24
PLACES = [("attn_out", 0), ("attn_out", 2), ("mlp_out", 1), ("resid_post", 1)]


@pytest.fixture(scope="module")
def texts() -> tuple[Tokens, Tokens]:
    ids = torch.randint(4, tiny_models.D_VOCAB, (24, 32), generator=torch.Generator().manual_seed(2))
    first, second = ids[:16], ids[16:]
    return Tokens(first, "random", "tiny", 32), Tokens(second, "random", "tiny", 32)


@pytest.fixture(scope="module")
def stores(tiny_llama: Any, texts: tuple[Tokens, Tokens]) -> dict[Any, ActivationStore]:
    return harvest_stores(tiny_llama, texts[0], [*PLACES, ("z", 1)], progress=False)


def started(store: ActivationStore, method: str, d_sae: int = 96) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(store.d, d_sae, 4, metadata=store.metadata))
    d_init = "auto" if method == "asi" else None
    initialize(sae, method, spectrum=store.spectrum, d_init=d_init, sample=store.sample(256))
    return sae


def stranger(folder: Path, **metadata: Any) -> Path:
    """The folder as SAELens would write it: without our files and without our metadata."""
    for ours in ("asi_lens.json", "asi_lens.safetensors", "sae.safetensors"):
        (folder / ours).unlink(missing_ok=True)
    values = json.loads((folder / "cfg.json").read_text())
    kept = {key: values["metadata"][key] for key in ("sae_lens_version", "hook_name", "prepend_bos")}
    values["metadata"] = {**kept, "context_size": 32, **metadata}
    (folder / "cfg.json").write_text(json.dumps(values))
    return folder


def test_folders_of_every_library_are_measured_as_ours_are(
    tiny_llama: Any, texts: tuple[Tokens, Tokens], stores: dict[Any, ActivationStore], tmp_path: Path
) -> None:
    name = model_info(tiny_llama, fingerprint=False).name
    own: dict[str, SparseAutoencoder] = {}
    for i, where in enumerate(PLACES):
        for method in ("random", "asi"):
            folder = tmp_path / "all" / f"{where[0]}.{where[1]}" / method
            sae = started(stores[where], method)
            sae.save(folder)
            own[f"{where[0]}.{where[1]}/{method}"] = sae
            if i % 2:
                stranger(folder, model_name=name.upper())
    values = tmp_path / "all" / "layers.0.self_attn"
    started(stores["attn_out", 0], "random").save(values)
    for ours in ("asi_lens.json", "asi_lens.safetensors", "sae_weights.safetensors"):
        (values / ours).unlink()
    theirs = json.loads((values / "cfg.json").read_text())
    keys = ("d_in", "k", "activation", "num_latents", "expansion_factor", "normalize_decoder")
    (values / "cfg.json").write_text(json.dumps({key: theirs[key] for key in keys}))

    opened = open_dictionaries(tiny_llama, [str(tmp_path / "all"), str(tmp_path / "all" / "attn_out.0")])
    assert len(opened) == 9, "the second name holds nothing new"
    assert [one.library for one in opened].count("SAELens") == 4
    rows = released_rows(opened, tiny_llama, *texts, progress=False)
    found = {row.dictionary.removeprefix("all/"): row for row in rows}
    held = harvest_stores(tiny_llama, texts[1], PLACES, progress=False)
    for key, sae in own.items():
        site, layer = key.split("/")[0].split(".")
        row, where = found[key], (site, int(layer))
        assert (row.site, row.layer, row.width) == (*where, D)
        whole, part = evaluate(sae, stores[where], progress=False), evaluate(sae, held[where], progress=False)
        assert (row.n_tokens, row.n_tokens_held_out) == (16 * 31, 8 * 31)
        assert row.dead_fraction == pytest.approx(whole.dead_fraction, abs=1 / 96)
        assert row.silent_fraction == pytest.approx(part.dead_fraction, abs=1 / 96)
        assert row.fvu == pytest.approx(part.fvu, rel=1e-4)
        assert row.effective_rank_fraction == stores[where].spectrum.effective_rank_fraction
        ours = row.library == "asi_lens"
        assert row.start == (key.split("/")[1] if ours else None)
        assert (row.trained_context, row.trained_bos) == (32, True)
    module = found["layers.0.self_attn"]
    assert (module.library, module.site, module.layer, module.k) == ("sparsify", "attn_out", 0, 4)
    assert module.fvu == pytest.approx(found["attn_out.0/random"].fvu, rel=1e-4)
    assert (module.start, module.trained_on, module.trained_context, module.trained_bos) == (None,) * 4
    write_rows(tmp_path / "table.csv", rows)
    assert "sparsify" in told(opened)
    assert told(opened).count("\n") == 8


def test_hooks_are_found_by_the_names_of_transformerlens(
    tiny_llama: Any, stores: dict[Any, ActivationStore], tmp_path: Path
) -> None:
    started(stores["z", 1], "random").save(tmp_path / "z")
    [one] = open_dictionaries(tiny_llama, [str(stranger(tmp_path / "z", hook_name="blocks.1.attn.hook_z"))])
    assert one.where == ("z", 1)
    assert "context 32, BOS True" in one.text
    started(stores["resid_post", 1], "random").save(tmp_path / "pre")
    folder = stranger(tmp_path / "pre", hook_name="blocks.2.hook_resid_pre")
    assert open_dictionaries(tiny_llama, [str(folder)])[0].where == ("blocks.2.hook_resid_pre", 2)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model_name": "gpt2-small"}, "was made for the model 'gpt2-small', this is 'tiny-llama"),
        ({"hook_name": "blocks.9.hook_attn_out"}, "layer=9 is not allowed"),
        ({"hook_name": "blocks.1.hook_attn_ouut"}, "unknown site 'blocks.1.hook_attn_ouut'"),
        ({"hook_name": None}, "does not say which hook it reads"),
        ({"hook_name": "blocks.1.mlp.hook_post"}, r"is 24 wide, but blocks.1.mlp.hook_post 1 of .* is"),
        ({"hook_head_index": 3}, "reads head 3 alone"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tiny_llama: Any,
    stores: dict[Any, ActivationStore],
    tmp_path: Path,
    metadata: dict[str, Any],
    message: str,
) -> None:
    started(stores["attn_out", 0], "random").save(tmp_path / "one")
    folder = stranger(tmp_path / "one", **metadata)
    with pytest.raises(OptionError, match=message) as error:
        open_dictionaries(tiny_llama, [str(folder)])
    assert str(folder) in str(error.value)


def test_another_name_of_the_same_model_may_be_given(
    tiny_llama: Any, stores: dict[Any, ActivationStore], tmp_path: Path
) -> None:
    started(stores["attn_out", 0], "random").save(tmp_path / "one")
    folder = stranger(tmp_path / "one", model_name="owner/Tiny.Llama_3")
    [one] = open_dictionaries(tiny_llama, [str(folder)], ["tiny-llama-3"])
    assert one.where == ("attn_out", 0)


def test_a_dictionary_of_other_activations_is_refused(
    tiny_llama: Any, texts: tuple[Tokens, Tokens], stores: dict[Any, ActivationStore], tmp_path: Path
) -> None:
    sae = started(stores["attn_out", 0], "random")
    with torch.no_grad():
        sae.W_dec.mul_(30)
    sae.save(tmp_path / "loud")
    opened = open_dictionaries(tiny_llama, [str(tmp_path / "loud")])
    with pytest.raises(DataError, match=r"loud has an FVU of .* made for other activations"):
        released_rows(opened, tiny_llama, *texts, progress=False)


def test_transcoders_and_broken_folders_are_refused(tiny_llama: Any, tmp_path: Path) -> None:
    some_dictionaries.transcoder_like("topk").save(tmp_path / "two")
    with pytest.raises(OptionError, match=r"two' is not allowed; .* a transcoder"):
        open_dictionaries(tiny_llama, [str(tmp_path / "two")])
    some_dictionaries.saelens_folder(tmp_path / "old", metadata={"sae_lens_version": "5.0"})
    with pytest.raises(OptionError, match=r"old: .* not written by SAELens 6"):
        open_dictionaries(tiny_llama, [str(tmp_path / "old")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="empty holds no dictionary"):
        open_dictionaries(tiny_llama, [str(tmp_path / "empty")])


def test_a_hub_repository_is_read_from_the_hubs_own_cache(
    tiny_llama: Any,
    stores: dict[Any, ActivationStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "models--owner--saes", "0" * 40
    started(stores["attn_out", 2], "random").save(repository / "snapshots" / commit / "deep" / "a.2")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    [one] = open_dictionaries(tiny_llama, ["owner/saes/deep/a.2"])
    assert (one.name, one.where) == ("owner/saes/deep/a.2", ("attn_out", 2))
    assert [one.name for one in open_dictionaries(tiny_llama, ["owner/saes/deep/a.2/"])] == [one.name]
    assert [one.name for one in open_dictionaries(tiny_llama, ["owner/saes/deep"])] == ["owner/saes/deep/a.2"]
    with pytest.raises(FetchError, match="owner/saes has no folder 'other'"):
        open_dictionaries(tiny_llama, ["owner/saes/other"])
    with pytest.raises(FetchError, match=r"could not read 'owner/more/a' from the Hugging Face hub"):
        open_dictionaries(tiny_llama, ["owner/more/a"])
    monkeypatch.setenv("ASI_LENS_OFFLINE", "1")
    with pytest.raises(FetchError, match=r"ASI_LENS_OFFLINE=1 refuses the network\. Bring its folder"):
        open_dictionaries(tiny_llama, ["owner/more/a"])


def test_a_name_of_saelens_gets_the_program_that_writes_the_folder(tiny_llama: Any) -> None:
    release, sae_id = EXAMPLES["gemma-3-270m"]
    with pytest.raises(FetchError, match=rf"SAE.from_pretrained\('{release}', '{sae_id}'\)"):
        open_dictionaries(tiny_llama, [f"{release}/{sae_id}"])


def test_none_is_told_what_it_needs(tiny_llama: Any, texts: tuple[Tokens, Tokens]) -> None:
    assert open_dictionaries(tiny_llama, []) == []
    assert told([]) == NEEDED
    assert "SAE.from_pretrained(" in NEEDED
    assert released_rows([], tiny_llama, *texts) == []


def test_weights_in_half_precision(
    tiny_llama: Any, texts: tuple[Tokens, Tokens], stores: dict[Any, ActivationStore], tmp_path: Path
) -> None:
    started(stores["attn_out", 0], "random").save(tmp_path / "half")
    folder = stranger(tmp_path / "half")
    path = folder / "sae_weights.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    opened = open_dictionaries(tiny_llama, [str(folder)])
    [row] = released_rows(opened, tiny_llama, *texts, progress=False)
    assert 0 < row.fvu < 1


# --- the real SAELens -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


@pytest.mark.parametrize("architecture", ["TopK", "JumpReLU"])
def test_a_dictionary_that_saelens_wrote(
    sae_lens: ModuleType,
    tiny_llama: Any,
    texts: tuple[Tokens, Tokens],
    stores: dict[Any, ActivationStore],
    tmp_path: Path,
    architecture: str,
) -> None:
    store, held = stores["attn_out", 2], harvest_stores(tiny_llama, texts[1], PLACES, progress=False)
    ours = started(store, "random")
    weights = {name: tensor.detach() for name, tensor in ours.folded().items()}
    options = {"k": 4} if architecture == "TopK" else {}
    config = getattr(sae_lens, f"{architecture}SAEConfig")(d_in=D, d_sae=96, **options)
    config.metadata.model_name = model_info(tiny_llama, fingerprint=False).name
    config.metadata.hook_name = "blocks.2.hook_attn_out"
    config.metadata.context_size, config.metadata.prepend_bos = 128, False
    found = getattr(sae_lens, f"{architecture}SAE")(config)
    if architecture == "JumpReLU":
        x = torch.cat(list(store.in_order(512))).float()
        before = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        weights["threshold"] = before.quantile(0.95, dim=0).clamp_min(0)
    found.load_state_dict(weights)
    found.save_model(tmp_path / "theirs")
    opened = open_dictionaries(tiny_llama, [str(tmp_path / "theirs")])
    [row] = released_rows(opened, tiny_llama, *texts, progress=False)
    whole, part = (torch.cat(list(one.in_order(512))).float() for one in (store, held["attn_out", 2]))
    with torch.no_grad():
        error = (part - found(part)).square().sum() / (part - part.mean(0)).square().sum()
        code = found.encode(part)
        dead = (found.encode(whole) > 0).any(0).logical_not().float().mean()
    assert (row.library, row.site, row.layer) == ("SAELens", "attn_out", 2)
    assert (row.trained_context, row.trained_bos, row.start) == (128, False, None)
    assert row.fvu == pytest.approx(float(error), rel=1e-4)
    assert row.l0 == pytest.approx(float((code > 0).sum(1).float().mean()), rel=1e-3)
    assert row.silent_fraction == pytest.approx(float((code > 0).any(0).logical_not().float().mean()))
    assert row.dead_fraction == pytest.approx(float(dead))


def test_the_releases_that_are_named_are_in_saelens(sae_lens: ModuleType) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    for model, (release, sae_id) in EXAMPLES.items():
        assert known[release].model.endswith(model)
        assert sae_id in known[release].saes_map
        layer = sae_id.replace("5", "{}", 1)
        assert all(layer.format(n) in known[release].saes_map for n in range(18))


def test_the_program_that_is_told_writes_a_folder(
    sae_lens: ModuleType,
    tiny_llama: Any,
    stores: dict[Any, ActivationStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--saes"
    started(stores["attn_out", 2], "random").save(repository / "snapshots" / ("0" * 40) / "a.2")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    exec(SAVE.format("owner/saes", "a.2", tmp_path / "saved"), {})
    [one] = open_dictionaries(tiny_llama, [str(tmp_path / "saved")])
    assert (one.library, one.where) == ("SAELens", ("attn_out", 2))
