"""Features that ASI saves: who is paired with whom, and numbers of the dictionaries as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import OPTIONS

import asi_lens as al
from asi_lens.base.errors import OptionError
from asi_lens.experiments.runs import train_recipes
from asi_lens.experiments.saved_features import ALIVE, SAVED, pairs_of, runs_by_seed, saved_features
from asi_lens.inputs.corpora import Tokens
from asi_lens.sae.firings import find_firings

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


def test_pairs() -> None:
    lost = torch.tensor([0, 0, 0, 5, 9, 9, 1, 7, 0])
    kept = torch.tensor([4, 100, 1, 5, 90, 30, 50, 6, 20])
    # 2 fires once, 6 fired once in the random start: neither saved nor surely alive.
    assert pairs_of(lost, kept, 9) == [(0, 3), (8, 5), (1, 4), (None, 7)]
    assert pairs_of(lost, kept, 2) == [(0, 3), (1, 4)]
    assert pairs_of(lost, kept, 1) == [(0, 3)]
    none = torch.full_like(lost, 9)
    assert pairs_of(none, kept, 2) == [(None, 0), (None, 1)]
    assert pairs_of(torch.zeros_like(lost), kept, 3) == []


@pytest.fixture
def runs(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    store = al.harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "store", **OPTIONS)
    train = al.TrainConfig(n_tokens=600, batch_size=60, dead_window=300)
    return store, train_recipes(store, ["random", "ASI"], d_sae=120, k=3, train=train, seeds=[0, 1])


def test_rows_are_those_of_the_dictionaries(runs: Any, tiny_llama: Any, tiny_tokens: Tokens) -> None:
    store, trained = runs
    by_seed = runs_by_seed(trained)
    assert {seed: list(runs) for seed, runs in by_seed.items()} == {
        0: ["random", "ASI"],
        1: ["random", "ASI"],
    }
    random, asi = by_seed[0]["random"], by_seed[0]["ASI"]
    rows = saved_features(random, asi, store, tiny_tokens, tiny_llama, tiny_tokens[:4], 6)
    lost, kept = (find_firings(run.sae(), store, progress=False).counts for run in (random, asi))
    assert 1 <= len(rows) <= 12
    for row in rows:
        assert row.firings == kept[row.feature] > 1
        assert (lost[row.feature] == 0) == (row.group == SAVED)
        assert row.information < 8
    by_pair = {pair: {row.group for row in rows if row.pair == pair} for pair in {row.pair for row in rows}}
    assert all(groups in ({SAVED, ALIVE}, {ALIVE}) for groups in by_pair.values())
    assert len({row.feature for row in rows}) == len(rows)
    other = by_seed[1]["ASI"]
    with pytest.raises(OptionError, match="different seeds"):
        saved_features(random, other, store, tiny_tokens, tiny_llama, tiny_tokens[:4], 6)
    with pytest.raises(OptionError, match="n=0"):
        saved_features(random, asi, store, tiny_tokens, tiny_llama, tiny_tokens[:4], 0)
