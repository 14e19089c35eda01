"""The running top-k against torch.topk and the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_kernels import normal

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.topk import (
    BIAS_COLUMNS,
    Workspace,
    encode_topk,
    merge_topk,
    topk_above,
    topk_exact,
    with_ones,
)


@given(
    batch=st.integers(1, 5),
    n=st.integers(1, 1500),
    k=st.integers(1, 9),
    levels=st.sampled_from([2, 1000]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_topk_in_stages_is_exact_above_zero_also_with_ties(
    batch: int, n: int, k: int, levels: int, dtype: torch.dtype, seed: int
) -> None:
    k = min(k, n)
    scores = torch.randint(-levels, levels, (batch, n), generator=torch.Generator().manual_seed(seed))
    scores = (scores / 16).to(dtype)
    code = topk_exact(scores, k)
    expected = scores.relu().topk(k, dim=1).values
    assert torch.equal(code.values.relu().sort(descending=True).values, expected)
    assert torch.equal(scores.gather(1, code.indices), code.values)
    assert all(len(set(row)) == k for row in code.indices.tolist())


@given(
    batch=st.integers(1, 5),
    n=st.integers(1, 1500),
    k=st.integers(1, 9),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 99),
)
def test_what_does_not_exceed_the_known_may_be_left_out(
    batch: int, n: int, k: int, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = min(k, n)
    scores = torch.randint(-levels, levels, (batch, n), generator=generator).float()
    least = torch.randint(-1, levels, (batch,), generator=generator).float()
    code = topk_above(scores, k, least)
    there = code.values > -torch.inf
    assert torch.equal(scores.gather(1, code.indices)[there], code.values[there])
    assert (code.values > least.relu().unsqueeze(1))[there].all()
    for row, own in zip(code.indices, there, strict=True):
        assert len(set(row[own].tolist())) == int(own.sum()) <= k
    known = least.unsqueeze(1).expand(batch, k)
    found = torch.cat([known, code.values], 1).relu().topk(k, dim=1).values
    assert torch.equal(found, torch.cat([known, scores], 1).relu().topk(k, dim=1).values)


@pytest.mark.parametrize("n", [40, 1000])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_is_found_whatever_is_known(n: int, place: int) -> None:
    scores = normal(3, n)
    scores[1, place] = torch.nan
    assert topk_exact(scores, 2).values.isnan().any()
    assert topk_above(scores, 2, torch.full((3,), 100.0, dtype=torch.float64)).values.isnan().any()


@pytest.mark.parametrize("tile_bytes", [1, 5000, 50_000, 10**9])
@pytest.mark.parametrize("with_workspace", [False, True])
@pytest.mark.parametrize("k", [5, 40])
def test_chunks_of_features_change_nothing(tile_bytes: int, with_workspace: bool, k: int) -> None:
    x, weight, bias = normal(7, 12), normal(3333, 12, seed=1), normal(3333, seed=2)
    workspace = Workspace() if with_workspace else None
    code = encode_topk(x, weight, bias, k, workspace=workspace, tile_bytes=tile_bytes)
    expected = (x @ weight.T + bias).relu().topk(k, dim=1)
    torch.testing.assert_close(code.values.sort(descending=True).values, expected.values)
    assert torch.equal(code.indices.sort().values, expected.indices.sort().values)


def test_merging_the_codes_of_two_shards_gives_the_code_of_all() -> None:
    x, weight, bias = normal(7, 12), normal(300, 12, seed=1), normal(300, seed=2)
    whole = encode_topk(x, weight, bias, 6)
    left = encode_topk(x, weight[:100], bias[:100], 6)
    right = encode_topk(x, weight[100:], bias[100:], 6)
    merged = merge_topk([left, SparseCode(right.indices + 100, right.values)], 6)
    assert torch.equal(merged.indices.sort().values, whole.indices.sort().values)


def test_only_the_features_asked_for_are_picked() -> None:
    x, weight, bias = normal(7, 12), normal(300, 12, seed=1), normal(300, seed=2)
    some = torch.tensor([3, 50, 51, 299])
    code = encode_topk(x, weight, bias, 3, features=some)
    assert torch.isin(code.indices, some).all()
    assert encode_topk(x, weight, bias, 9, features=some).indices.shape == (7, 4)


@pytest.mark.parametrize("tile_bytes", [None, 2000])
@pytest.mark.parametrize("with_workspace", [False, True])  # with it the bias is a column of the weights
def test_values_in_bfloat16_come_back_as_float32(with_workspace: bool, tile_bytes: int | None) -> None:
    x, weight, bias = normal(7, 12), normal(300, 12, seed=1).float(), normal(300, seed=2).float()
    workspace = Workspace() if with_workspace else None
    for _ in range(2):  # also where the workspace has been written to
        code = encode_topk(x.bfloat16(), weight, bias, 3, workspace=workspace, tile_bytes=tile_bytes)
        assert code.values.dtype == torch.float32
        exact = (x @ weight.double().T + bias).relu().topk(3, dim=1).values
        ours = code.values.double().sort(descending=True).values
        torch.testing.assert_close(ours, exact, rtol=0.02, atol=0.02)


def test_a_bias_among_the_weights_is_added() -> None:
    x, weight, bias = normal(7, 12), normal(300, 12, seed=1), normal(300, seed=2)
    zeros = weight.new_zeros(300, BIAS_COLUMNS - 1)
    folded = encode_topk(with_ones(x), torch.cat([weight, bias[:, None], zeros], 1), None, 3)
    apart = encode_topk(x, weight, bias, 3)
    torch.testing.assert_close(folded.values, apart.values)
    assert torch.equal(folded.indices, apart.indices)


def test_scratch_memory_is_kept_and_grows() -> None:
    workspace, like = Workspace(), torch.zeros(1)
    first = workspace.get("a", (4, 4), like)
    assert workspace.get("a", (2, 3), like).data_ptr() == first.data_ptr()
    assert workspace.get("a", (9, 9), like).shape == (9, 9)
    assert workspace.get("a", (9, 9), like.double()).dtype == torch.float64
