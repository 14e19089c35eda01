"""Paired differences: the same text under each method's dictionaries, one or several layers at once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import split_of
from small_trainings import quick

from asi_lens.base.errors import OptionError
from asi_lens.experiments import paired
from asi_lens.experiments.paired import paired_rows
from asi_lens.experiments.runs import TrainedRun, train_recipes
from asi_lens.inputs import models
from asi_lens.sae.evaluate import evaluate_together

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


@pytest.fixture
def trained(
    tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, dict[Any, list[TrainedRun]]]:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    data = split_of(tiny_llama, tmp_path, [("attn_out", 0), ("attn_out", 2)], n_tokens_loss=96)
    options: dict[str, Any] = {"d_sae": 64, "k": 4, "train": quick(n_tokens=256), "progress": False}
    runs = {
        where: train_recipes(store, ["random", "ASI"], seeds=[0, 1], **options)
        for where, store in data.train.items()
    }
    return data, runs


def test_one_layer_is_what_an_evaluation_finds(tiny_llama: Any, trained: Any) -> None:
    data, by_place = trained
    where, runs = next(iter(by_place.items()))
    found = paired_rows(runs, tiny_llama, data.loss_tokens, progress=False)
    assert [(row.method, row.reference, row.seed) for row in found] == [
        ("ASI", "random", 0),
        ("ASI", "random", 1),
    ]
    saes = [run.sae() for run in runs]
    single = evaluate_together(
        saes, data.held_out[where], model=tiny_llama, tokens=data.loss_tokens, progress=False
    )
    losses = {(run.recipe.name, run.seed): one.losses for run, one in zip(runs, single, strict=True)}
    for row in found:
        own, other = losses["ASI", row.seed], losses["random", row.seed]
        assert own is not None
        assert other is not None
        assert row.kl == pytest.approx(own.kl, rel=1e-6)
        assert row.kl_difference == pytest.approx(own.kl - other.kl, rel=1e-4, abs=1e-9)
        assert row.cross_entropy_delta == pytest.approx(own.cross_entropy_delta, rel=1e-4, abs=1e-9)
        expected = own.cross_entropy_delta - other.cross_entropy_delta
        assert row.cross_entropy_difference == pytest.approx(expected, rel=1e-4, abs=1e-9)
        assert row.n_sequences == len(data.loss_tokens)
        assert row.places == f"{where[0]} {where[1]}"


def test_all_layers_are_in_their_places_at_once(tiny_llama: Any, trained: Any) -> None:
    data, by_place = trained
    assert len(by_place) >= 2, "the data of this test have several places"
    runs = [run for own in by_place.values() for run in own]
    found = paired_rows(runs, tiny_llama, data.loss_tokens, progress=False)
    assert {row.n_places for row in found} == {len(by_place)}
    ids = data.loss_tokens.ids
    targets = ids[:, 1:].long()

    def loss(method: str) -> torch.Tensor:
        hooks: dict[str, Any] = {}
        for run in runs:
            if (run.recipe.name, run.seed) == (method, 0):
                hooks |= run.sae().hooks(tiny_llama)
        with torch.inference_mode():
            logits = models.forward(tiny_llama, ids, hooks, logits=True)
        assert logits is not None
        return -logits[:, :-1].float().log_softmax(-1).gather(-1, targets[..., None])[..., 0].mean(1)

    difference = (loss("ASI") - loss("random")).double()
    assert found[0].cross_entropy_difference == pytest.approx(difference.mean().item(), rel=1e-3, abs=1e-7)
    error = difference.std().item() / math.sqrt(len(difference))
    assert found[0].cross_entropy_error == pytest.approx(error, rel=1e-3, abs=1e-7)


def test_measurements_are_cached(tiny_llama: Any, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data, by_place = trained
    runs = next(iter(by_place.values()))
    first = paired_rows(runs, tiny_llama, data.loss_tokens, progress=False)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(paired, "sequence_losses", refuse)
    assert paired_rows(runs, tiny_llama, data.loss_tokens, progress=False) == first


def test_what_cannot_be_paired_is_refused(tiny_llama: Any, trained: Any) -> None:
    data, by_place = trained
    (first, second), tokens = list(by_place.values())[:2], data.loss_tokens
    with pytest.raises(OptionError, match=r"reference='AuxK' .*one of random, ASI"):
        paired_rows(first, tiny_llama, tokens, reference="AuxK")
    with pytest.raises(OptionError, match="of the same places for every method and seed"):
        paired_rows([*first, second[0]], tiny_llama, tokens)
    with pytest.raises(OptionError, match="one for each place"):
        paired_rows([*first, first[0]], tiny_llama, tokens)
    with pytest.raises(OptionError, match="two sequences or more"):
        paired_rows(first, tiny_llama, tokens[:1])
