"""Adam, dense and row-sparse, against torch's own and against the dense statement of each rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.kernels import gradients as kernel
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.gradients import Gradients, Term, decode_sum, sum_gradients
from asi_lens.kernels.topk import encode_topk
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.optim import BETAS, EPS, RowAdam, gradient_norm
from asi_lens.training.config import OPTIMIZERS as KINDS
from asi_lens.training.schedule import lr_factor

D_IN, D_SAE, K = 6, 40, 3


def make() -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, k=K), dtype=torch.float64)
    sae.b_dec.data += 0.1
    return sae


def gradients(sae: SparseAutoencoder, seed: int, only: int | None = None) -> Gradients:
    """Gradients of a random batch whose picks lie in the first `only` features."""
    x = torch.randn(16, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = None if only is None else torch.arange(seed % 3, only)
    code = encode_topk(x, sae.encoder_rows, sae.b_enc.data, K, features=features)
    residual = decode_sum(code, sae.W_dec.data) - x
    return sum_gradients([Term(code, residual)], x, sae.encoder_rows, sae.W_dec.data)


def dense(grads: Gradients, sae: SparseAutoencoder) -> dict[str, Tensor]:
    encoder_grad, decoder_grad = grads.rows(grads.edges[0], grads.edges[-1], sae.W_dec.data)
    return {
        "W_enc": encoder_grad,
        "b_enc": grads.b_enc.clone(),
        "W_dec": decoder_grad,
        "b_dec": grads.b_dec.clone(),
    }


def weights(sae: SparseAutoencoder) -> dict[str, Tensor]:
    named = {"W_enc": sae.encoder_rows, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def reference(
    kind: str,
) -> Callable[[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], dict, float, int, float], None]:
    """One dense step of the rule as its definition says it, elementwise over rows that fired or not."""

    def step(
        state: dict[str, Tensor],
        moments: dict[str, tuple[Tensor, Tensor]],
        grads: dict[str, Tensor],
        lr: float,
        t: int,
        encoder_lr: float,
    ) -> None:
        fired = grads["b_enc"] != 0
        for name, grad in grads.items():
            mask = torch.ones_like(grad, dtype=torch.bool)
            if kind != "adam" and name != "b_dec":
                mask = fired.view(-1, *[1] * (grad.ndim - 1)).expand_as(grad)
            m, v = moments[name]
            new_m, new_v = (
                b * old + (1 - b) * g for b, old, g in zip(BETAS, (m, v), (grad, grad**2), strict=True)
            )
            if kind == "sparse_adam":
                new_m, new_v = torch.where(mask, new_m, m), torch.where(mask, new_v, v)
            if kind == "sparse_adam_decay":
                # The gradient of a silent row is zero, so this is a decay there.
                assert not grad[~mask].any()
            moments[name] = (new_m, new_v)
            rate = lr * encoder_lr if name == "W_enc" else lr
            change = rate * (new_m / (1 - BETAS[0] ** t)) / ((new_v / (1 - BETAS[1] ** t)).sqrt() + EPS)
            state[name] = torch.where(mask, state[name] - change, state[name])
            if name == "W_dec":
                moved = state[name] / state[name].norm(dim=1, keepdim=True)
                state[name] = torch.where(mask, moved, state[name])

    return step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("only", [None, 9], ids=["most rows fire", "few rows fire"])
@pytest.mark.parametrize("chunk", [3, 10**6])
@pytest.mark.parametrize("encoder_lr", [1.0, 0.25])
def test_every_kind_is_its_definition(
    kind: str, only: int | None, chunk: int, encoder_lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_CHUNK_ELEMENTS", chunk * D_IN)
    sae = make()
    optimizer, rule = RowAdam(sae, kind), reference(kind)
    state = weights(sae)
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in state.items()}
    for t in range(1, 12):
        grads = gradients(sae, seed=t, only=only)
        rule(state, moments, dense(grads, sae), 0.01, t, encoder_lr)
        optimizer.step(grads, 0.01, encoder_lr=encoder_lr)
        for name, now in weights(sae).items():
            torch.testing.assert_close(now, state[name], rtol=1e-9, atol=1e-11)


def test_dense_adam_is_torchs() -> None:
    sae = make()
    twin = torch.nn.Parameter(sae.encoder_rows.clone())
    theirs = torch.optim.Adam([twin], lr=0.01)
    optimizer = RowAdam(sae, "adam")
    for t in range(5):
        grads = gradients(sae, seed=t)
        twin.grad = dense(grads, sae)["W_enc"]
        optimizer.step(grads, 0.01)
        theirs.step()
    torch.testing.assert_close(sae.encoder_rows, twin.data, rtol=1e-9, atol=1e-12)


def test_resting_rows_are_torchs_sparse_adam() -> None:
    sae = make()
    twin = torch.nn.Parameter(sae.encoder_rows.clone())
    theirs = torch.optim.SparseAdam([twin], lr=0.01)
    optimizer = RowAdam(sae, "sparse_adam")
    for t in range(8):
        grads = gradients(sae, seed=t, only=12)
        rows = dense(grads, sae)["W_enc"][grads.features]
        twin.grad = torch.sparse_coo_tensor(
            grads.features[None], rows, twin.shape, check_invariants=False
        ).coalesce()
        optimizer.step(grads, 0.01)
        theirs.step()
    # Theirs scales eps otherwise.
    torch.testing.assert_close(sae.encoder_rows, twin.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_silent_rows_move_only_by_the_momentum_of_dense_adam(kind: str) -> None:
    sae = make()
    optimizer = RowAdam(sae, kind)
    optimizer.step(gradients(sae, seed=0), 0.01)
    before = weights(sae)
    grads = gradients(sae, seed=0, only=5)
    optimizer.step(grads, 0.01)
    silent = torch.ones(D_SAE, dtype=torch.bool)
    silent[grads.features] = False
    for name in ("W_enc", "W_dec", "b_enc"):
        same = torch.equal(weights(sae)[name][silent], before[name][silent])
        assert same == (kind != "adam")


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_fires_only_b_dec_moves(kind: str) -> None:
    sae = make()
    x = torch.ones(4, D_IN, dtype=torch.float64)
    code = SparseCode(torch.arange(4 * K).view(4, K), torch.zeros(4, K, dtype=torch.float64))
    grads = sum_gradients([Term(code, -x)], x, sae.encoder_rows, sae.W_dec.data)
    before = weights(sae)
    RowAdam(sae, kind).step(grads, 0.01)
    after = weights(sae)
    for name in ("W_enc", "b_enc"):
        assert torch.equal(after[name], before[name])
    torch.testing.assert_close(after["W_dec"], before["W_dec"], rtol=0, atol=1e-15)
    assert not torch.equal(after["b_dec"], before["b_dec"])


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_rows_keep_unit_norm(kind: str) -> None:
    sae = make()
    optimizer = RowAdam(sae, kind)
    for t in range(5):
        optimizer.step(gradients(sae, seed=t, only=20), 0.1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_optimizer_goes_on_to_the_same_bits(kind: str) -> None:
    sae = make()
    optimizer = RowAdam(sae, kind)
    for t in range(3):
        optimizer.step(gradients(sae, seed=t, only=12), 0.01)
    twin = SparseAutoencoder(sae.config, dtype=torch.float64)
    twin.load_state_dict(sae.state_dict())
    other = RowAdam(twin, kind)
    other.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    for t in range(3, 6):
        optimizer.step(gradients(sae, seed=t, only=12), 0.01)
        other.step(gradients(twin, seed=t, only=12), 0.01)
    for name, tensor in weights(sae).items():
        assert torch.equal(tensor, weights(twin)[name])


def test_gradient_norm_is_of_all_parameters_without_the_parallel_part() -> None:
    sae = make()
    grads = gradients(sae, seed=0)
    expected = torch.cat([g.flatten() for g in dense(grads, sae).values()]).norm()
    torch.testing.assert_close(gradient_norm(grads, sae.W_dec.data), expected)


def test_the_schedule() -> None:
    factors = [lr_factor(t, 10, 4, 0.3) for t in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])
    assert [lr_factor(t, 4, 0, 0.0) for t in range(6)] == [1.0] * 6
    # Beyond the end it stays at the last value, above zero.
    assert lr_factor(25, 10, 4, 0.3) == pytest.approx(1 / 3)
    assert min(lr_factor(t, 10, 8, 1.0) for t in range(10)) > 0


def test_bad_input() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'sparse_adam'"):
        RowAdam(make(), "sparse-adam")
    sae = make()
    sae.W_enc.data = sae.W_enc.data.contiguous()
    with pytest.raises(OptionError, match="W_enc"):
        RowAdam(sae)
