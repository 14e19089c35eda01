"""One recipe at several first norms and rates of its encoder: what runs begin with, and what rows say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainings import quick, rows

from asi_lens.activations.store import ActivationStore
from asi_lens.experiments.encoder_steps import encoder_step_rows, with_factors
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


def test_rows_bear_the_recipes_own_name_and_the_factors(store: ActivationStore) -> None:
    factors = [(1, 1), (2.5, 1), (1, 0.5)]
    compared = with_factors(["random", Recipe("ASI", "asi", 8)], factors)
    runs = [run for lr in (1e-3, 2e-3) for run in train(store, compared, lr)]
    found = encoder_step_rows(runs, dead_feature_rows(runs, store, curves=False))
    ends = {
        (row.method, row.lr, row.overshoot, row.encoder_lr): row for row in found if row.split == "held_out"
    }
    assert list(ends) == [
        (method, lr, *pair) for lr in (1e-3, 2e-3) for method in ("random", "ASI") for pair in factors
    ]
    for method in ("random", "ASI"):
        plain, longer, slower = (ends[method, 1e-3, *pair] for pair in factors)
        assert longer.encoder_norm == pytest.approx(2.5 * plain.encoder_norm, abs=2e-4)
        assert slower.encoder_norm == plain.encoder_norm
        assert len({plain.fvu, longer.fvu, slower.fvu}) == 3


def test_factors_of_one_are_the_run_of_the_recipe_itself(store: ActivationStore) -> None:
    (alone,) = train(store, [Recipe("random")])
    plain, longer, slower = train(store, with_factors(["random"], [(1, 1), (2, 1), (1, 0.5)]))
    assert alone.folder == plain.folder
    assert len({plain.folder, longer.folder, slower.folder}) == 3
    assert [run.train.encoder_lr for run in (plain, longer, slower)] == [1, 1, 0.5]


def test_a_run_begins_at_its_norm(store: ActivationStore) -> None:
    plain, longer = train(store, with_factors(["random"], [(1, 1), (2, 1)]))
    first, second = (started(run, store, torch.device("cpu"), None)[0].sae for run in (plain, longer))
    torch.testing.assert_close(second.encoder_rows, 2 * first.encoder_rows)
    assert torch.equal(second.W_dec, first.W_dec)
