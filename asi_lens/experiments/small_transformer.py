"""A small decoder-only transformer in plain PyTorch, for trainings from nothing.

Blocks are those of Llama: RMSNorm before attention and before the MLP, causal attention with rotary
positions, SwiGLU, no biases; the embedding is also the unembedding. With `gate`, a sigmoid gate of the
block's input multiplies every entry of the heads' outputs before W_O (arXiv 2505.06708, elementwise and
head-specific; here with a bias).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_whole
from asi_lens.base.files import cache_key

_EPS = 1e-6
_ROTARY_BASE = 10_000.0


@checked
@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a transformer. Raises OptionError for sizes that do not fit together.

    Attributes:
        vocab: number of tokens. d_model: width of the residual stream, and of all heads together.
        n_layers, n_heads: blocks, and heads of a block; `d_model / n_heads` is even (rotary positions).
        d_mlp: hidden width of the MLP.
        gate: whether attention has the gate.
    """

    vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    gate: bool = False

    def __post_init__(self) -> None:
        for key in ("vocab", "d_model", "n_layers", "n_heads", "d_mlp"):
            require_whole(key, getattr(self, key), 1)
        fits = self.d_model % (2 * self.n_heads) == 0
        require(fits, "d_model", self.d_model, f"a multiple of twice n_heads={self.n_heads}")


class Attention(nn.Module):
    """Causal multi-head attention; weights are PyTorch's, [out in]."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d = config.d_model
        self.n_heads = config.n_heads
        self.W_Q, self.W_K, self.W_V, self.W_O = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.W_G = nn.Linear(d, d) if config.gate else None

    def z(self, x: Float[Tensor, "batch position d"]) -> Float[Tensor, "batch position d"]:
        """Return the heads' outputs side by side, gated if there is a gate."""
        q, k, v = (
            rearrange(W(x), "batch position (head d) -> batch head position d", head=self.n_heads)
            for W in (self.W_Q, self.W_K, self.W_V)
        )
        heads = functional.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        z = rearrange(heads, "batch head position d -> batch position (head d)")
        return z if self.W_G is None else z * torch.sigmoid(self.W_G(x))

    def forward(self, x: Float[Tensor, "batch position d"]) -> Float[Tensor, "batch position d"]:
        """Return z W_O: the attention output."""
        return self.W_O(self.z(x))


class Block(nn.Module):
    """Attention and SwiGLU, each after an RMSNorm and added to the stream."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d, hidden = config.d_model, config.d_mlp
        self.attention = Attention(config)
        self.norm_attention, self.norm_mlp = nn.RMSNorm(d, _EPS), nn.RMSNorm(d, _EPS)
        self.W_gate, self.W_in = nn.Linear(d, hidden, bias=False), nn.Linear(d, hidden, bias=False)
        self.W_out = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Float[Tensor, "batch position d"]) -> Float[Tensor, "batch position d"]:
        """Return the stream after the block."""
        x = x + self.attention(self.norm_attention(x))
        h = self.norm_mlp(x)
        return x + self.W_out(functional.silu(self.W_gate(h)) * self.W_in(h))


class SmallTransformer(nn.Module):
    """Tokens to next-token logits."""

    def __init__(self, config: TransformerConfig, seed: int = 0):
        """Draw the weights: tensors of the same name, shape and seed are equal in all configurations."""
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, _EPS)
        self._draw(seed)

    def forward(self, ids: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position vocab"]:
        """Return the logits of the token after each position."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embedding.weight)

    def attentions(self) -> list[Attention]:
        """Return the attention of every block."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Draw matrices with variance 1 / inputs (less by 2 n_layers where a block adds its output to the
        stream, as in GPT-2), and the embedding with standard deviation 0.02. Biases are zero."""
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            scale = 0.02 if name.startswith("embedding") else weight.shape[1] ** -0.5
            if name.endswith(("W_O.weight", "W_out.weight")):
                scale *= (2 * self.config.n_layers) ** -0.5
            generator = torch.Generator().manual_seed(int(cache_key(seed=seed, name=name)[:15], 16))
            weight.normal_(0.0, scale, generator=generator)


def rotated(x: Float[Tensor, "batch head position d"]) -> Float[Tensor, "batch head position d"]:
    """Return queries or keys with rotary positions (Su et al. 2021; the two halves of a head are paired)."""
    d, n = x.shape[-1], x.shape[-2]
    frequencies = _ROTARY_BASE ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d)
    angles = torch.outer(torch.arange(n, device=x.device, dtype=torch.float32), frequencies)
    # Angles in float32, whatever the heads are in: bfloat16 has too few digits for late positions.
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def head_overlap_penalty(W_O: Float[Tensor, "d_model d_z"], n_heads: int) -> Float[Tensor, ""]:
    """Return how far the heads' output subspaces are from orthogonal: 0 if every pair is orthogonal.

    Each of the d_z directions that heads write (columns of PyTorch's W_O, unit length) has cosines with the
    directions of other heads; the result is the mean over directions of the sum of their squares. For
    orthonormal directions within heads it is the Projection Kernel of a head with the others, over d_head.
    Random heads have (d_z - d_head) / d_model on average.
    """
    rows = functional.normalize(W_O.T, dim=1)
    squares = rearrange((rows @ rows.T).square(), "(a i) (b j) -> a b i j", a=n_heads, b=n_heads)
    own = squares.diagonal(dim1=0, dim2=1).sum()
    return (squares.sum() - own) / len(rows)
