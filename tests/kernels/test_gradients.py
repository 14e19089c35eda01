"""The sparse step against dense formulas and autograd."""

from __future__ import annotations

import pytest
import torch
from small_kernels import normal
from torch import Tensor

from asi_lens.kernels.codes import flat_code
from asi_lens.kernels.gradients import Edge, Term, decode_sum, dots_at, picked_dots, sum_gradients
from asi_lens.kernels.topk import encode_topk
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder


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


def test_decode_and_dots_are_the_dense_products() -> None:
    decoder, grad = normal(40, 12), normal(6, 12, seed=1)
    code = encode_topk(normal(6, 12, seed=2), normal(40, 12, seed=3), normal(40, seed=4), 5)
    dense = torch.zeros(6, 40, dtype=torch.float64).scatter(1, code.indices, code.values)
    torch.testing.assert_close(decode_sum(code, decoder), dense @ decoder)
    torch.testing.assert_close(
        picked_dots(grad, decoder, code.indices), (grad @ decoder.T).gather(1, code.indices)
    )


@pytest.mark.parametrize("longest", [0, 1, 40])
def test_rows_of_unequal_length_decode_to_the_dense_product(longest: int) -> None:
    decoder, dense = normal(40, 12), torch.zeros(6, 40, dtype=torch.float64)
    dense[1, :longest] = normal(longest, seed=1)
    dense[4, 3:4] = 2.0 if longest else 0.0
    code = flat_code([(dense != 0, dense)]).code(6)
    torch.testing.assert_close(decode_sum(code, decoder), dense @ decoder)


@pytest.mark.parametrize("n", [0, 50])
def test_dots_at_any_places_are_those_of_the_dense_product(n: int) -> None:
    decoder, grad = normal(40, 12), normal(6, 12, seed=1)
    generator = torch.Generator().manual_seed(2)
    rows, features = (torch.randint(high, (n,), generator=generator) for high in (6, 40))
    torch.testing.assert_close(dots_at(grad, decoder, rows, features), (grad @ decoder.T)[rows, features])


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

    whole = grads.edges[0], grads.edges[-1]
    encoder_grad, decoder_grad = grads.rows(*whole, decoder)
    same(encoder_grad, sae.W_enc.grad.T)
    same(grads.b_enc, sae.b_enc.grad)
    same(grads.b_dec, sae.b_dec.grad)
    same(grads.rows(*whole, torch.zeros_like(decoder))[1], sae.W_dec.grad)
    same(decoder_grad, without_parallel(sae.W_dec.grad, decoder))
    assert torch.equal(grads.features, (sae.b_enc.grad != 0).nonzero().flatten())
    # Any run of rows is that part of the whole, and so are those of its rows that fired.
    for first, last in ((0, 200), (30, 77), (199, 200)):
        before, after = (
            Edge(row, int((grads.features < row).sum()), int(grads.offsets[row])) for row in (first, last)
        )
        fired = grads.features[before.features : after.features]
        for few, rows in ((False, torch.arange(first, last)), (True, fired))[: 1 + (len(fired) > 0)]:
            encoder_grad, decoder_grad = grads.rows(before, after, decoder, few=few)
            same(encoder_grad, sae.W_enc.grad.T[rows])
            same(decoder_grad, without_parallel(sae.W_dec.grad, decoder)[rows])


def test_all_negative_pre_activations_leave_only_b_dec_a_gradient() -> None:
    sae, x_n = double_sae(), normal(8, 12)
    x = x_n - sae.b_dec.detach()
    code = encode_topk(x, sae.encoder_rows, torch.full((200,), -1e3, dtype=torch.float64), 5)
    assert (code.values == 0).all()
    grads = sum_gradients([Term(code, -x * 2 / 8)], x, sae.encoder_rows, sae.W_dec.detach())
    assert len(grads.features) == 0
    assert not any(grad.any() for grad in grads.rows(grads.edges[0], grads.edges[-1], sae.W_dec.detach()))
    assert not grads.b_enc.any()
    torch.testing.assert_close(grads.b_dec, -2 * x.mean(0))
