"""Sparse codes of any width, and how they are put together."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.kernels.codes import FlatCode, SparseCode, flat_code, stack_codes


def dense(code: SparseCode, n: int) -> torch.Tensor:
    return torch.zeros(len(code.values), n).scatter_add(1, code.indices, code.values)


@given(batch=st.integers(0, 5), n=st.integers(1, 9), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_marked_places_and_no_others_are_picked(batch: int, n: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, n, generator=generator) < share
    values = torch.randn(batch, n, generator=generator)
    picks = flat_code(zip(mask.split(2), values.split(2), strict=True))
    code = picks.code(batch)
    assert torch.equal(dense(code, n), values * mask)
    assert code.values.shape[1] == max(1, int(mask.sum(1).max()) if batch else 0)
    assert len(picks.values) == int(mask.sum())
    positive = picks.kept(picks.values > 0).code(batch)
    assert torch.equal(dense(positive, n), values.relu() * mask)


def test_what_a_row_lacks_is_filled_up_as_asked() -> None:
    rows, indices, values = torch.tensor([0, 2, 2]), torch.tensor([7, 5, 6]), torch.tensor([1.0, 2.0, 3.0])
    code = FlatCode(rows, indices, values).code(3, fill=-torch.inf)
    assert code.indices.tolist() == [[7, 0], [0, 0], [5, 6]]
    assert code.values.tolist() == [[1, -torch.inf], [-torch.inf, -torch.inf], [2, 3]]


def test_codes_of_any_width_are_stacked() -> None:
    codes = [
        SparseCode(torch.tensor([[3, 1]]), torch.tensor([[1.0, 2.0]])),
        SparseCode(torch.tensor([[5], [6]]), torch.tensor([[0.5], [0.0]])),
    ]
    found = stack_codes(codes)
    assert found.indices.tolist() == [[3, 1], [5, 0], [6, 0]]
    assert found.values.tolist() == [[1, 2], [0.5, 0], [0, 0]]
