"""The sparse step against dense formulas and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.sparse_ops import (
    BIAS_COLUMNS,
    SparseCode,
    Term,
    Workspace,
    decode_sum,
    encode_topk,
    merge_topk,
    picked_dots,
    sum_gradients,
    topk_above,
    topk_exact,
    with_ones,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double_sae(d_in: int = 12, d_sae: int = 200, k: int = 5) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(d_in=d_in, d_sae=d_sae, k=k), dtype=torch.float64)
    sae.W_enc.data += 0.1 * normal(d_sae, d_in, seed=1).T
    sae.b_enc.data += 0.1 * normal(d_sae, seed=2)
    sae.b_dec.data += 0.1 * normal(d_in, seed=3)
    return sae


def dense_acts(sae: SparseAutoencoder, x_n: Tensor, k: int, only: Tensor | None = None) -> Tensor:
    """TopK(ReLU(.)) by the definition, with autograd."""
    pre = ((x_n - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    ranked = pre if only is None else torch.full_like(pre, -1.0).index_copy(1, only, pre[:, only])
    chosen = ranked.topk(k, dim=1).indices
    return torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))


def without_parallel(grad: Tensor, rows: Tensor) -> Tensor:
    return grad - (grad * rows).sum(1, keepdim=True) * rows


@given(
    batch=st.integers(1, 5),
    n=st.integers(1, 1500),
    k=st.integers(1, 9),
    levels=st.sampled_from([2, 1000]),
    seed=st.integers(0, 99),
)
def test_two_stage_topk_is_exact_also_with_ties(batch: int, n: int, k: int, levels: int, seed: int) -> None:
    k = min(k, n)
    scores = torch.randint(levels, (batch, n), generator=torch.Generator().manual_seed(seed)).float()
    code = topk_exact(scores, k)
    expected = scores.topk(k, dim=1).values
    assert torch.equal(code.values.sort(descending=True).values, expected)
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
    scores = torch.randint(levels, (batch, n), generator=generator).float()
    least = torch.randint(levels, (batch,), generator=generator).float()
    code = topk_above(scores, k, least)
    there = code.values > -torch.inf
    assert torch.equal(scores.gather(1, code.indices)[there], code.values[there])
    assert (code.values > least.unsqueeze(1))[there].all()
    for row, own in zip(code.indices, there, strict=True):
        assert len(set(row[own].tolist())) == int(own.sum()) <= k
    known = least.unsqueeze(1).expand(batch, k)
    found = torch.cat([known, code.values], 1).topk(k, dim=1).values
    assert torch.equal(found, torch.cat([known, scores], 1).topk(k, dim=1).values)


@pytest.mark.parametrize("n", [40, 1000])
@pytest.mark.parametrize("place", [0, -1])
def test_nan_is_found_whatever_is_known(n: int, place: int) -> None:
    scores = normal(3, n)
    scores[1, place] = torch.nan
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


def test_decode_and_dots_are_the_dense_products() -> None:
    decoder, grad = normal(40, 12), normal(6, 12, seed=1)
    code = encode_topk(normal(6, 12, seed=2), normal(40, 12, seed=3), normal(40, seed=4), 5)
    dense = torch.zeros(6, 40, dtype=torch.float64).scatter(1, code.indices, code.values)
    torch.testing.assert_close(decode_sum(code, decoder), dense @ decoder)
    torch.testing.assert_close(
        picked_dots(grad, decoder, code.indices), (grad @ decoder.T).gather(1, code.indices)
    )


def test_gradients_equal_autograd_of_the_dense_formula() -> None:
    sae, x_n = double_sae(), normal(64, 12, seed=9)
    sae.b_enc.data -= 2
    loss = (dense_acts(sae, x_n, 5) @ sae.W_dec + sae.b_dec - x_n).square().sum(1).mean()
    loss.backward()

    x, decoder = x_n - sae.b_dec.detach(), sae.W_dec.detach()
    code = encode_topk(x, sae.encoder_rows, sae.b_enc.detach(), 5)
    assert (code.values == 0).any(), "some picks must be silent for the test to mean anything"
    residual = decode_sum(code, decoder) - x
    grads = sum_gradients([Term(code, residual * 2 / 64)], x, sae.encoder_rows, decoder)

    def same(ours: Tensor, theirs: Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)

    same(grads.encoder(0, 200), sae.W_enc.grad.T)
    same(grads.b_enc, sae.b_enc.grad)
    same(grads.b_dec, sae.b_dec.grad)
    same(grads.decoder(0, 200, None), sae.W_dec.grad)
    same(grads.decoder(0, 200, decoder), without_parallel(sae.W_dec.grad, decoder))
    # Any run of rows is that part of the whole.
    same(grads.decoder(30, 77, decoder), without_parallel(sae.W_dec.grad, decoder)[30:77])
    same(grads.encoder(199, 200), sae.W_enc.grad.T[199:])
    assert torch.equal(grads.features, (sae.b_enc.grad != 0).nonzero().flatten())
    # And so are the rows that fired alone.
    for first, last in ((0, len(grads.features)), (2, 9), (5, 6)):
        fired = grads.features[first:last]
        same(grads.encoder_of(first, last), sae.W_enc.grad.T[fired])
        same(grads.decoder_of(first, last, decoder), without_parallel(sae.W_dec.grad, decoder)[fired])


def test_all_negative_pre_activations_leave_only_b_dec_a_gradient() -> None:
    sae, x_n = double_sae(), normal(8, 12)
    x = x_n - sae.b_dec.detach()
    code = encode_topk(x, sae.encoder_rows, torch.full((200,), -1e3, dtype=torch.float64), 5)
    assert (code.values == 0).all()
    grads = sum_gradients([Term(code, -x * 2 / 8)], x, sae.encoder_rows, sae.W_dec.detach())
    assert len(grads.features) == 0
    assert not grads.encoder(0, 200).any()
    assert not grads.decoder(0, 200, sae.W_dec.detach()).any()
    assert not grads.b_enc.any()
    torch.testing.assert_close(grads.b_dec, -2 * x.mean(0))


def test_scratch_memory_is_kept_and_grows() -> None:
    workspace, like = Workspace(), torch.zeros(1)
    first = workspace.get("a", (4, 4), like)
    assert workspace.get("a", (2, 3), like).data_ptr() == first.data_ptr()
    assert workspace.get("a", (9, 9), like).shape == (9, 9)
    assert workspace.get("a", (9, 9), like.double()).dtype == torch.float64
