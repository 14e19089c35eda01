"""Gradients and Adam in one pass against the plain path, in all optimizers."""

from __future__ import annotations

import pytest
import torch
from small_triton import need_kernels, normal

need_kernels()

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.gradients import Term, decode_sum, sum_gradients
from asi_lens.kernels.triton.decode import decode
from asi_lens.kernels.triton.picks import sort_picks
from asi_lens.kernels.triton.update import Adam, Moments, update
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.optim import BETAS, EPS, RowAdam
from asi_lens.training.config import OPTIMIZERS

BATCH, N, D, K, PIECE, LR = 24, 48, 24, 4, 8, 1e-2


def some_code(step: int, hot: bool) -> SparseCode:
    """Picks of which a third did not fire; in step 2 none did. If `hot`, every row picks feature 0."""
    generator = torch.Generator().manual_seed(step)
    indices = torch.rand(BATCH, N, generator=generator).argsort(1)[:, :K]
    if hot:
        indices[:, 1:] = torch.where(indices[:, 1:] == 0, indices[:, :1], indices[:, 1:])
        indices[:, 0] = 0
    values = torch.rand(BATCH, K, generator=generator) + 0.1
    values[torch.rand(BATCH, K, generator=generator) < (1.0 if step == 2 else 0.3)] = 0
    device = normal(1).device
    return SparseCode(indices.int().to(device), values.to(device))


class Ours:
    """Weights of a dictionary and their moments, for the kernels."""

    def __init__(self, sae: SparseAutoencoder):
        tensors = (sae.encoder_rows, sae.W_dec.data, sae.b_enc.data)
        self.encoder, self.decoder, self.bias = (
            Moments(t.clone(), torch.zeros_like(t), torch.zeros_like(t)) for t in tensors
        )
        self.low = sae.encoder_rows.bfloat16()
        self.updated = torch.zeros(sae.d_sae, dtype=torch.int64, device=self.low.device)

    def step(
        self, kind: str, step: int, code: SparseCode, x: torch.Tensor, programs: int, encoder_lr: float = 1.0
    ) -> torch.Tensor:
        """Returns the gradient of b_dec."""
        missed = decode(code, self.decoder.weight, x, 2 / BATCH)
        through = update(
            sort_picks(code, N, dense=kind == "adam", piece=PIECE),
            missed.residual,
            x,
            self.encoder,
            self.decoder,
            self.bias,
            self.low,
            Adam(step, LR, *BETAS, EPS, encoder_lr),
            self.updated if kind == "sparse_adam_decay" else None,
            piece=PIECE,
            programs=programs,
        )
        return missed.residual.sum(0) - through


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("hot", "encoder_lr"), [(False, 1.0), (True, 0.25)])
def test_three_steps_are_those_of_the_plain_path(kind: str, hot: bool, encoder_lr: float) -> None:
    sae = SparseAutoencoder(SAEConfig(D, N, K)).to(normal(1).device)
    plain, ours = RowAdam(sae, kind), Ours(sae)
    for step in (1, 2, 3):
        code, x = some_code(step, hot), normal(BATCH, D, seed=step)
        long = SparseCode(code.indices.long(), code.values)
        residual = decode_sum(long, sae.W_dec.data) - x
        grads = sum_gradients([Term(long, residual * (2 / BATCH))], x, sae.encoder_rows, sae.W_dec.data)
        b_dec = ours.step(kind, step, code, x, 7, encoder_lr)
        torch.testing.assert_close(b_dec, grads.b_dec, rtol=1e-4, atol=1e-6)
        plain.step(grads, LR, encoder_lr=encoder_lr)
        state = plain.state()
        for name, weight, own in (
            ("W_enc", sae.encoder_rows, ours.encoder),
            ("W_dec", sae.W_dec.data, ours.decoder),
            ("b_enc", sae.b_enc.data, ours.bias),
        ):
            for mine, theirs in zip(own, (weight, state[f"{name}.m"], state[f"{name}.v"]), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-6)
        assert torch.equal(ours.low, ours.encoder.weight.bfloat16())
        if kind == "sparse_adam_decay":
            assert torch.equal(ours.updated, state["updated"])


def test_rows_without_a_firing_stay_as_they_are() -> None:
    sae = SparseAutoencoder(SAEConfig(D, N, K)).to(normal(1).device)
    ours, code = Ours(sae), some_code(1, hot=False)
    ours.step("sparse_adam", 1, code, normal(BATCH, D), programs=7)
    silent = torch.ones(N, dtype=torch.bool, device=ours.low.device)
    silent[code.indices[code.values > 0].long()] = False
    assert silent.any()
    for own, before in ((ours.encoder, sae.encoder_rows), (ours.decoder, sae.W_dec.data)):
        assert torch.equal(own.weight[silent], before[silent])
        assert not own.m[silent].any()
        assert (own.weight[~silent] != before[~silent]).any(1).all()


def test_the_same_bytes_twice() -> None:
    results = []
    for _ in range(2):
        ours = Ours(SparseAutoencoder(SAEConfig(D, N, K)).to(normal(1).device))
        b_dec = [ours.step("adam", s, some_code(s, True), normal(BATCH, D, seed=s), 7) for s in (1, 2)]
        results.append([*b_dec, *ours.encoder, *ours.decoder, *ours.bias])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
