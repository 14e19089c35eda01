"""Sites and their hook names, forwards with hooks that stop early or start late, and W_O.

Hooks are named as in TransformerLens; where each lies in the module tree is the business of `twin`.
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
"""Names for hooks (`base.sites`): what attention and the MLP add to the residual stream, the stream after a
layer, and the heads' outputs before W_O, side by side [n_heads * d_head]."""

Hook = Callable[[Tensor], Tensor | None]
"""Gets an activation [batch position width] (not to be changed in place); a tensor that it returns goes on
in the activation's place."""


@dataclass(frozen=True)
class ResumePoint:
    """The residual stream that enters block `layer`, to run the blocks from there on again and again."""

    layer: int
    ids: Int[Tensor, "batch position"]
    states: Any
    """What block `layer - 1` returned; None for layer 0."""


class _Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward whose last wanted layer is done."""


def hook_name(model: nn.Module, site: str, layer: int) -> str:
    """The TransformerLens hook of a site at a layer (0-based).

    A full hook name is returned as it is; in one with `{}` (`blocks.{}.attn.hook_out`) the layer is put.

    Raises UnknownNameError with the nearest names, OptionError for a layer out of range, and
    UnsupportedModelError where the architecture has no such site.
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
    """The site that equals z W_O (+ b_O): `attn_out`, or the hook before the norm where a model normalizes
    what attention puts out before it adds it (Gemma 2 and 3)."""
    return "blocks.{}.attn.hook_out" if normalizes_attn_out(model) else "attn_out"


def normalizes_attn_out(model: nn.Module) -> bool:
    """Whether attention's output is normalized before it is added to the stream (Gemma 2 and 3)."""
    if twin.kind_of(model) == "hooked":
        return bool(getattr(model.cfg, "use_normalization_before_and_after", False))
    return any("ln1_post" in block._modules for block in twin.runners(model)[0].blocks)


def site_width(model: nn.Module, site: str, layer: int = 0) -> int:
    """Width of a site's activations: d_model, n_heads * d_head for z; found by a run for other hooks."""
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
    """Run a model on token ids with hooks by name (see `hook_name`).

    Hooks get activations [batch position width] in the model's dtype, z with its heads side by side (other
    hooks inside attention have TransformerLens' shapes).
    Nothing after block `stop_after_layer` is computed, and no unembedding unless `logits`. With `start` only
    blocks `start.layer` and later run. Hooks are taken off again whatever happens. No gradients, no KV cache.

    Raises OptionError (a context longer than the model's, a start that is not of these ids ...), DataError
    (a token id that the model does not have), UnknownNameError for a hook, UnsupportedModelError for a hook
    that this forward never reaches, or logits of a model without a head.
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
    """Run the blocks before `layer` once: the point from which `forward(..., start=...)` goes on.

    `layer` is between 0 and n_layers; n_layers leaves the final norm and the unembedding.
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
    """W_O by head, in the model's dtype: sum over heads of z_h W_O[h], plus `output_bias`, is what attention
    puts out before any norm after it (`blocks.L.attn.hook_out`; see `ModelInfo.normalizes_attn_out`)."""
    projection = _projection(model, layer)
    if twin.kind_of(model) == "hooked":
        return projection.W_O.detach()
    weight = projection.weight.detach()
    # GPT-2's Conv1D keeps its weight as [in out], nn.Linear as [out in]
    by_input = weight if type(projection).__name__ == "Conv1D" else weight.T
    n_heads = int(_config(model).n_heads)
    return rearrange(by_input, "(head d_head) d_model -> head d_head d_model", head=n_heads)


def output_bias(model: nn.Module, layer: int) -> Float[Tensor, " d_model"] | None:
    """b_O, or None where attention's projection has no bias."""
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
        if name.endswith(".hook_z"):  # heads are one axis or two, as TransformerLens' version has it
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
    """Make every block before the start return what the last of them returned when it was captured."""
    if start.ids.shape != ids.shape or not torch.equal(start.ids, ids):
        raise OptionError("start was captured with other token ids than these")
    for block in runner.blocks[: start.layer]:
        # in the instance's own table: a bridge component hands attributes on to the module inside it
        block.__dict__["forward"] = lambda *args, **kwargs: start.states
        undo.callback(block.__dict__.pop, "forward")


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _Stop


def _config(model: nn.Module) -> Any:
    return model.cfg


def _architecture(model: nn.Module) -> str:
    cfg = _config(model)
    return str(getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", "") or "the model")
