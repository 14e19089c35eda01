"""Weights and rules of one attention layer of a model, read out and checked against the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from asi_lens.base.errors import UnsupportedModelError, require
from asi_lens.inputs import models, structure, twin
from asi_lens.inputs.float32 import in_float32
from asi_lens.lorsa.heads import PatternConfig, QueryKeyHeads
from asi_lens.sae.splice import Place

READ_SITE = "blocks.{}.attn.hook_in"
"""Hook of an attention layer's input: the residual stream, after the layer's input norm if it has one."""

# Largest relative error of the copy's output that rounding explains, by the dtype that the model computes in.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


@dataclass(frozen=True)
class AttentionLayer:
    """Weights of an attention layer by query head (float64, on the CPU), and its rules for patterns.

    Key-value heads that query heads share (grouped queries) are repeated: one copy for each query head.
    Missing biases are zeros. `cos` and `sin` are those of `QueryKeyHeads`. Gains are None for a layer without
    a query-key norm.
    """

    W_Q: Float[Tensor, "head d_in d_head"]
    W_K: Float[Tensor, "head d_in d_head"]
    W_V: Float[Tensor, "head d_in d_head"]
    W_O: Float[Tensor, "head d_head d_in"]
    b_Q: Float[Tensor, "head d_head"]
    b_K: Float[Tensor, "head d_head"]
    b_V: Float[Tensor, "head d_head"]
    b_O: Float[Tensor, " d_in"]
    cos: Float[Tensor, "context rotary_dim"]
    sin: Float[Tensor, "context rotary_dim"]
    q_gain: Float[Tensor, " d_head"] | None
    k_gain: Float[Tensor, " d_head"] | None
    pattern: PatternConfig

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.W_Q.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the layer's input and output."""
        return self.W_Q.shape[1]

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.W_Q.shape[2]

    @torch.no_grad()
    def fill(self, heads: QueryKeyHeads, mean: Float[Tensor, " d_in"], scale: float) -> None:
        """Copy queries and keys into `heads`, adapted to inputs (x - mean) * scale instead of x.

        Where `heads` has a multiple of the layer's heads, each head is copied into that many neighbors.
        """
        copies = heads.W_Q.shape[0] // self.n_heads
        mean = mean.to(self.W_Q)
        for name in "QK":
            W, b = getattr(self, f"W_{name}"), getattr(self, f"b_{name}")
            getattr(heads, f"W_{name}").copy_((W / scale).repeat_interleave(copies, 0))
            getattr(heads, f"b_{name}").copy_((b + mean @ W).repeat_interleave(copies, 0))
        for name in ("cos", "sin", "q_gain", "k_gain"):
            value = getattr(self, name)
            if value is not None:
                getattr(heads, name).copy_(value)

    @torch.no_grad()
    def output(self, x: Float[Tensor, "batch position d_in"]) -> Float[Tensor, "batch position d_in"]:
        """Return the layer's output for raw inputs, float64, before any norm that follows the layer."""
        heads = QueryKeyHeads(self.n_heads, self.d_in, self.d_head, self.pattern, torch.float64)
        self.fill(heads, torch.zeros(self.d_in), 1.0)
        values = torch.einsum("bpd,hdv->bhpv", x.double().cpu(), self.W_V) + self.b_V[:, None]
        z = heads(x.double().cpu()) @ values
        return torch.einsum("bhpv,hvd->bpd", z, self.W_O) + self.b_O


def write_site(model: nn.Module, layer: int) -> str:
    """Return the hook of the attention layer's output, before any norm that follows it (Gemma 2 and 3)."""
    return models.hook_name(model, models.attention_write_site(model), layer)


def layer_place(model: nn.Module, layer: int) -> Place:
    """Return the place of a Lorsa of that layer: the attention layer's input and output."""
    return Place.of(model, (write_site(model, layer), layer), (READ_SITE, layer))


def origin(model: nn.Module, layer: int) -> dict[str, Any]:
    """Return metadata of a Lorsa of `model`: the model's name and fingerprint, the layer, the output hook."""
    info = models.model_info(model)
    return {
        "model": info.name,
        "fingerprint": info.fingerprint,
        "layer": layer,
        "hook_name": write_site(model, layer),
    }


def read_attention(model: nn.Module, layer: int, context: int) -> AttentionLayer:
    """Read an attention layer of a TransformerBridge, for sequences up to `context`.

    The model runs once, on `context` tokens up to that layer, in float32 if it is of half precision
    (`in_float32`), whose rounding would hide rules that were not read. The rotation by position is taken from
    that run, and the output of the copy must equal the layer's own output up to rounding.

    Raises UnsupportedModelError, naming the reason, for a layer that computes its patterns in another way
    (without a causal mask, with ALiBi or other rotations ...), and as `in_float32`. Raises OptionError for a
    layer or context out of range.
    """
    info = models.model_info(model, fingerprint=False)
    if not info.causal:
        raise _unsupported(model, layer, "it attends to later positions too: no causal mask")
    read, write = models.hook_name(model, READ_SITE, layer), write_site(model, layer)
    require(1 <= context <= info.n_ctx, "context", context, f"from 1 to the model's {info.n_ctx} tokens")
    if hooked := structure.added_hooks(model):
        where = ", ".join(hooked)
        raise _unsupported(model, layer, f"hooks that were added to the model are in the way (on {where})")
    both = twin.runners(model)
    fast = both.plain
    if fast is None or read not in fast.places:
        raise _unsupported(model, layer, "only a TransformerBridge without weight processing is read")
    attention: Any = fast.places[read].module
    with in_float32(model):
        x, y, rotation = _run(model, attention, layer, read, write, context)
        bridge = both.own.blocks[layer]._modules["attn"]
        n_heads, n_groups = info.n_heads, info.n_kv_heads
        W_Q, b_Q = _projection(model, layer, bridge, "q", n_heads, n_heads)
        W_K, b_K = _projection(model, layer, bridge, "k", n_groups, n_heads)
        W_V, b_V = _projection(model, layer, bridge, "v", n_groups, n_heads)
        W_O, b_O = models.output_projection(model, layer), models.output_bias(model, layer)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        scale = getattr(attention, "scaling", None)
        if scale is None:
            raise _unsupported(model, layer, f"{type(attention).__name__} has no `scaling`")
        # Mistral's modules keep no window of their own.
        holds_window = (
            attention if hasattr(attention, "sliding_window") else getattr(attention, "config", None)
        )
        cos, sin = rotation or (torch.zeros(context, 0), torch.zeros(context, 0))
        found = AttentionLayer(
            W_Q=W_Q,
            W_K=W_K,
            W_V=W_V,
            W_O=W_O.double().cpu(),
            b_Q=b_Q,
            b_K=b_K,
            b_V=b_V,
            b_O=torch.zeros(W_Q.shape[1], dtype=torch.float64, device="cpu")
            if b_O is None
            else b_O.double().cpu(),
            cos=cos.double().cpu(),
            sin=sin.double().cpu(),
            q_gain=None if norms[0] is None else _gain(model, layer, norms[0], W_Q.shape[2]),
            k_gain=None if norms[1] is None else _gain(model, layer, norms[1], W_Q.shape[2]),
            pattern=PatternConfig(
                context=context,
                scale=float(scale),
                softcap=getattr(attention, "attn_logit_softcapping", None),
                window=getattr(holds_window, "sliding_window", None),
                rotary_dim=cos.shape[-1],
                norm_eps=None if norms[0] is None else _eps(norms[0]),
            ),
        )
        allowed = _TOLERANCE[next(model.parameters()).dtype]
    error = float((found.output(x) - y).norm() / y.norm())
    if not error <= allowed:
        raise _unsupported(
            model,
            layer,
            f"queries, keys, rotation, scale, soft cap, window and norm as read give another output than the "
            f"layer (relative error {error:.2g}, rounding explains {allowed:g}): it does something else too",
        )
    return found


def _run(
    model: nn.Module, attention: nn.Module, layer: int, read: str, write: str, context: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Run the model once; return input and output [1 context d_in], float64, and (cos, sin) or None.

    cos and sin are [context rotary_dim]; None for a layer without a rotation.
    """
    seen: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["rotation"] = kwargs.get("position_embeddings")

    hooks = {read: lambda x: seen.__setitem__("x", x), write: lambda y: seen.__setitem__("y", y)}
    ids = torch.arange(context).remainder(models.model_info(model, fingerprint=False).d_vocab)[None]
    handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        models.forward(model, ids, hooks, stop_after_layer=layer)
    finally:
        handle.remove()
    if "rotation" not in seen:
        raise _unsupported(model, layer, "a forward pass does not run its own attention module")
    rotation = seen["rotation"]
    if rotation is not None:
        pair = isinstance(rotation, tuple | list) and len(rotation) == 2
        if not pair or not all(
            torch.is_tensor(part) and part.is_floating_point() and part.numel() % context == 0
            for part in rotation
        ):
            raise _unsupported(model, layer, "its rotation by position is not a pair of cosines and sines")
        cos, sin = (part.reshape(context, -1) for part in rotation)
        rotation = cos, sin
    return seen["x"].double().cpu(), seen["y"].double().cpu(), rotation


def _projection(
    model: nn.Module, layer: int, bridge: Any, name: str, n_groups: int, n_heads: int
) -> tuple[Float[Tensor, "head d_in d_head"], Float[Tensor, "head d_head"]]:
    """Return weights and biases of queries, keys or values, float64, repeated for each query head."""
    part = bridge._modules.get(name)
    linear: Any = None if part is None else twin.original(part)
    if not isinstance(linear, nn.Linear):
        raise _unsupported(model, layer, f"it has no projection `{name}` of its own")
    if linear.weight.shape[0] % n_groups:
        rows = linear.weight.shape[0]
        raise _unsupported(model, layer, f"its projection `{name}` has {rows} rows for {n_groups} heads")
    weight = linear.weight.detach().double().cpu()
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()
    by_head = weight.unflatten(0, (n_groups, -1)).mT
    biases = bias.double().cpu().unflatten(0, (n_groups, -1))
    copies = n_heads // n_groups
    return by_head.repeat_interleave(copies, 0), biases.repeat_interleave(copies, 0)


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or 0.0)


def _gain(model: nn.Module, layer: int, norm: nn.Module, d_head: int) -> Float[Tensor, " d_head"]:
    """Return a norm's gain: its output for ones, whose root mean square is 1. (Some norms store gain - 1.)"""
    parameter = next(norm.parameters(), torch.empty(0))
    if _eps(norm) <= 0 or parameter.numel() != d_head:
        raise _unsupported(
            model, layer, f"its query-key norm {type(norm).__name__} is no root-mean-square norm by head"
        )
    with torch.no_grad():
        gain = norm(torch.ones(1, 1, 1, d_head, dtype=parameter.dtype, device=parameter.device))
    return gain.flatten().double().cpu() * (1 + _eps(norm)) ** 0.5


def _unsupported(model: nn.Module, layer: int, why: str) -> UnsupportedModelError:
    info = models.model_info(model, fingerprint=False)
    return UnsupportedModelError(
        f"attention of layer {layer} of {info.name} ({info.architecture}) cannot be copied: {why}"
    )
