"""The ledger against counting by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.base.errors import DataError, OptionError
from asi_lens.kernels.codes import SparseCode
from asi_lens.training.ledger import DeadnessLedger


def code(picks: list[list[int]], values: list[list[float]] | None = None) -> SparseCode:
    indices = torch.tensor(picks)
    return SparseCode(indices, torch.ones(indices.shape) if values is None else torch.tensor(values))


def test_windows_and_silence() -> None:
    ledger = DeadnessLedger(5)
    ledger.update(code([[0, 1], [0, 2]]))
    ledger.update(code([[0, 3], [0, 3]]))
    ledger.update(code([[0, 1]]))
    assert ledger.n_tokens == 5
    assert ledger.last_fired.tolist() == [5, 5, 2, 4, 0]
    assert ledger.counts.tolist() == [5, 2, 1, 2, 0]
    assert [ledger.dead_fraction(w) for w in (1, 2, 3, 4, 5, 6)] == [0.6, 0.4, 0.4, 0.2, 0.2, 0.0]
    assert ledger.dead(3).tolist() == [2, 4]
    assert ledger.silent_fraction == 0.2


def test_a_pick_with_value_zero_is_no_firing() -> None:
    ledger = DeadnessLedger(3)
    ledger.update(code([[0, 1], [2, 1]], [[1.0, 0.0], [0.0, 0.0]]))
    assert ledger.counts.tolist() == [1, 0, 0]
    assert ledger.last_fired.tolist() == [2, 0, 0]


def test_before_the_window_is_full_nothing_is_dead() -> None:
    ledger = DeadnessLedger(4)
    for _ in range(9):
        ledger.update(code([[0]]))
    assert ledger.dead_fraction(10) == 0.0
    ledger.update(code([[0]]))
    assert ledger.dead_fraction(10) == 0.75


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=12))
def test_against_counting_by_hand(batches: list[list[int]]) -> None:
    ledger = DeadnessLedger(6)
    since = [0] * 6
    for batch in batches:
        ledger.update(code([[feature] for feature in batch]))
        since = [0 if f in batch else s + len(batch) for f, s in enumerate(since)]
    assert (ledger.n_tokens - ledger.last_fired).tolist() == since
    flat = [feature for batch in batches for feature in batch]
    assert ledger.counts.tolist() == [flat.count(f) for f in range(6)]


def test_a_stored_ledger_comes_back() -> None:
    ledger, other = DeadnessLedger(4), DeadnessLedger(4)
    ledger.update(code([[0], [1]]))
    ledger.update(code([[1]]))
    other.load_state(ledger.state())
    assert other.last_fired.tolist() == ledger.last_fired.tolist() == [2, 3, 0, 0]
    assert (other.counts.tolist(), other.n_tokens) == ([1, 2, 0, 0], 3)
    with pytest.raises(DataError, match="4 features, but this one has 5"):
        DeadnessLedger(5).load_state(ledger.state())


def test_bad_options() -> None:
    ledger = DeadnessLedger(3)
    with pytest.raises(OptionError, match="window=0"):
        ledger.dead_fraction(0)
    with pytest.raises(DataError, match="not counted any tokens"):
        _ = ledger.silent_fraction
