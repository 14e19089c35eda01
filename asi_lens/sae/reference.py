"""The method on one screen: Active Subspace Initialization, TopK, AuxK and Adam in plain autograd.

This module computes the same as `initialize` and `Trainer`, as the papers write it (arXiv 2508.16929; Gao et
al. 2024). It builds dense arrays and is meant for reading. The tests compare the fast step with it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter


class Reference:
    """A TopK dictionary of `d_sae` features and its training, in float64.

    `x [n d]` holds activations of one site. With `d_init`, features start in the `d_init` leading principal
    directions of `x` (ASI), else in random directions. `step` updates the dictionary on a batch.
    """

    def __init__(
        self,
        x: Float[Tensor, "n d"],
        d_sae: int,
        k: int,
        d_init: int | None = None,
        *,
        aux_k: int = 0,
        dead_window: int = 500_000,
        lr: float = 8e-4,
        seed: int = 0,
    ):
        x, self.k, self.aux_k, self.dead_window = x.double(), k, aux_k, dead_window
        # The input: mean 0, mean square norm d.
        self.mean = x.mean(0)
        self.scale = (x.shape[1] / (x - self.mean).square().sum(1).mean()).sqrt()
        x = self.normalize(x)
        # Decoder: Gaussian directions, projected on the active subspace, scaled to unit norm.
        generator, shape = torch.Generator().manual_seed(seed), (d_sae, x.shape[1])
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").double()
        if d_init is not None:
            V = torch.linalg.eigh(x.T @ x).eigenvectors[:, -d_init:]
            drawn = drawn @ V @ V.T
        self.W_dec = Parameter(drawn / drawn.norm(dim=1, keepdim=True))
        # Encoder: the decoder's transpose, at the norm that minimizes the first reconstruction's error.
        first = largest((x @ self.W_dec.T).relu(), k) @ self.W_dec
        best = (x * first).sum() / first.square().sum()
        self.W_enc = Parameter((best * self.W_dec.T).detach())
        self.b_enc, self.b_dec = (Parameter(torch.zeros_like(one)) for one in (drawn[:, 0], drawn[0]))
        self.optimizer = torch.optim.Adam([self.W_enc, self.b_enc, self.W_dec, self.b_dec], lr=lr)
        self.tokens_since_fired = torch.zeros(d_sae, dtype=torch.int64)

    def normalize(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Return the normalized activations that the dictionary reads."""
        return (x - self.mean) * self.scale

    def step(self, batch: Float[Tensor, "n d"]) -> float:
        """Update on a batch of activations. Returns the loss of the reconstruction, without AuxK."""
        x = self.normalize(batch.double())
        pre = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
        acts = largest(pre, self.k)
        error = x - (acts @ self.W_dec + self.b_dec)
        loss = total = error.square().sum(1).mean()
        dead = self.tokens_since_fired >= self.dead_window
        if self.aux_k and dead.any():
            # AuxK: the dead features reconstruct the error of the other features.
            e = error.detach()
            e_hat = largest(pre * dead, self.aux_k) @ self.W_dec
            share = (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()
            total = loss + x.shape[1] / 32 * share
        self.optimizer.zero_grad()
        total.backward()
        # Decoder rows keep unit norm, so the gradient's part along a row is removed.
        rows, grad = self.W_dec.data, self.W_dec.grad
        assert grad is not None
        grad -= (grad * rows).sum(1, keepdim=True) * rows
        self.optimizer.step()
        rows /= rows.norm(dim=1, keepdim=True)
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[(acts > 0).any(0)] = 0
        return loss.item()


def largest(pre: Float[Tensor, "n d_sae"], k: int) -> Float[Tensor, "n d_sae"]:
    """Return the k largest values of each row in place, zeros elsewhere."""
    values, places = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, places, values)
