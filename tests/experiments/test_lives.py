"""Lives of features, against following every feature through every step by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import D_IN, quick
from small_trainings import rows as draw

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import CacheError, OptionError
from asi_lens.experiments import lives, runs
from asi_lens.experiments.runs import train_recipes
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.drift import Drift
from asi_lens.sae.initialize import auto_d_init, initialize
from asi_lens.sae.train import Trainer
from asi_lens.training.loop import train_together

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
ABOUT = {"model": "m", "corpus": "news", "site": "attn_out", "layer": 15}
WINDOW = 128
OPTIONS: dict[str, Any] = {
    "d_sae": 256,
    "k": 2,
    "train": quick(n_tokens=640, dead_window=WINDOW, lr=3e-2),
    "log_every": 1,
    "progress": False,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store() -> ActivationStore:
    return ActivationStore.from_tensor(draw(), metadata=ABOUT)


def test_lives_are_those_of_every_feature_by_hand(store: ActivationStore) -> None:
    (run,) = train_recipes(store, ["random"], seeds=[3], keep_firings=True, **OPTIONS)
    sae = SparseAutoencoder(SAEConfig(D_IN, 256, 2, seed=3))
    initialize(sae, "random", store.spectrum, None, store.sample(1000))
    inside = Drift(store.spectrum, auto_d_init(store.spectrum)).shares(sae)[1]
    trainer = Trainer(sae, replace(OPTIONS["train"], seed=3))
    firings: list[list[int]] = [[] for _ in range(256)]  # tokens seen at each firing
    before = torch.zeros(256, dtype=torch.int64)

    def follow(trainer: Trainer, output: Any) -> None:
        for feature in (trainer.ledger.counts > before).nonzero().flatten().tolist():
            firings[feature].append(output.tokens)
        before.copy_(trainer.ledger.counts)

    trainer.fit(store, log_every=1, progress=False, on_log=follow)
    order = inside.argsort(descending=True, stable=True).tolist()
    tenths = {1: order[:26], 10: order[-25:], None: list(range(256))}
    found = {(row.tenth, row.tokens): row for row in lives.life_rows([run])}
    assert len(found) == 11 * 10
    for tenth, own in tenths.items():
        for n in range(64, 641, 64):
            row = found[tenth, n]
            assert row.n_features == len(own)
            last = {f: max((t for t in firings[f] if t <= n), default=0) for f in own}
            assert row.never_fired * len(own) == pytest.approx(sum(t == 0 for t in last.values()))
            later = sum(max(firings[f], default=0) > n for f in own)
            assert row.fires_later * len(own) == pytest.approx(later)
            if n < WINDOW:
                assert row.dead is row.died is row.once_dead is row.came_back is None
                continue
            dead = {f for f in own if last[f] <= n - WINDOW}
            once = {
                f
                for f in own
                for m in range(WINDOW, n + 1, 64)
                if not any(m - WINDOW < t <= m for t in firings[f])
            }
            for share, told in ((row.dead, dead), (row.once_dead, once), (row.came_back, once - dead)):
                assert share == pytest.approx(len(told) / len(own))
            assert row.died == pytest.approx(len([f for f in dead if firings[f] and last[f]]) / len(own))
    end = found[None, 640]
    assert min(end.died or 0, end.came_back or 0, end.never_fired) > 0, "every fate occurs: all were compared"
    assert found[1, 64].tail_share < end.tail_share < found[10, 64].tail_share
    assert end.tail_share == pytest.approx((1 - inside).mean().item(), rel=1e-5)


def test_a_start_in_the_subspace_has_no_tenths(store: ActivationStore) -> None:
    found = lives.life_rows(train_recipes(store, lives.METHODS, keep_firings=True, **OPTIONS))
    tenths = {name: {row.tenth for row in found if row.method == name} for name in ("random", "ASI")}
    assert tenths == {"random": {None, *range(1, 11)}, "ASI": {None}}
    asi = [row for row in found if row.init == "asi"]
    assert {row.optimizer for row in asi} == {"adam", "sparse_adam"}
    assert max(row.tail_share for row in asi) < 1e-5


def test_kept_firings_change_neither_the_training_nor_the_keys_of_others(store: ActivationStore) -> None:
    (plain,) = train_recipes(store, ["random"], **OPTIONS)
    (kept,) = train_recipes(store, ["random"], keep_firings=True, **OPTIONS)
    (same,) = train_recipes(store, ["random"], keep_firings=False, **OPTIONS)
    assert same.folder == plain.folder != kept.folder
    assert torch.equal(kept.sae().W_dec, plain.sae().W_dec)
    with pytest.raises(CacheError, match="last_firings"):
        lives.life_rows([plain])


def test_a_run_that_was_stopped_keeps_the_same_firings(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = train_recipes(store, ["random"], keep_firings=True, **OPTIONS)
    expected = lives.life_rows([whole])
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "second"))

    def stop(trainers: Any, *args: Any, **kwargs: Any) -> None:
        keep = kwargs.pop("on_log")

        def log(trainer: Trainer, output: Any) -> None:
            keep(trainer, output)
            if output.step >= 5:
                raise KeyboardInterrupt

        train_together(trainers, *args, **kwargs, on_log=log)

    options = {**OPTIONS, "checkpoint_every": 128, "keep_firings": True}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "train_together", stop)
        with pytest.raises(KeyboardInterrupt):
            train_recipes(store, ["random"], **options)
    (resumed,) = train_recipes(store, ["random"], **options)
    assert resumed.folder != whole.folder
    assert lives.life_rows([resumed]) == expected


def test_paired_stores_are_refused(store: ActivationStore) -> None:
    with pytest.raises(OptionError, match="keep_firings must be False for paired"):
        train_recipes(PairedStores(store, store), ["random"], keep_firings=True, **OPTIONS)


def test_last_steps_are_those_of_rows_followed_by_hand(store: ActivationStore) -> None:
    (run,) = train_recipes(store, ["random"], seeds=[3], keep_rows=True, **OPTIONS)
    found = {(row.group, row.tokens): row for row in lives.last_step_rows([run])}
    assert len(found) == 2 * (lives.BEFORE + lives.AFTER + 1)
    sae = SparseAutoencoder(SAEConfig(D_IN, 256, 2, seed=3))
    initialize(sae, "random", store.spectrum, None, store.sample(1000))
    trainer = Trainer(sae, replace(OPTIONS["train"], seed=3))
    norms, biases = [], []

    def follow(trainer: Trainer, output: Any) -> None:
        norms.append(trainer.sae.encoder_rows.norm(dim=1).clone())
        biases.append(trainer.sae.b_enc.detach().clone())

    trainer.fit(store, log_every=1, progress=False, on_log=follow)
    last = trainer.ledger.last_fired
    dead = last <= 640 - WINDOW
    own = [
        (f, place)
        for f in range(256)
        if dead[f] and (place := int(last[f]) // 64 - 1) > lives.BEFORE and place + lives.AFTER < 10
    ]
    assert own, "some features died late enough to be followed"
    for offset in range(-lives.BEFORE, lives.AFTER + 1):
        died, alive = found["died", 64 * offset], found["alive", 64 * offset]
        assert (died.n_features, alive.n_features) == (len(own), int((~dead).sum()))
        norm = sum(norms[place + offset][f].item() for f, place in own) / len(own)
        bias = sum(biases[place + offset][~dead].mean().item() for _, place in own) / len(own)
        assert died.norm == pytest.approx(norm, rel=1e-5)
        assert alive.bias == pytest.approx(bias, rel=1e-4, abs=1e-7)


def test_rows_are_kept_only_where_asked_for(store: ActivationStore) -> None:
    (kept,) = train_recipes(store, ["random"], keep_rows=True, **OPTIONS)
    (firings,) = train_recipes(store, ["random"], keep_firings=True, **OPTIONS)
    assert kept.folder != firings.folder
    assert lives.life_rows([kept]) == lives.life_rows([firings])
    with pytest.raises(CacheError, match="bias"):
        lives.last_step_rows([firings])


def test_a_run_in_which_nothing_died_has_no_numbers(store: ActivationStore) -> None:
    options = {**OPTIONS, "train": quick(n_tokens=640, dead_window=640)}
    found = lives.last_step_rows(train_recipes(store, ["random"], keep_rows=True, **options))
    died = [row for row in found if row.group == "died"]
    assert {(row.n_features, row.bias, row.norm) for row in died} == {(0, None, None)}
