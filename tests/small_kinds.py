"""Small dictionaries of every kind, their losses by definition, and trainings of them."""

from __future__ import annotations

from typing import Any

import torch
from small_trainings import D_IN, quick, small_store

from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.train import StepOutput, Trainer

D_SAE, K, WIDTH = 96, 4, 0.3


class Jump(torch.autograd.Function):
    """JumpReLU and its step, with the straight-through gradients of Rajamanoharan et al. (2024)."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, threshold: torch.Tensor, step: bool) -> torch.Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.step = step
        on = ((z > threshold) & (z > 0)).to(z)
        return on if step else z * on

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < WIDTH / 2).to(z)
        height = 1.0 if ctx.step else threshold
        into = None if ctx.step else grad * ((z > threshold) & (z > 0))
        return into, (-height / WIDTH * kernel * grad).sum(0), None


def make(activation: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, activation, seed), dtype=dtype)
    sae.set_normalization(torch.ones(D_IN), 0.4)
    with torch.no_grad():
        sae.b_dec += 0.1
        generator = torch.Generator().manual_seed(5)
        sae.b_enc += 0.1 * torch.randn(D_SAE, generator=generator, dtype=dtype)
        if activation == "jumprelu":
            threshold = sae.activation.threshold
            threshold += 0.6 + 0.3 * torch.rand(D_SAE, generator=generator)
        if activation == "gated":
            sae.activation.r_mag += 0.3 * torch.randn(D_SAE, generator=generator, dtype=dtype)
            sae.activation.b_mag += 0.3 * torch.randn(D_SAE, generator=generator, dtype=dtype)
    return sae


def dense_loss(sae: SparseAutoencoder, x: torch.Tensor, config: SparsityConfig) -> torch.Tensor:
    """The whole loss of a first step by its definition."""
    x_n = (x - sae.input_mean) * sae.input_scale
    z = (x_n - sae.b_dec) @ sae.W_enc + sae.b_enc
    kind = sae.config.activation
    acts = Jump.apply(z, sae.activation.threshold, False) if kind == "jumprelu" else z.relu()
    if kind == "gated":
        acts = (z > 0) * ((z - sae.b_enc) * sae.activation.r_mag.exp() + sae.activation.b_mag).relu()
    if kind == "batchtopk":
        least = acts.flatten().topk(K * len(x)).values.min().detach()
        acts = acts * (acts >= least)
    if kind == "topk":
        chosen = acts.topk(K, dim=1).indices
        acts = torch.zeros_like(acts).scatter(1, chosen, acts.gather(1, chosen))
    loss = torch.zeros((), dtype=z.dtype)
    for size in (D_SAE, *config.prefixes):
        reconstruction = acts[:, :size] @ sae.W_dec[:size] + sae.b_dec
        loss = loss + (reconstruction - x_n).square().sum(1).mean()
    target = config.initial_l0 or K
    weight = config.coefficient * D_IN
    if kind == "relu":
        loss = loss + weight / target * acts.sum(1).mean()
    if kind == "gated":
        gates = z.relu()
        loss = loss + weight / target * gates.sum(1).mean()
        missed = gates @ sae.W_dec.detach() + sae.b_dec.detach() - x_n
        loss = loss + missed.square().sum(1).mean()
    if kind == "jumprelu" and config.penalty == "tanh":
        loss = loss + weight / target * acts.tanh().sum(1).mean()
    if kind == "jumprelu" and config.penalty == "l0":
        l0 = Jump.apply(z, sae.activation.threshold, True).sum(1).mean()
        loss = loss + weight * (l0 / target - 1).square()
    return loss


def buried(kind: str) -> tuple[Trainer, torch.Tensor, StepOutput]:
    """Five steps with AuxK of a dictionary whose features from the 50th on are far below zero: the trainer,
    the encoder rows of those before, and what the last step says."""
    store = small_store()
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
    initialize(sae, "random", store.spectrum, None, store.sample(500))
    sae.b_enc.data[50:] = -50
    before = sae.encoder_rows[50:].clone()
    trainer = Trainer(sae, quick(aux_k=8, dead_window=64), SparsityConfig(coefficient=0.1))
    for batch in store.batches(64, n_tokens=64 * 5):
        output = trainer.step(batch)
    return trainer, before, output
