"""Two ways to compute one model, on a few inputs: how far they differ, and how far rounding explains it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from asi_lens.inputs import twin
from asi_lens.inputs.float32 import in_float32
from asi_lens.inputs.identities import Check
from asi_lens.inputs.passes import run
from asi_lens.inputs.plain import PlainModel

# Largest relative error of logits and residuals that rounding explains, by dtype.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
# The same for the first layer's residual, on which less rounding has piled up. It stands for float32 where a
# model cannot compute in it. Of the models of the tests and the packaged ones, those that are read right miss
# by up to 0.0095 in bfloat16 and 0.0014 in float16, others by 0.019 and 0.016 or more.
_FIRST = {torch.float16: 0.005, torch.bfloat16: 0.015}


def compared(
    model: nn.Module,
    ours: twin.Runner,
    theirs: twin.Runner,
    given: twin.Given,
    places: Callable[[twin.Runner], Mapping[str, twin.Place]],
) -> list[Check]:
    """Return a check of each value at `places`, under its name, and of the logits of a model with a head.

    Rounding of half precision hides errors of some per cent: a model of half precision is compared in float32
    as well, and the numbers are those of float32 unless the others do not hold by themselves. Of a model that
    cannot compute in float32 there is a stricter check of the first layer instead.
    """
    first = "first residual"

    def errors() -> dict[str, float]:
        (found, logits), (wanted, right) = (
            record(model, one, given, {**places(one), first: twin.Place(one.blocks[0], "out")})
            for one in (ours, theirs)
        )
        pairs = [*((name, found.get(name), x) for name, x in wanted.items()), ("logits", logits, right)]
        dtype = next(model.parameters()).dtype
        return {
            name: float("inf") if value is None else relative_error(value, x, dtype)
            for name, value, x in pairs
            if x is not None
        }

    dtype = next(model.parameters()).dtype
    found, more = errors(), []
    checks = {name: Check(name, None, off, _TOLERANCE[dtype]) for name, off in found.items() if name != first}
    if dtype in _FIRST:
        try:
            with in_float32(model):
                exact = errors()
        except Exception:  # quantised weights, too little memory, code of a model that names a dtype
            more = [Check(first, None, found[first], _FIRST[dtype])]
        else:
            allowed = _TOLERANCE[torch.float32]
            checks |= {x: Check(x, None, exact[x], allowed) for x, check in checks.items() if check.holds}
    return [*more, *checks.values()]


def record(
    model: nn.Module, runner: twin.Runner, given: twin.Given, places: Mapping[str, twin.Place]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the values at `places` that a pass reaches, and the logits, or None without a head."""
    values: dict[str, Tensor] = {}
    hooks = {name: partial(_keep, values, name) for name in places}
    watched = twin.Runner(runner.blocks, dict(places), runner.root)
    with torch.inference_mode():
        logits = run(model, watched, given, hooks, logits=has_head(model, runner), reach_all=False)
    return values, logits


def _keep(values: dict[str, Tensor], name: str, x: Tensor) -> None:
    values[name] = x.detach().clone()


def has_head(model: nn.Module, runner: twin.Runner) -> bool:
    """Whether a pass gives logits."""
    if isinstance(model, PlainModel):
        return False
    return runner.root is None or runner.root.get_output_embeddings() is not None


def relative_error(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    """Return the relative error: of all positions together, or the median position's in half precision.

    Rounding can send a token to another expert in half precision, where it is another number altogether.
    """
    ours, theirs = ours.double().flatten(0, -2), theirs.double().flatten(0, -2)
    if ours.shape != theirs.shape:
        return float("inf")
    if dtype in (torch.float64, torch.float32):
        return float((ours - theirs).norm() / theirs.norm())
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())
