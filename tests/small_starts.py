"""Activations of decaying variance and a small dictionary, for the tests of where dictionaries begin."""

from __future__ import annotations

import torch

from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder

D_IN, D_SAE, K = 24, 300, 6


def rows(n: int = 2000, seed: int = 0) -> torch.Tensor:
    """Activations whose variance decays over directions, with a mean."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(99)))[0]
    scales = 0.8 ** torch.arange(D_IN)
    return 5 * torch.randn(n, D_IN, generator=generator) * scales @ basis.T + torch.linspace(-2, 2, D_IN)


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, seed=seed), dtype=dtype)


def mse(sae: SparseAutoencoder, x: torch.Tensor) -> float:
    return (sae(x) - x).double().square().sum(1).mean().item()
