"""The decoder against the plain path."""

from __future__ import annotations

import pytest
import torch
from small_triton import DEVICE, need_kernels, normal

need_kernels()

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.gradients import decode_sum
from asi_lens.kernels.triton.decode import decode, row_warps


def test_residual_and_error_are_those_of_the_plain_path() -> None:
    decoder, goal = normal(60, 24), normal(9, 24, seed=1)
    indices = torch.stack([torch.randperm(60)[:5] for _ in range(9)]).int().to(DEVICE)
    values = normal(9, 5, seed=2).relu()
    code = SparseCode(indices, values)
    missed = decode(code, decoder, goal, 0.25)
    expected = decode_sum(SparseCode(indices.long(), values), decoder) - goal
    torch.testing.assert_close(missed.residual, 0.25 * expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(missed.error, expected.square().sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter
def test_nan_and_infinity_are_seen() -> None:
    decoder, goal = normal(60, 24), normal(2, 24, seed=1)
    values = torch.tensor([[1.0, torch.nan], [torch.inf, 0.0]], device=DEVICE)
    indices = torch.tensor([[3, 4], [5, 6]], dtype=torch.int32, device=DEVICE)
    assert not decode(SparseCode(indices, values), decoder, goal, 1.0).error.isfinite().any()


def test_wide_rows_get_more_warps() -> None:
    assert [row_warps(d) for d in (64, 576, 1024, 2048, 4096)] == [2, 2, 2, 4, 8]
