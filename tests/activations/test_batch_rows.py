"""A pass over pictures, speech and sequences: its rows, its stores, spectra and what W_O does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_plain
import torch

import asi_lens as al
from asi_lens.activations import batch_rows
from asi_lens.activations.harvest import harvest
from asi_lens.activations.massive import massive_rows
from asi_lens.base.errors import OptionError
from asi_lens.collapse.output_projection import counterfactual_records, overlap_records
from asi_lens.inputs import models

pytestmark = pytest.mark.model_facing


class Keep:
    """Keeps every row it is given."""

    def __init__(self, where: tuple[str, int]) -> None:
        self.wants = [where]
        self.rows: list[torch.Tensor] = []

    def consume(self, where: tuple[str, int], rows: torch.Tensor) -> None:
        self.rows.append(rows.clone())


@pytest.fixture
def uneven(plain: Any) -> tuple[Any, al.Inputs]:
    """An encoder, and sequences with 12, 7, 20, 15, 30, 4, 9 rows."""
    model = plain("esm")
    return model, al.load_inputs(small_plain.sequences((12, 7, 20, 15, 30, 4, 9)), model)


def rows_at(model: Any, inputs: al.Inputs, site: str, layer: int) -> torch.Tensor:
    """The rows of a site, from one pass over each item by itself."""
    found: list[torch.Tensor] = []
    hook = models.hook_name(model, site, layer)
    for item in range(len(inputs)):
        one = inputs.batch(slice(item, item + 1))
        models.forward(model, one, {hook: lambda x, item=item: found.append(x[0][inputs.kept[item]].clone())})
    return torch.cat(found)


def test_rows_are_the_kept_positions_in_order(uneven: Any) -> None:
    model, inputs = uneven
    keep = Keep(("attn_out", 1))
    harvest(model, inputs, [keep], batch_tokens=3 * inputs.context, progress=False)
    assert [len(rows) for rows in keep.rows] == [39, 49, 9]
    torch.testing.assert_close(
        torch.cat(keep.rows), rows_at(model, inputs, "attn_out", 1), rtol=1e-4, atol=1e-4
    )


def test_rows_before_each_item(uneven: Any, tiny_tokens: al.Tokens) -> None:
    _, inputs = uneven
    for drop_first in (True, False):
        assert batch_rows.rows_before(inputs, drop_first) == [0, 12, 19, 39, 54, 84, 88, 97]
    assert batch_rows.rows_before(tiny_tokens[:2], True) == [0, 31, 62]
    assert batch_rows.rows_before(tiny_tokens[:2], False) == [0, 32, 64]


def test_massive_rows_are_judged_among_the_rows_of_their_item(uneven: Any) -> None:
    _, inputs = uneven
    activation = torch.randn(len(inputs), inputs.context, 4, generator=torch.Generator().manual_seed(0))
    activation[~inputs.kept] = 1e9  # special and padding positions
    activation[2, 5] = 1e6
    rows, massive, peak = batch_rows.rows_of(inputs, 0, activation, drop_first=True)
    assert massive.nonzero().flatten().tolist() == [19 + 4]
    assert peak[massive].item() == 1e6
    assert float(rows[~massive].abs().max()) < 10
    assert torch.equal(massive[:12], massive_rows(activation[:1, 1:13])[0][0])


@pytest.mark.parametrize("kind", ["vit", "esm", "bert-masked", "whisper"])
def test_a_store_holds_the_rows_and_their_spectrum(kind: str, plain: Any, tmp_path: Path) -> None:
    model, data = (
        plain(kind),
        {"vit": small_plain.pictures(5), "whisper": small_plain.clips((1.0, 0.5, 0.7, 1.0))},
    )
    inputs = al.load_inputs(data.get(kind, small_plain.sequences((12, 7, 20, 15, 30, 4, 9))), model)
    store = al.harvest_store(
        model,
        inputs,
        "mlp_out",
        1,
        folder=tmp_path,
        dtype="float32",
        batch_tokens=2 * inputs.context,
        shard_tokens=30,
        progress=False,
    )
    wanted = rows_at(model, inputs, "mlp_out", 1)
    assert store.n == inputs.n_rows == len(wanted)
    assert len(list(tmp_path.glob("shard-*"))) > 1
    torch.testing.assert_close(torch.cat(list(store.in_order(16))), wanted, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="rows for width"):
        spectra = al.collect_spectra(model, inputs, "mlp_out", [1], progress=False)
    torch.testing.assert_close(
        spectra["mlp_out", 1].eigenvalues, store.spectrum.eigenvalues, rtol=1e-4, atol=1e-5
    )
    assert (store.metadata["kind"], store.metadata["positions"]) == (inputs.kind, inputs.context)
    with pytest.raises(OptionError, match="not harvested from tokens"):
        store.positions(torch.tensor([0]))
    with pytest.raises(OptionError, match="holds"):
        al.harvest_store(model, inputs[1:], "mlp_out", 1, folder=tmp_path, dtype="float32", progress=False)


def test_a_killed_harvest_resumes_to_the_same_bytes(uneven: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model, inputs = uneven
    options = {"dtype": "float32", "batch_tokens": 2 * inputs.context, "shard_tokens": 20, "progress": False}
    whole = al.harvest_store(model, inputs, "z", 0, folder=tmp_path / "whole", **options)
    real, calls = models.forward, []

    def killed(*args: Any, **more: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(models, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        al.harvest_store(model, inputs, "z", 0, folder=tmp_path / "killed", **options)
    again = al.harvest_store(model, inputs, "z", 0, folder=tmp_path / "killed", **options)
    assert len(calls) == 3 + 2, "the first two batches are not run again"
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in files:
        if name.startswith("shard-"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert torch.equal(whole.mean, again.mean)


def test_what_the_folded_projection_does_to_the_rank(plain: Any) -> None:
    model = plain("dinov2")
    inputs = al.load_inputs(small_plain.pictures(120), model)
    sites = ("attn_out", "z")
    spectra = al.collect_spectra(model, inputs, sites, [0, 2], progress=False)
    records = counterfactual_records(model, spectra, draws=1)
    for layer in (0, 2):
        found = {one["variant"]: one["effective_rank_fraction"] for one in records if one["layer"] == layer}
        measured = spectra["attn_out", layer].effective_rank_fraction
        assert found["attn_out"] == pytest.approx(measured, rel=1e-3)
        assert found["z"] == pytest.approx(spectra["z", layer].effective_rank_fraction, rel=1e-6)
    # Without LayerScale the closed form is another number: the scale is part of W_O.
    block = model.blocks[2]
    raw = next(module for name, module in block.named_modules() if name.endswith(("o_proj", "output.dense")))
    heads = raw.weight.detach().T.reshape(small_plain.N_HEADS, -1, small_plain.D_MODEL)
    bare = al.counterfactual_ranks(heads, spectra["z", 2].covariance, variants=("attn_out",))["attn_out"]
    assert bare != pytest.approx(spectra["attn_out", 2].effective_rank_fraction, rel=1e-2)
    assert len(overlap_records(model, spectra)) == 2 * 6


def test_cross_attention_has_a_projection_of_its_own(plain: Any) -> None:
    model = plain("whisper", "decoder")
    text = "a few words"
    clips = [(*clip, text) for clip in small_plain.clips((1.0,) * 60)]
    inputs = al.load_inputs(clips, model)
    sites = ("attn_out", "cross_attn_out", "z", "cross_z")
    spectra = al.collect_spectra(model, inputs, sites, [1], progress=False)
    for site, out in (("z", "attn_out"), ("cross_z", "cross_attn_out")):
        records = counterfactual_records(model, spectra, draws=1, site=site)
        found = {one["variant"]: one["effective_rank_fraction"] for one in records}
        assert found["attn_out"] == pytest.approx(spectra[out, 1].effective_rank_fraction, rel=1e-3)
        assert len(overlap_records(model, spectra, site=site)) == 6


def test_data_of_another_kind_is_refused_before_the_model_runs(plain: Any, tiny_tokens: al.Tokens) -> None:
    proteins = al.load_inputs(small_plain.sequences(), plain("esm"))
    for wrong in (tiny_tokens, proteins):
        with pytest.raises(OptionError, match="takes pictures"):
            al.collect_spectra(plain("vit"), wrong, "attn_out", [0], progress=False)
        with pytest.raises(OptionError, match="takes pictures"):
            al.harvest_store(plain("vit"), wrong, "attn_out", 0, progress=False)
    pictures = al.load_inputs(small_plain.pictures(3), plain("vit"))
    for take in (al.truncation_sweep, al.harvest_pairs):
        with pytest.raises((OptionError, TypeError)):
            take(plain("vit"), pictures, 0)
