"""Query-key heads: attention patterns by the rules of the layer that the heads were copied from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_whole


@checked
@dataclass(frozen=True)
class PatternConfig:
    """Rules that turn scores into patterns. Raises OptionError for invalid values.

    Attributes:
        context: longest sequence, in positions.
        scale: factor on the products of queries and keys.
        softcap: scores s become softcap * tanh(s / softcap); None is off (Gemma 2 has it).
        window: a position sees itself and the window - 1 positions before it; None is all positions before.
        rotary_dim: leading dimensions of a head that are rotated by position; 0 is none.
        norm_eps: epsilon of the root-mean-square norm of queries and keys (Qwen 3, Gemma 3); None without it.
    """

    context: int
    scale: float
    softcap: float | None = None
    window: int | None = None
    rotary_dim: int = 0
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        for key, least in (("context", 1), ("window", 1), ("rotary_dim", 0)):
            value = getattr(self, key)
            if key == "window" and value is None:
                continue
            require_whole(key, value, least)
        require(self.rotary_dim % 2 == 0, "rotary_dim", self.rotary_dim, "even")
        for key in ("scale", "softcap", "norm_eps"):
            value = getattr(self, key)
            if key == "scale" or value is not None:
                require(0 < value < math.inf, key, value, "finite and above 0")


class QueryKeyHeads(nn.Module):
    """Heads that compute one causal attention pattern each from normalized inputs.

    Parameters: `W_Q`, `W_K [head d_in d_qk]`, `b_Q`, `b_K [head d_qk]`, and the gains `q_gain`, `k_gain
    [d_qk]` of a query-key norm, if there is one. Buffers: `cos`, `sin [context rotary_dim]` of the rotation
    by position (1 and 0 in new heads: no rotation). Weights are zeros until they are copied from a layer.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self, n_heads: int, d_in: int, d_qk: int, pattern: PatternConfig, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        require(pattern.rotary_dim <= d_qk, "rotary_dim", pattern.rotary_dim, f"at most d_qk={d_qk}")
        self.pattern = pattern
        self.W_Q = nn.Parameter(torch.zeros(n_heads, d_in, d_qk, dtype=dtype))
        self.W_K = nn.Parameter(torch.zeros(n_heads, d_in, d_qk, dtype=dtype))
        self.b_Q = nn.Parameter(torch.zeros(n_heads, d_qk, dtype=dtype))
        self.b_K = nn.Parameter(torch.zeros(n_heads, d_qk, dtype=dtype))
        if pattern.norm_eps is not None:
            self.q_gain = nn.Parameter(torch.ones(d_qk, dtype=dtype))
            self.k_gain = nn.Parameter(torch.ones(d_qk, dtype=dtype))
        self.register_buffer("cos", torch.ones(pattern.context, pattern.rotary_dim, dtype=dtype))
        self.register_buffer("sin", torch.zeros(pattern.context, pattern.rotary_dim, dtype=dtype))

    def forward(
        self, x: Float[Tensor, "batch position d_in"]
    ) -> Float[Tensor, "batch head position position"]:
        """Return the patterns: the weight of each source position (last dimension) for each destination
        position (third dimension). Rows sum to 1."""
        config, positions = self.pattern, x.shape[1]
        q = torch.einsum("bpd,hdq->bhpq", x, self.W_Q) + self.b_Q[:, None]
        k = torch.einsum("bpd,hdq->bhpq", x, self.W_K) + self.b_K[:, None]
        if config.norm_eps is not None:
            q = rms_norm(q, q.shape[-1:], self.q_gain, config.norm_eps)
            k = rms_norm(k, k.shape[-1:], self.k_gain, config.norm_eps)
        if config.rotary_dim:
            # GPT-NeoX's rotation leaves the dimensions beyond rotary_dim unchanged; over all dimensions it is
            # Llama's.
            from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

            q, k = apply_rotary_pos_emb(q, k, self.cos[None, :positions], self.sin[None, :positions])
        scores = (q @ k.mT) * config.scale
        if config.softcap is not None:
            scores = config.softcap * torch.tanh(scores / config.softcap)
        seen = visible(positions, config.window, x.device)
        return scores.masked_fill(~seen, -math.inf).softmax(-1)


def visible(
    positions: int, window: int | None, device: torch.device | str = "cpu"
) -> Bool[Tensor, "positions positions"]:
    """Return which positions (columns) each position (row) sees: none later than itself, and none `window` or
    more positions earlier."""
    seen = torch.ones(positions, positions, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)
