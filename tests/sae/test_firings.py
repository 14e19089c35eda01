"""Firings of features: those of the dense code, whatever the blocks, and a fair sample of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from some_dictionaries import D_SAE, activations, trained_like, transcoder_like
from torch import Tensor

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError, OptionError
from asi_lens.sae import firings
from asi_lens.sae.firings import find_firings
from asi_lens.sae.threshold import set_threshold

N = 300


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(firings, "_BLOCK", 37)
    return


def stored(n: int = N) -> ActivationStore:
    return ActivationStore.from_tensor(activations(n))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu", "relu", "gated"])
def test_against_the_dense_code(activation: str) -> None:
    sae = trained_like(activation=activation)
    if activation not in ("topk", "relu"):
        set_threshold(sae, activations(), 3)
    dense = sae.encode_dense(activations(N)).detach()
    found = find_firings(sae, stored(), top=5, sampled=400, progress=False)
    assert torch.equal(found.counts, (dense > 0).sum(0))
    torch.testing.assert_close(found.sums, dense.double().sum(0))
    torch.testing.assert_close(found.frequency, (dense > 0).double().mean(0))
    for feature in range(D_SAE):
        firing = dense[:, feature].nonzero()[:, 0]
        order = dense[firing, feature].argsort(descending=True, stable=True)[:5]
        expected = firing[order].tolist()
        assert found.top.rows[feature].tolist() == expected + [-1] * (5 - len(expected))
        # 400 places hold every firing.
        assert found.sampled.rows[feature, : len(firing)].tolist() == firing.tolist()
        assert found.sampled.values[feature, : len(firing)].tolist() == dense[firing, feature].tolist()
        assert (found.sampled.rows[feature, len(firing) :] == -1).all()


@given(
    entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=5),
    m=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_the_best_do_not_depend_on_the_cuts(entries: list[tuple[int, int]], cuts: list[int], m: int) -> None:
    """The kept entries are the first m by (key from the largest down, order of arrival)."""
    best = firings._Best(4, m)
    edges = [0, *sorted(cuts), len(entries)]
    for low, high in itertools.pairwise(edges):
        part = entries[low:high]
        features = torch.tensor([feature for feature, _ in part], dtype=torch.int64)
        keys = torch.tensor([float(key) for _, key in part], dtype=torch.float64)
        rows = torch.arange(low, low + len(part))
        best.add(features, rows, keys.float(), keys)
    for feature in range(4):
        mine = [(-key, row) for row, (each, key) in enumerate(entries) if each == feature]
        expected = [row for _, row in sorted(mine)][:m]
        assert best.picks().rows[feature].tolist() == expected + [-1] * (m - len(expected))


@pytest.mark.usefixtures("blocks", "unchecked_shapes")
def test_the_sample_is_fair() -> None:
    """Over seeds, the rows of a feature are drawn equally often (a chi-square test at 1 in 10,000)."""
    sae = trained_like()
    dense = sae.encode_dense(activations(N)).detach()
    feature = int((dense > 0).sum(0).argmax())
    firing = dense[:, feature].nonzero()[:, 0]
    drawn = torch.zeros(N)
    seeds, m = 200, 6
    for seed in range(seeds):
        rows = find_firings(sae, stored(), top=1, sampled=m, seed=seed, progress=False).sampled.rows
        assert len(set(rows[feature].tolist())) == m
        drawn[rows[feature]] += 1
    counts = drawn[firing]
    assert counts.sum() == seeds * m
    expected = seeds * m / len(firing)
    # Draws without replacement vary less than a multinomial's, so the bound is on the safe side.
    square, freedom = ((counts - expected) ** 2 / expected).sum().item(), len(firing) - 1
    assert square < freedom + 3.72 * np.sqrt(2 * freedom) + 10


def test_transcoders_read_the_inputs() -> None:
    coder = transcoder_like("topk")
    x = activations(N)
    other = ActivationStore.from_tensor(torch.randn(N, coder.d_out))
    found = find_firings(coder, PairedStores(ActivationStore.from_tensor(x), other), progress=False)
    assert torch.equal(found.counts, (coder.encode_dense(x) > 0).sum(0))


def test_bad_input() -> None:
    wide: Tensor = torch.randn(50, 11)
    with pytest.raises(OptionError, match=r"store='of width 11'.*d_in=10"):
        find_firings(trained_like(), ActivationStore.from_tensor(wide), progress=False)
    for options in ({"top": 0}, {"sampled": 0}, {"seed": -1}):
        with pytest.raises(OptionError, match=next(iter(options))):
            find_firings(trained_like(), stored(), **options)  # type: ignore[arg-type]
    bad = activations(N)
    store = ActivationStore.from_tensor(bad)
    bad[5] = torch.nan  # the store holds the same memory
    with pytest.raises(DataError, match="NaN"):
        find_firings(trained_like(), store, progress=False)
