"""Hook names of sites, forward passes with hooks that can stop early or start late, and W_O.

Hooks have TransformerLens's names; `twin` finds each hook's place in the module tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from asi_lens.base import sites
from asi_lens.base.errors import DataError, OptionError, UnsupportedModelError, require, unknown_name
from asi_lens.inputs import twin

SITES = tuple(sites.SITES)
"""Short names of hooks (`base.sites`): the outputs of attention and the MLP, the residual stream after a
layer, and the heads' concatenated outputs before W_O [n_heads * d_head]."""

Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation [batch position width], which must not be changed in place. A returned tensor replaces
the activation."""


@dataclass(frozen=True)
class ResumePoint:
    """The residual stream before block `layer`, from which later blocks can be run repeatedly."""

    layer: int
    ids: Int[Tensor, "batch position"]
    states: Any
    """Return value of block `layer - 1`; None for layer 0."""


class _Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward pass after the last needed layer."""


def hook_name(model: nn.Module, site: str, layer: int) -> str:
    """Return the name of the TransformerLens hook of a site at a layer (0-based).

    A full hook name is returned as it is, with the layer in place of `{}` (`blocks.{}.attn.hook_out`).

    Raises UnknownNameError with the nearest names, OptionError for a layer out of range, and
    UnsupportedModelError if the architecture does not have the site.
    """
    own, fast = twin.runners(model)
    n_layers = len(own.blocks)
    if site in own.places:
        return site
    if site not in SITES and "{}" not in site:
        near = difflib.get_close_matches(site, own.places, n=5, cutoff=0.6)
        raise unknown_name("site", site, [*SITES, *near])
    require(0 <= layer < n_layers, "layer", layer, f"between 0 and {n_layers - 1}")
    architecture = _architecture(model)
    template = sites.SITES[site].hook(architecture) if site in sites.SITES else site
    name = template.format(layer)
    if name not in own.places or (fast is not None and name not in fast.places):
        raise UnsupportedModelError(f"{architecture} has no site {site!r} at layer {layer}: no hook {name!r}")
    return name


def attention_write_site(model: nn.Module) -> str:
    """Return the site that equals z W_O (+ b_O): `attn_out`, or the hook before the norm in a model that
    normalizes attention's output before adding it to the stream (Gemma 2 and 3)."""
    return "blocks.{}.attn.hook_out" if normalizes_attn_out(model) else "attn_out"


def normalizes_attn_out(model: nn.Module) -> bool:
    """Return whether attention's output is normalized before it is added to the stream (Gemma 2 and 3)."""
    if twin.kind_of(model) == "hooked":
        return bool(getattr(model.cfg, "use_normalization_before_and_after", False))
    return any("ln1_post" in block._modules for block in twin.runners(model)[0].blocks)


def site_width(model: nn.Module, site: str, layer: int = 0) -> int:
    """Return the width of a site's activations: d_model; n_heads * d_head for z; measured for other hooks."""
    name = hook_name(model, site, layer)
    if site in sites.SITES and sites.SITES[site].in_stream:
        return int(_config(model).d_model)
    widths: list[int] = []
    forward(model, torch.zeros(1, 1, dtype=torch.long), {name: lambda x: widths.append(x.shape[-1])})
    return widths[0]


@torch.inference_mode()
def forward(
    model: nn.Module,
    ids: Int[Tensor, "batch position"],
    hooks: Mapping[str, Hook],
    *,
    stop_after_layer: int | None = None,
    logits: bool = False,
    start: ResumePoint | None = None,
) -> Float[Tensor, "batch position d_vocab"] | None:
    """Run a model on token ids with hooks by name (see `hook_name`); return the logits, or None.

    Hooks get activations [batch position width] in the model's dtype, z with concatenated heads (other hooks
    inside attention have TransformerLens's shapes). Blocks after `stop_after_layer` are not computed, and the
    unembedding only if `logits`. With `start`, only blocks `start.layer` and later run. Hooks are always
    removed afterwards, also after an error. The pass has no gradients and no KV cache.

    Raises OptionError (a context longer than the model's, a start with other ids ...), DataError (a token id
    that the model does not have), UnknownNameError for an unknown hook, UnsupportedModelError for a hook
    that this pass never reaches, or for logits of a model without a head.
    """
    runner = twin.runner_for(model, list(hooks))
    ids = _checked(model, ids)
    last = len(runner.blocks) - 1
    if stop_after_layer is not None:
        require(0 <= stop_after_layer <= last, "stop_after_layer", stop_after_layer, f"between 0 and {last}")
        require(not logits, "logits", logits, "False with stop_after_layer")
    fired: set[str] = set()
    with ExitStack() as undo:
        for name, hook in hooks.items():
            if name not in runner.places:
                raise unknown_name("hook", name, runner.places)
            module, side = runner.places[name]
            undo.callback(_attach(module, side, hook, name, fired).remove)
        if start is not None:
            _skip_blocks(runner, start, ids, undo)
        if stop_after_layer is not None:
            undo.callback(runner.blocks[stop_after_layer].register_forward_hook(_stop).remove)
        try:
            output = runner.call(model, ids, logits)
        except _Stop:
            output = None
    missed = [name for name in hooks if name not in fired]
    if missed:
        raise UnsupportedModelError(
            f"{_architecture(model)} did not reach {', '.join(missed)} in a forward with stop_after_layer="
            f"{stop_after_layer}, logits={logits}, start={start.layer if start else None}"
        )
    return output


def capture_resume(model: nn.Module, ids: Int[Tensor, "batch position"], layer: int) -> ResumePoint:
    """Run the blocks before `layer` once; return the start for `forward(..., start=...)`.

    `layer` is between 0 and n_layers; after n_layers, only the final norm and the unembedding remain.
    """
    runner = twin.runner_for(model, [])
    require(0 <= layer <= len(runner.blocks), "layer", layer, f"between 0 and {len(runner.blocks)}")
    ids = _checked(model, ids)
    if layer == 0:
        return ResumePoint(0, ids, None)
    kept: list[Any] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output)
        raise _Stop

    handle = runner.blocks[layer - 1].register_forward_hook(keep)
    try:
        with torch.inference_mode():
            runner.call(model, ids, False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return ResumePoint(layer, ids, kept[0])


def output_projection(model: nn.Module, layer: int) -> Float[Tensor, "n_heads d_head d_model"]:
    """Return W_O [n_heads d_head d_model] in the model's dtype.

    The sum over heads of z_h W_O[h], plus `output_bias`, is attention's output before any norm after it
    (`blocks.L.attn.hook_out`; see `ModelInfo.normalizes_attn_out`).
    """
    projection = _projection(model, layer)
    if twin.kind_of(model) == "hooked":
        return projection.W_O.detach()
    weight = projection.weight.detach()
    # The weight of GPT-2's Conv1D is [in out], that of nn.Linear [out in]
    by_input = weight if type(projection).__name__ == "Conv1D" else weight.T
    n_heads = int(_config(model).n_heads)
    return rearrange(by_input, "(head d_head) d_model -> head d_head d_model", head=n_heads)


def output_bias(model: nn.Module, layer: int) -> Float[Tensor, " d_model"] | None:
    """Return b_O [d_model], or None if attention's projection has no bias."""
    projection = _projection(model, layer)
    bias = projection.b_O if twin.kind_of(model) == "hooked" else getattr(projection, "bias", None)
    return None if bias is None else bias.detach()


def _projection(model: nn.Module, layer: int) -> Any:
    blocks = twin.runners(model)[0].blocks
    require(0 <= layer < len(blocks), "layer", layer, f"between 0 and {len(blocks) - 1}")
    attention = blocks[layer]._modules.get("attn")
    if twin.kind_of(model) == "hooked" and attention is not None:
        return attention
    projection = attention._modules.get("o") if attention is not None else None
    if projection is None or getattr(twin.original(projection), "weight", None) is None:
        raise UnsupportedModelError(f"{_architecture(model)} has no output projection W_O at layer {layer}")
    return twin.original(projection)


def _checked(model: nn.Module, ids: Int[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
    cfg = _config(model)
    if ids.shape[1] > cfg.n_ctx:
        raise OptionError(f"context={ids.shape[1]} is not allowed; the model's context is {cfg.n_ctx} tokens")
    if ids.numel() == 0:
        raise DataError(f"no tokens: ids have shape {tuple(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= cfg.d_vocab:
        raise DataError(
            f"token ids are {low} to {high}, but the model's vocabulary is 0 to {cfg.d_vocab - 1}"
        )
    return ids.to(next(model.parameters()).device)


def _attach(module: nn.Module, side: twin.Side, hook: Hook, name: str, fired: set[str]) -> Any:
    def run(activation: Tensor) -> Tensor | None:
        fired.add(name)
        flat = activation
        if name.endswith(".hook_z"):  # TransformerLens's versions have 3 or 4 axes
            flat = rearrange(activation, "batch position ... -> batch position (...)")
        new = hook(flat)
        if new is None:
            return None
        if new.shape != flat.shape:
            raise OptionError(f"the hook at {name} returned {tuple(new.shape)} for {tuple(flat.shape)}")
        return new.to(activation.dtype).reshape(activation.shape)

    def after(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return run(output)
        new = run(output[0])
        return None if new is None else (new, *output[1:])

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            new = run(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        key = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        new = run(kwargs[key])
        return None if new is None else (args, {**kwargs, key: new})

    if side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _skip_blocks(runner: twin.Runner, start: ResumePoint, ids: Tensor, undo: ExitStack) -> None:
    """Make every block before the start return the captured output of the last of these blocks."""
    if start.ids.shape != ids.shape or not torch.equal(start.ids, ids):
        raise OptionError("start was captured with other token ids than these")
    for block in runner.blocks[: start.layer]:
        # set in the instance's __dict__: a bridge component passes attributes to its inner module
        block.__dict__["forward"] = lambda *args, **kwargs: start.states
        undo.callback(block.__dict__.pop, "forward")


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _Stop


def _config(model: nn.Module) -> Any:
    return model.cfg


def _architecture(model: nn.Module) -> str:
    cfg = _config(model)
    return str(getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", "") or "the model")
