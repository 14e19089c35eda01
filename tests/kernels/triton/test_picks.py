"""Picks sorted by feature, against counting them one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.triton.picks import sort_picks


def some_code(batch: int, n: int, k: int, hot: bool, silent: float, seed: int) -> SparseCode:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(batch, n, generator=generator).argsort(1)[:, :k].int()
    if hot:
        rest = indices[:, 1:]
        indices[:, 1:] = torch.where(rest == 0, indices[:, :1], rest)
        indices[:, 0] = 0
    values = torch.rand(batch, k, generator=generator) + 0.1
    values[torch.rand(batch, k, generator=generator) < silent] = 0
    return SparseCode(indices, values)


@given(
    batch=st.integers(1, 12),
    n=st.integers(3, 20),
    k=st.integers(1, 3),
    hot=st.booleans(),
    silent=st.sampled_from([0.0, 0.3, 1.0]),
    dense=st.booleans(),
    seed=st.integers(0, 99),
)
def test_slots_hold_the_picks_of_their_feature_in_order(
    batch: int, n: int, k: int, hot: bool, silent: float, dense: bool, seed: int
) -> None:
    code, piece = some_code(batch, n, k, hot, silent, seed), 4
    picks = sort_picks(code, n, dense=dense, piece=piece)
    expected: dict[int, list[tuple[int, float]]] = {f: [] for f in range(n)}
    for row, (features, values) in enumerate(zip(code.indices.tolist(), code.values.tolist(), strict=True)):
        for feature, value in zip(features, values, strict=True):
            if value > 0:
                expected[feature].append((row, value))
    found = {}
    pieces = []
    for slot in range(int(picks.n_slots)):
        begin, end = picks.offsets[slot : slot + 2].tolist()
        pairs = zip(picks.rows[begin:end].tolist(), picks.values[begin:end].tolist(), strict=True)
        found[int(picks.features[slot])] = list(pairs)
        if end - begin > piece:
            assert int(picks.first_piece[slot]) == len(pieces)
            pieces += [(slot, at) for at in range(begin, end, piece)]
    wanted = expected if dense else {f: own for f, own in expected.items() if own}
    assert found == wanted
    assert int(picks.n_pieces) == len(pieces)
    assert list(zip(picks.slots.tolist(), picks.begins.tolist(), strict=True))[: len(pieces)] == pieces


@pytest.mark.parametrize("dense", [False, True])
def test_shapes_depend_on_the_number_of_picks_alone(dense: bool) -> None:
    shapes = [
        [part.shape for part in sort_picks(some_code(9, 30, 3, hot, silent, 0), 30, dense=dense)]
        for hot, silent in ((False, 0.0), (True, 0.3), (False, 1.0))
    ]
    assert shapes[0] == shapes[1] == shapes[2]
