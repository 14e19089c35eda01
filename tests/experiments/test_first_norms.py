"""One recipe at several first norms: what each run begins with, and what its rows say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainings import quick, rows

from asi_lens.activations.store import ActivationStore
from asi_lens.experiments.first_norms import first_norm_rows, with_overshoots
from asi_lens.experiments.recipes import Recipe
from asi_lens.experiments.rows import dead_feature_rows
from asi_lens.experiments.runs import TrainedRun, started, train_recipes

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
ABOUT = {"model": "m", "corpus": "news", "site": "attn_out", "layer": 3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))


@pytest.fixture
def store() -> ActivationStore:
    return ActivationStore.from_tensor(rows(), ABOUT)


def train(store: ActivationStore, methods: list[Recipe], lr: float = 1e-3) -> list[TrainedRun]:
    train = replace(quick(n_tokens=640), lr=lr)
    return train_recipes(store, methods, d_sae=64, k=4, train=train, log_every=2, progress=False)


def test_rows_bear_the_recipes_own_name_and_the_norm(store: ActivationStore) -> None:
    asi = Recipe("ASI", "asi", 8)
    compared = with_overshoots(["random", asi], [1, 2.5])
    assert [recipe.overshoot for recipe in compared] == [1, 2.5] * 2
    runs = [run for lr in (1e-3, 2e-3) for run in train(store, compared, lr)]
    found = first_norm_rows(runs, dead_feature_rows(runs, store, curves=False))
    ends = {(row.method, row.lr, row.overshoot): row for row in found if row.split == "held_out"}
    assert list(ends) == [
        (method, lr, o) for lr in (1e-3, 2e-3) for method in ("random", "ASI") for o in (1, 2.5)
    ]
    for method in ("random", "ASI"):
        best, longer = ends[method, 1e-3, 1], ends[method, 1e-3, 2.5]
        assert longer.encoder_norm == pytest.approx(2.5 * best.encoder_norm, abs=2e-4)
        assert best.fvu != longer.fvu


def test_the_best_norm_is_the_run_of_the_recipe_itself(store: ActivationStore) -> None:
    (plain,) = train(store, [Recipe("random")])
    best, longer = train(store, with_overshoots(["random"], [1.0, 2.0]))
    assert plain.folder == best.folder
    assert longer.folder != best.folder


def test_a_run_begins_at_its_norm(store: ActivationStore) -> None:
    best, longer = train(store, with_overshoots(["random"], [1.0, 2.0]))
    first, second = (started(run, store, torch.device("cpu"), None)[0].sae for run in (best, longer))
    torch.testing.assert_close(second.encoder_rows, 2 * first.encoder_rows)
    assert torch.equal(second.W_dec, first.W_dec)
