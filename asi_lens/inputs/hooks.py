"""Hook names of sites, forward passes with hooks that can stop early or start late, and W_O.

Hooks have TransformerLens's names; `twin` finds each hook's place in the module tree, and `verify` finds
which hook a site is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from asi_lens.base import sites
from asi_lens.base.errors import (
    DataError,
    OptionError,
    UnsupportedModelError,
    require,
    require_known,
    unknown_name,
)
from asi_lens.inputs import identities, passes, twin, verify
from asi_lens.inputs.passes import Hook, ResumePoint
from asi_lens.inputs.plain import PlainModel, wrong_inputs

SITES = tuple(sites.SITES)
"""Short names of hooks (`base.sites`): the outputs of attention and the MLP, the residual stream after a
layer, and the heads' concatenated outputs before W_O [n_heads * d_head]."""


def hook_name(model: nn.Module, site: str, layer: int) -> str:
    """Return the name of the hook of a site at a layer (0-based).

    `attn_out` and `mlp_out` are the hooks whose values are added to the stream, by the model's own arithmetic
    (`verify`). A full hook name is returned as it is, with the layer in place of `{}`
    (`blocks.{}.attn.hook_out`).

    Raises UnknownNameError with the nearest names, OptionError for a layer out of range, and
    UnsupportedModelError if the architecture does not have the site, or no hook that is provably the site.
    """
    both = twin.runners(model)
    known = both.own.places
    n_layers = len(both.own.blocks)
    if site in known:
        return site
    if site not in sites.ALL and "{}" not in site:
        near = difflib.get_close_matches(site, known, n=5, cutoff=0.6)
        raise unknown_name("site", site, [*SITES, *near])
    require(0 <= layer < n_layers, "layer", layer, f"between 0 and {n_layers - 1}")
    if site in sites.ALL:
        found = verify.verification(model)
        if (site, layer) not in found.sites:
            lacks = identities.lacks(found, site, layer)
            raise UnsupportedModelError(found.refused.get((site, layer), lacks))
        return found.sites[site, layer]
    name = site.format(layer)
    if name not in known or (both.plain is not None and name not in both.plain.places):
        raise UnsupportedModelError(
            f"{twin.architecture(model)} has no site {site!r} at layer {layer}: no hook {name!r}"
        )
    return name


def attention_write_site(model: nn.Module) -> str:
    """Return the site that equals z W_O (+ b_O): `attn_out`, or the hook before a norm or a multiplier in a
    model that changes attention's output before adding it to the stream (Gemma 2 and 3, OLMo 2, Granite)."""
    found = verify.verification(model)
    for layer, name in found.writes.items():
        if name != found.sites.get(("attn_out", layer)):
            return name.replace(f"blocks.{layer}.", "blocks.{}.")
    return "attn_out"


def normalizes_attn_out(model: nn.Module) -> bool:
    """Return whether attention's output is normalized before it is added to the stream (Gemma 2 and 3)."""
    found = verify.verification(model)
    added = (found.sites.get(("attn_out", layer)) for layer in found.writes)
    names = zip(added, found.writes.values(), strict=True)
    return any(one is not None and one.removesuffix("_scaled") != write for one, write in names)


def site_width(model: nn.Module, site: str, layer: int = 0) -> int:
    """Return the width of a site's activations: d_model; n_heads * d_head for z; measured for other hooks."""
    name = hook_name(model, site, layer)
    if site in sites.ALL and sites.ALL[site].in_stream:
        cfg: Any = model.cfg
        return int(cfg.d_model)
    widths: list[int] = []
    some = (
        verify.sample_inputs(model) if isinstance(model, PlainModel) else torch.zeros(1, 1, dtype=torch.long)
    )
    forward(model, some, {name: lambda x: widths.append(x.shape[-1])})
    return widths[0]


def forward(
    model: nn.Module,
    ids: Int[Tensor, "batch position"] | Mapping[str, Tensor],
    hooks: Mapping[str, Hook],
    *,
    stop_after_layer: int | None = None,
    logits: bool = False,
    start: ResumePoint | None = None,
) -> Float[Tensor, "batch position d_vocab"] | None:
    """Run a model on token ids, or on a batch of `Inputs`, with hooks by name; return the logits, or None.

    Hooks get activations [batch position width] in the model's dtype, z with concatenated heads (other hooks
    inside attention have TransformerLens's shapes). Blocks after `stop_after_layer` are not computed, and the
    unembedding only if `logits`. With `start`, only blocks `start.layer` and later run. Hooks are always
    removed afterwards, also after an error. The pass has no gradients and no KV cache.

    Raises OptionError (a context longer than the model's, a start with other ids ...), DataError (a token id
    that the model does not have), UnknownNameError for an unknown hook, UnsupportedModelError for a hook
    that this pass never reaches, or for logits of a model without a head.
    """
    runner = _runner_for(model, hooks)
    ids = _checked(model, ids)
    last = len(runner.blocks) - 1
    if logits and isinstance(model, PlainModel):
        raise UnsupportedModelError(
            f"{model.cfg.model_name} predicts no next token, so it has no logits here"
        )
    if stop_after_layer is not None:
        require(0 <= stop_after_layer <= last, "stop_after_layer", stop_after_layer, f"between 0 and {last}")
        require(not logits, "logits", logits, "False with stop_after_layer")
    with torch.inference_mode():
        return passes.run(
            model, runner, ids, hooks, stop_after_layer=stop_after_layer, logits=logits, start=start
        )


def capture_resume(model: nn.Module, ids: Int[Tensor, "batch position"], layer: int) -> ResumePoint:
    """Run the blocks before `layer` once; return the start for `forward(..., start=...)`.

    `layer` is between 0 and n_layers; after n_layers, only the final norm and the unembedding remain.
    """
    runner = _runner_for(model, [])
    require(0 <= layer <= len(runner.blocks), "layer", layer, f"between 0 and {len(runner.blocks)}")
    ids = _checked(model, ids)
    return ResumePoint(layer, ids, passes.states_before(model, runner, ids, layer) if layer else None)


def _runner_for(model: nn.Module, hooks: Iterable[str]) -> twin.Runner:
    """Return the plain twin's runner if it reaches all `hooks`, else the model's own, verified.

    If somebody added hooks to the model, the model itself runs, so that these hooks are called.
    """
    both = twin.runners(model)
    if both.plain is not None and not twin.added_hooks(model):
        known = both.own.places
        require_known(hooks, known, "hook")
        if all(name in both.plain.places for name in hooks):
            failure = verify.verification(model, both).failure
            if failure:
                raise UnsupportedModelError(f"{twin.architecture(model)}: {failure}")
            return both.plain
    verify.require_own(model, both)
    return both.own


def output_projection(
    model: nn.Module, layer: int, site: str = "z"
) -> Float[Tensor, "n_heads d_head d_model"]:
    """Return W_O [n_heads d_head d_model] in the model's dtype; `site` "cross_z" is for cross-attention.

    The sum over heads of z_h W_O[h], plus `output_bias`, is attention's output before any norm or multiplier
    after it (`attention_write_site`). A LayerScale after attention (DINOv2) is part of W_O and b_O. Raises
    UnsupportedModelError if that does not hold.
    """
    return _projection(model, layer, site)[0]


def output_bias(model: nn.Module, layer: int, site: str = "z") -> Float[Tensor, " d_model"] | None:
    """Return b_O [d_model], or None if attention's projection has no bias."""
    return _projection(model, layer, site)[1]


def _projection(model: nn.Module, layer: int, site: str) -> tuple[Tensor, Tensor | None]:
    blocks = twin.runners(model).own.blocks
    require(0 <= layer < len(blocks), "layer", layer, f"between 0 and {len(blocks) - 1}")
    require(site in ("z", "cross_z"), "site", site, "'z' or 'cross_z'")
    found = identities.raw_projection(model, layer, site)
    refused = verify.verification(model).refused.get((site, layer))
    if refused:
        raise UnsupportedModelError(refused)
    return found


def _checked(model: nn.Module, ids: Any) -> Any:
    """Return a pass's input on the model's device, ids checked against vocabulary and context."""
    cfg: Any = model.cfg
    if isinstance(model, PlainModel) and model.takes != "sequences" and isinstance(ids, Tensor):
        raise wrong_inputs(model)
    if isinstance(ids, Mapping):
        device = next(model.parameters()).device
        placed = model.placed if isinstance(model, PlainModel) else lambda value: value.to(device)
        return {
            name: _checked_ids(cfg, value).to(device) if name.endswith("input_ids") else placed(value)
            for name, value in ids.items()
        }
    return _checked_ids(cfg, ids).to(next(model.parameters()).device)


def _checked_ids(cfg: Any, ids: Int[Tensor, "batch position"]) -> Int[Tensor, "batch position"]:
    if ids.shape[1] > cfg.n_ctx:
        raise OptionError(f"context={ids.shape[1]} is not allowed; the model's context is {cfg.n_ctx} tokens")
    if ids.numel() == 0:
        raise DataError(f"no tokens: ids have shape {tuple(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= cfg.d_vocab:
        raise DataError(
            f"token ids are {low} to {high}, but the model's vocabulary is 0 to {cfg.d_vocab - 1}"
        )
    return ids
