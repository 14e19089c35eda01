"""Lorsas side by side: trained once, to the rows of the table, and what their units attend to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from small_lorsas import CONTEXT, LAYER, N_OV, K, quick, started

from asi_lens.base.errors import CacheError, OptionError, UnknownNameError
from asi_lens.experiments import lorsa_runs, runs
from asi_lens.experiments.lorsa_runs import LorsaRecipe, lorsa_budget, lorsa_rows, train_lorsas
from asi_lens.inputs.corpora import Tokens
from asi_lens.kernels.codes import SparseCode
from asi_lens.lorsa.contexts import read_from, top_contexts, unit_firings
from asi_lens.lorsa.data import SequencePairs, stored_pairs
from asi_lens.lorsa.evaluate import evaluate_lorsa
from asi_lens.lorsa.initialize import from_attention
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.lorsa.train import LorsaTrainer

pytestmark = [
    pytest.mark.model_facing,
    pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning"),
]
RECIPES = (LorsaRecipe("random"), LorsaRecipe("ASI", "asi", 0.5))
OPTIONS: dict[str, Any] = {"n_ov": N_OV, "k": K, "log_every": 5, "progress": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("trained or evaluated again")


def test_stored_pairs_are_the_harvested_ones(
    tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = stored_pairs(tiny_llama, tiny_tokens, LAYER, progress=False)
    assert torch.equal(found.inputs, pairs.inputs.bfloat16().to(found.inputs))
    assert torch.equal(found.outputs, pairs.outputs.bfloat16().to(found.outputs))
    assert found.metadata == pairs.metadata
    monkeypatch.setattr("asi_lens.activations.harvest_store.harvest", refuse)
    assert torch.equal(stored_pairs(tiny_llama, tiny_tokens, LAYER, progress=False).inputs, found.inputs)


def test_a_run_is_the_training_that_its_recipe_says(tiny_llama: Any, pairs: SequencePairs) -> None:
    (_, run) = train_lorsas(tiny_llama, LAYER, pairs, RECIPES, seeds=[3], train=quick(), **OPTIONS)
    d_qk = run.config.d_qk
    assert (run.seed, run.d_init) == (3, d_qk // 2)
    lorsa = started(tiny_llama, pairs, seed=3)
    lorsa_runs.initialize_lorsa(lorsa, tiny_llama, LAYER, pairs, "asi", d_qk // 2)
    LorsaTrainer(lorsa, quick(seed=3)).fit(pairs, progress=False)
    torch.testing.assert_close(run.lorsa()(pairs.inputs), lorsa(pairs.inputs))


def test_finished_runs_are_read(
    tiny_llama: Any, pairs: SequencePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"train": quick(), **OPTIONS}
    first = train_lorsas(tiny_llama, LAYER, pairs, RECIPES, seeds=[0, 1], **options)
    assert [(run.seed, run.recipe.name) for run in first] == [
        (seed, recipe.name) for seed in (0, 1) for recipe in RECIPES
    ]
    rows = lorsa_rows(first, pairs)
    monkeypatch.setattr(runs, "train_together", refuse)
    monkeypatch.setattr(lorsa_runs, "evaluate_lorsas", refuse)
    again = train_lorsas(tiny_llama, LAYER, pairs, RECIPES, seeds=[0, 1], **options)
    assert again == first
    assert lorsa_rows(again, pairs) == rows
    other = {**options, "train": replace(quick(), lr=1e-3)}
    with pytest.raises(AssertionError, match="again"):
        train_lorsas(tiny_llama, LAYER, pairs, RECIPES, **other)
    (first[0].folder / "lorsa.safetensors").unlink()
    with pytest.raises(CacheError, match="is missing"):
        train_lorsas(tiny_llama, LAYER, pairs, RECIPES, **options)


def test_rows_hold_curves_and_held_out_numbers(
    tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs
) -> None:
    runs = train_lorsas(tiny_llama, LAYER, pairs, RECIPES, train=quick(), **OPTIONS)
    found = lorsa_rows(runs, pairs, model=tiny_llama, tokens=tiny_tokens, progress=False)
    ends = {row.method: row for row in found if row.split == "held_out"}
    for run in runs:
        measured = evaluate_lorsa(run.lorsa(), pairs)
        row = ends[run.recipe.name]
        assert (row.dead_fraction, row.fvu, row.l0) == pytest.approx(
            (measured.dead_fraction, measured.fvu, measured.l0)
        )
        assert (row.dead_window_tokens, row.d_sae, row.site) == (pairs.n, N_OV, "attention")
        assert row.cross_entropy_delta is not None
        window = run.train.dead_window
        curve = [row for row in found if row.split == "train" and row.method == run.recipe.name]
        history = [moment for moment in run.history() if moment["tokens"] >= window]
        assert [(row.tokens, row.dead_fraction) for row in curve] == [
            (moment["tokens"], moment[f"dead_fraction_{window}"]) for moment in history
        ]
    told = lorsa_budget(tiny_llama, runs, pairs, pairs, tiny_tokens)
    for part in ("attention of layer 1", f"{N_OV} units", f"sequences of {CONTEXT}", "seed 0", "dead window"):
        assert part in told


def test_contexts_are_where_a_unit_wrote_most(
    tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs
) -> None:
    lorsa = started(tiny_llama, pairs)
    with torch.no_grad():
        z = torch.zeros(len(pairs), CONTEXT, N_OV)
        code = lorsa.encode(pairs.inputs)
        z.scatter_(-1, code.indices, code.values)
        z[:, 0] = 0
    firings = unit_firings(lorsa, pairs)
    frequency = (z[:, 1:] != 0).double().mean((0, 1))
    assert firings.frequency.tolist() == pytest.approx(frequency.tolist())
    mean = z[:, 1:].sum((0, 1)) / (z[:, 1:] != 0).sum((0, 1)).clamp_min(1)
    assert firings["mean"].tolist() == pytest.approx(mean.tolist(), rel=1e-4)
    unit = int(frequency.argmax())
    found = top_contexts(lorsa, pairs, tiny_tokens, [unit], lambda ids: f"{ids[0]} ", n=3)
    best = z[:, :, unit].amax(1).sort(descending=True).values[:3]
    assert found.value.tolist() == pytest.approx(best.tolist(), rel=1e-4)
    sequence = int(z[:, :, unit].amax(1).argmax())
    position = int(z[sequence, :, unit].argmax())
    assert found.text[0].split()[-1].strip("«»") == str(tiny_tokens.ids[sequence, position].item())
    # What every position gives adds up to what the unit found.
    with torch.no_grad():
        whole = lorsa.units(pairs.inputs[sequence : sequence + 1])[0, position, unit].item()
    assert found.value[0] == pytest.approx(whole, rel=1e-4)
    source = position - found.distance[0]
    assert f"«{tiny_tokens.ids[sequence, source].item()} »" in found.text[0]


def test_a_negative_value_was_read_where_it_is_most_negative(
    tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs
) -> None:
    lorsa = from_attention(tiny_llama, LAYER, CONTEXT)
    found = top_contexts(lorsa, pairs, tiny_tokens, range(lorsa.n_ov), lambda ids: f"{ids[0]} ", n=1)
    with torch.no_grad():
        z = lorsa.units(pairs.inputs)[:, 1:]
    negative = 0
    for row in found.itertuples():
        sequence, position = divmod(int(z[:, :, row.unit].abs().argmax()), CONTEXT - 1)
        _, parts = read_from(lorsa, pairs.inputs[sequence][None], row.unit, position + 1)
        of_value = parts / z[sequence, position, row.unit]
        assert row.share == pytest.approx(of_value.max().item(), rel=1e-4)
        assert of_value[position + 1 - row.distance].item() == pytest.approx(row.share, rel=1e-4)
        negative += int(z[sequence, position, row.unit] < 0)
    assert negative > 3


def test_firings_and_contexts_of_a_lorsa_on_another_device(
    tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(torch.Tensor):
        """As a tensor on a GPU: it meets no tensor of the CPU until it is copied there."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert not any(type(one) is torch.Tensor and one.ndim for one in args), f"two devices in {func}"
            out = super().__torch_function__(func, types, args, kwargs)
            return out.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else out

    lorsa, encode = started(tiny_llama, pairs), Lorsa.encode
    found = [unit_firings(lorsa, pairs), top_contexts(lorsa, pairs, tiny_tokens, [0, 7], str)]
    monkeypatch.setattr(
        Lorsa, "encode", lambda *given: SparseCode(*(one.as_subclass(Elsewhere) for one in encode(*given)))
    )
    there = [unit_firings(lorsa, pairs), top_contexts(lorsa, pairs, tiny_tokens, [0, 7], str)]
    for ours, theirs in zip(there, found, strict=True):
        pd.testing.assert_frame_equal(ours, theirs)


def test_a_unit_that_never_wrote_has_no_context(
    tiny_llama: Any, tiny_tokens: Tokens, pairs: SequencePairs
) -> None:
    lorsa = started(tiny_llama, pairs)
    with torch.no_grad():
        lorsa.b_V[5] = -1e4
    assert top_contexts(lorsa, pairs, tiny_tokens, [5], str).empty
    assert unit_firings(lorsa, pairs).frequency[5] == 0
    with pytest.raises(OptionError, match="units=96"):
        top_contexts(lorsa, pairs, tiny_tokens, [N_OV], str)
    with pytest.raises(OptionError, match="tokens"):
        top_contexts(lorsa, pairs, tiny_tokens[:2], [0], str)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init": "assi"}, "asi"),
        ({"d_init_fraction": 0.5}, "left out for 'random'"),
        ({"init": "asi"}, "d_init_fraction=None"),
        ({"init": "asi", "d_init_fraction": 1.5}, "d_init_fraction=1.5"),
    ],
)
def test_bad_recipes_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises((OptionError, UnknownNameError), match=named):
        LorsaRecipe("mine", **options)


def test_nothing_to_train_is_an_error(tiny_llama: Any, pairs: SequencePairs) -> None:
    for change, named in (({"recipes": []}, "recipes"), ({"seeds": []}, "seeds")):
        arguments = {"recipes": RECIPES, **OPTIONS, **change}
        with pytest.raises(OptionError, match=named):
            train_lorsas(tiny_llama, LAYER, pairs, arguments.pop("recipes"), **arguments)
