"""Treatments of the inputs: what each trains on, and what is measured at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import D_IN, quick, rows

from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError
from asi_lens.collapse.centering import dead_at_start, gamma, geometric_median
from asi_lens.experiments import treatments as treatments_module
from asi_lens.experiments.rows import dead_feature_rows
from asi_lens.experiments.runs import train_recipes
from asi_lens.experiments.treatments import shapes, start_rows, treatments

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
ABOUT = {"model": "m", "corpus": "news", "site": "attn_out", "layer": 3}


@pytest.fixture
def store() -> ActivationStore:
    # A mean along one direction, three times as long as sigma.
    x = rows()
    shift = torch.nn.functional.normalize(torch.arange(1.0, D_IN + 1), dim=0)
    sigma = x.var(0).sum().sqrt()
    return ActivationStore.from_tensor(x - x.mean(0) + 3 * sigma * shift, ABOUT)


def test_the_mean_kills_at_the_start_and_centering_cures(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    options: dict[str, Any] = {"d_sae": 256, "k": 4, "powers": [0.0], "progress": False}
    found = start_rows({("attn_out", 3): store}, **options, seeds=[5])
    by_input = {row.input: row for row in found}
    assert list(by_input) == ["raw", "mean", "geometric median", "power 0"]
    assert by_input["raw"].gamma == pytest.approx(3, rel=0.01)
    assert by_input["mean"].gamma == by_input["power 0"].gamma == 0
    assert 0 < by_input["geometric median"].gamma < 0.5
    assert by_input["raw"].dead > 0.3 > by_input["mean"].dead
    assert by_input["power 0"].dead <= by_input["mean"].dead
    exact = torch.cat(list(store.in_order(999))).float()
    assert by_input["raw"].dead == dead_at_start(exact, 4, 256, seed=5)
    assert by_input["mean"].dead == dead_at_start(exact, 4, 256, center=store.mean, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(treatments_module, "dead_at_start", None)
        assert start_rows({("attn_out", 3): store}, **options, seeds=[5]) == found, "from the cache"
    again = start_rows({("attn_out", 3): store}, **{**options, "k": 8}, seeds=[5, 6])
    assert [(row.k, row.seed) for row in again] == [(8, 5), (8, 6)] * 4


def test_every_treatment_is_trained_and_told(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    held = ActivationStore.from_tensor(torch.cat(list(store.in_order(999)))[:300], ABOUT)
    found = treatments(store, held, [0.5])
    assert [one.name for one in found] == ["raw", "mean", "geometric median", "power 0.5"]
    median = geometric_median(store.sample(store.n))
    torch.testing.assert_close(found[2].train.mean, store.mean - median, rtol=1e-4, atol=1e-4)
    for one in found:
        runs = train_recipes(one.train, one.recipes, d_sae=64, k=4, train=quick(), progress=False)
        told = one.rows(dead_feature_rows(runs, one.held_out, curves=False), store)
        ends = [row for row in told if row.split == "held_out"]
        assert [(row.start, row.input) for row in ends] == [("random", one.name), ("ASI", one.name)]
        assert {row.gamma for row in told} == {gamma(store.spectrum)}
        # FVU is of the raw activations under every treatment, to which a shift does not matter.
        for run, row in zip(runs, ends, strict=True):
            x = torch.cat(list(one.held_out.in_order(999))).float()
            error = (run.sae()(x) - x).square().sum() / (x - x.mean(0)).square().sum()
            assert row.fvu == pytest.approx(error.item(), rel=1e-3)
            assert x.shape[1] == D_IN


def test_shapes_change_the_spectrum_and_tell_its_ranks(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    held = ActivationStore.from_tensor(torch.cat(list(store.in_order(999)))[:300], ABOUT)
    found = {one.name: one for one in shapes(store, held, [1.5, 1.0, 0.0])}
    assert list(found) == ["power 1.5", "measured", "power 0", "flat head", "lifted tail"]
    assert [one.name for one in shapes(store, held, [1.5, 0.5], ends=False)] == ["power 1.5", "power 0.5"]
    ranks = {name: one.train.spectrum for name, one in found.items()}
    assert ranks["measured"].effective_rank == pytest.approx(store.spectrum.effective_rank)
    assert ranks["power 0"].effective_rank_fraction == pytest.approx(1)
    assert (
        ranks["power 1.5"].effective_rank
        < ranks["measured"].effective_rank
        < ranks["lifted tail"].effective_rank
    )
    assert ranks["flat head"].participation_ratio > ranks["measured"].participation_ratio
    one = found["power 0"]
    matrix = one.train.matrix
    exact = (torch.cat(list(held.in_order(999))).double() - store.mean) @ matrix
    torch.testing.assert_close(one.held_out.rows(torch.arange(300)), exact.float(), rtol=1e-3, atol=1e-3)
    runs = train_recipes(one.train, ["random"], d_sae=64, k=4, train=quick(), progress=False)
    told = one.rows(dead_feature_rows(runs, one.held_out, curves=False))
    assert {(row.shape, row.width, row.intrinsic_dimension_99) for row in told} == {("power 0", D_IN, D_IN)}


def test_a_site_that_cannot_be_whitened_is_refused_before_training(store: ActivationStore) -> None:
    few = ActivationStore.from_tensor(rows()[: D_IN // 2], ABOUT)
    with pytest.raises(DataError, match="cannot be whitened"):
        treatments(few, few, [0.5])
    assert len(treatments(few, few, [])) == 3
