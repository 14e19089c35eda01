"""What a layer adds to the residual stream: which hook is a site, by arithmetic on a few tokens.

A site's hook is not read from a list of architectures. Of the hooks that could be the site, the first one
whose values fit is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from asi_lens.base import sites
from asi_lens.base.errors import UnsupportedModelError
from asi_lens.inputs import twin
from asi_lens.inputs.plain import PlainModel

SITES = tuple(sites.SITES)

# Hooks that may be what attention and the MLP add to the stream; TransformerLens's own names come first.
_ADDED = {
    "attn_out": ("hook_attn_out", "ln1_post.hook_out", "ln1.hook_out", "attn.hook_out", "attn.o.hook_out"),
    "mlp_out": ("hook_mlp_out", "ln2_post.hook_out", "ln2.hook_out", "mlp.hook_out", "mlp.out.hook_out"),
}
_CROSS = "hook_cross_attn_out"
_Z = {"z": ("attn.hook_z", "attn.o.hook_in"), "cross_z": ("cross_attn.hook_z",)}
_WRITES = ("attn.hook_out", "attn.o.hook_out")
# Share of an update that may be missing beyond the rounding of its terms.
_SHARE = 1e-3
# Largest relative error of z W_O that rounding explains, by dtype.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 0.01, torch.bfloat16: 0.03}


@dataclass(frozen=True)
class Check:
    """One comparison: the relative error, and the error that rounding explains."""

    what: str
    layer: int | None
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether rounding explains the error (False for NaN)."""
        return self.error <= self.allowed

    @property
    def text(self) -> str:
        """The check and its error in words."""
        return f"{self.what} misses by {self.error:.2g} (rounding explains {self.allowed:.1g})"


@dataclass
class Found:
    """What the checks of a model's layers found."""

    model: str
    """Architecture."""
    dtype: torch.dtype
    checks: list[Check] = field(default_factory=list)
    sites: dict[tuple[str, int], str] = field(default_factory=dict)
    """(short site name, layer) -> the hook that is this site."""
    refused: dict[tuple[str, int], str] = field(default_factory=dict)
    """(short site name, layer) -> why there is no such site."""
    writes: dict[int, str] = field(default_factory=dict)
    """Layer -> the hook that equals z W_O (+ b_O)."""


def wanted(runner: twin.Runner) -> dict[str, twin.Place]:
    """Return the places whose values `check_layer` reads: hooks, and each block's input and output."""
    places: dict[str, twin.Place] = {}
    for layer, block in enumerate(runner.blocks):
        places[f"{layer}.pre"] = twin.Place(block, "in")
        places[f"{layer}.post"] = twin.Place(block, "out")
        names = ["ln1.hook_in", "ln1.hook_out", "ln2.hook_in", "ln2.hook_out", _CROSS, *_WRITES]
        names += [name for hooks in (*_ADDED.values(), *_Z.values()) for name in hooks]
        names += [f"{name}_scaled" for name in names if name.endswith("hook_out")]
        for name in names:
            full = f"blocks.{layer}.{name}"
            if full in runner.places:
                places[full] = runner.places[full]
    return places


def check_layer(
    model: nn.Module, runner: twin.Runner, layer: int, values: Mapping[str, Tensor], found: Found
) -> None:
    """Find the hooks of the four sites at one layer from recorded values, and state what does not hold."""
    post = f"blocks.{layer}.hook_resid_post"
    if post in runner.places:
        found.sites["resid_post", layer] = post
    else:
        found.refused["resid_post", layer] = lacks(found, "resid_post", layer)
    _check_sums(layer, values, found)
    _check_projection(model, layer, values, found, "z")
    if f"blocks.{layer}.{_CROSS}" in values:
        _check_projection(model, layer, values, found, "cross_z")


def _check_sums(layer: int, values: Mapping[str, Tensor], found: Found) -> None:
    pre, post = values.get(f"{layer}.pre"), values.get(f"{layer}.post")
    hooks = {site: _candidates(site, layer, values) for site in _ADDED}
    crossed = values.get(f"blocks.{layer}.{_CROSS}")
    cross = [] if crossed is None else [crossed]
    what = f"resid_pre + attn_out {'+ cross_attn_out ' * len(cross)}+ mlp_out = resid_post"
    best: Check | None = None
    if pre is not None and post is not None and pre.shape == post.shape:
        for attn, mlp in itertools.product(hooks["attn_out"], hooks["mlp_out"]):
            if attn == mlp:
                continue
            check = Check(what, layer, *_missing(post, pre, values[attn], *cross, values[mlp]))
            best = check if best is None or check.error < best.error else best
            if check.holds:
                found.checks.append(check)
                found.sites["attn_out", layer], found.sites["mlp_out", layer] = attn, mlp
                if cross:
                    found.sites["cross_attn_out", layer] = f"blocks.{layer}.{_CROSS}"
                return
        for site, start, end in _halves(layer, values, pre, post):
            halves = [
                (Check(f"{site} = its half of the update", layer, *_missing(end, start, values[name])), name)
                for name in hooks[site]
            ]
            fits = next(((check, name) for check, name in halves if check.holds), None)
            if fits is not None:
                found.checks.append(fits[0])
                found.sites[site, layer] = fits[1]
    for site, names in hooks.items():
        if (site, layer) not in found.sites:
            reason = lacks(found, site, layer)
            if best is not None:
                reason += f" that is what is added to the stream: {best.text}"
            elif names:
                reason += " that is known to be what is added to the stream"
            found.refused[site, layer] = reason
    if best is not None and any((site, layer) in found.refused for site in hooks):
        found.checks.append(best)


def _candidates(site: str, layer: int, values: Mapping[str, Tensor]) -> list[str]:
    full = [f"blocks.{layer}.{name}" for name in _ADDED[site]]
    shape = values[f"{layer}.post"].shape if f"{layer}.post" in values else None
    names = [*full, *(f"{name}_scaled" for name in full)]
    return [name for name in names if name in values and values[name].shape == shape]


def _halves(
    layer: int, values: Mapping[str, Tensor], pre: Tensor, post: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (site, stream before, stream after) of a layer's two halves, where its norms show the stream.

    A norm before each half sees the stream between them; a norm after each half (BERT) sees the sum.
    """
    ln1, ln1_out, ln2, ln2_out = (
        values.get(f"blocks.{layer}.{name}")
        for name in ("ln1.hook_in", "ln1.hook_out", "ln2.hook_in", "ln2.hook_out")
    )
    ln2 = ln2.view_as(post) if ln2 is not None and ln2.numel() == post.numel() else None
    if ln1 is not None and ln1_out is not None and ln2 is not None and ln2_out is not None:
        after = ln2_out.numel() == post.numel() and torch.equal(ln2_out.view_as(post), post)
        if after:
            yield "attn_out", pre, ln1.view_as(post)
            yield "mlp_out", ln1_out.view_as(post), ln2
            return
    if ln2 is not None:
        yield "attn_out", pre, ln2
        yield "mlp_out", ln2, post


def _missing(end: Tensor, start: Tensor, *added: Tensor) -> tuple[float, float]:
    """Return (share of the update that start + added misses, share that rounding explains)."""
    eps = torch.finfo(end.dtype).eps
    terms = [start.double(), *(one.double() for one in added)]
    end = end.double()
    off = (torch.stack(terms).sum(0) - end).abs()
    # Every sum, and every scaled term, is rounded once.
    rounding = 0.75 * eps * (terms[0].abs() + end.abs() + 2 * sum(term.abs() for term in terms[1:]))
    update = (end - terms[0]).norm().clamp_min(1e-30)
    explained = torch.minimum(off, rounding).norm() / update
    return float(off.norm() / update), float(explained) + _SHARE


def _check_projection(
    model: nn.Module, layer: int, values: Mapping[str, Tensor], found: Found, site: str
) -> None:
    z = next((name for name in _Z[site] if f"blocks.{layer}.{name}" in values), None)
    try:
        weight, bias = raw_projection(model, layer, site)
    except UnsupportedModelError as error:
        found.refused[site, layer] = str(error) if z else lacks(found, site, layer)
        return
    if z is None:
        found.refused[site, layer] = lacks(found, site, layer)
        return
    z = f"blocks.{layer}.{z}"
    rows, flat = values[z].double(), weight.double().flatten(0, 1)
    outputs = [found.sites.get(("attn_out", layer)), *(f"blocks.{layer}.{name}" for name in _WRITES)]
    if site == "cross_z":
        outputs = [f"blocks.{layer}.{_CROSS}"]
    best: Check | None = None
    for name in outputs:
        if name is None or name not in values or rows.shape[-1] != flat.shape[0]:
            continue
        out = values[name].double()
        product = rows @ flat + (0.0 if bias is None else bias.double())
        if product.shape != out.shape:
            continue
        off = float((product - out).norm() / out.norm().clamp_min(1e-30))
        what = f"{site} W_O + b_O = {'cross-' * (site == 'cross_z')}attention's output"
        check = Check(what, layer, off, _TOLERANCE[found.dtype])
        best = check if best is None or check.error < best.error else best
        if check.holds:
            found.checks.append(check)
            found.sites[site, layer] = z
            if site == "z":
                found.writes[layer] = name
            return
    found.refused[site, layer] = lacks(found, site, layer)
    if best is not None:
        found.checks.append(best)
        found.refused[site, layer] += f" whose product with W_O is attention's output: {best.text}"


def raw_projection(
    model: Any, layer: int, site: str = "z"
) -> tuple[Float[Tensor, "n_heads d_head d_model"], Float[Tensor, " d_model"] | None]:
    """Return W_O and b_O of a layer as they are stored. Raises UnsupportedModelError without a W_O."""
    if isinstance(model, PlainModel):
        plain, bias = model.projection(layer, cross=site == "cross_z")
        return rearrange(plain, "(head d_head) d_model -> head d_head d_model", head=model.cfg.n_heads), bias
    if site == "cross_z":
        raise UnsupportedModelError(f"{twin.architecture(model)} has no site 'cross_z' at layer {layer}")
    attention: Any = twin.runners(model).own.blocks[layer]._modules.get("attn")
    if twin.kind_of(model) == "hooked" and attention is not None:
        return attention.W_O.detach(), attention.b_O.detach()
    component = attention._modules.get("o") if attention is not None else None
    projection: Any = None if component is None else twin.original(component)
    weight = getattr(projection, "weight", None)
    n_heads = int(model.cfg.n_heads)
    # The weight of GPT-2's Conv1D is [in out], that of nn.Linear [out in].
    by_input = weight if type(projection).__name__ == "Conv1D" else getattr(weight, "T", None)
    if by_input is None or by_input.ndim != 2 or by_input.shape[0] % n_heads:
        raise UnsupportedModelError(
            f"{twin.architecture(model)} has no output projection W_O at layer {layer}"
        )
    bias = getattr(projection, "bias", None)
    heads = rearrange(by_input.detach(), "(head d_head) d_model -> head d_head d_model", head=n_heads)
    return heads, None if bias is None else bias.detach()


def lacks(found: Found, site: str, layer: int) -> str:
    """Return the error for a site that an architecture does not have."""
    return f"{found.model} has no site {site!r} at layer {layer}"
