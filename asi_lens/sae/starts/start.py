"""What a start is: a function that fills unit rows, registered with what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import unknown_name
from asi_lens.kernels.draws import DRAW_ROWS


@dataclass(frozen=True)
class Draw:
    """What directions are drawn from.

    Attributes:
        seed: of the draw.
        active: V_active [d d_init], orthonormal, float64 on the CPU; None for starts without a subspace.
        spectrum, sample: of the raw activations, where there are any.
        first, total: rows `first` and on of `total` are filled; by default `total` is as many as there are.
    """

    seed: int
    active: Float[Tensor, "d d_init"] | None = None
    spectrum: Spectrum | None = None
    sample: Float[Tensor, "n width"] | None = None
    first: int = 0
    total: int | None = None

    @property
    def subspace(self) -> Float[Tensor, "d d_init"]:
        """V_active, of a start that needs it."""
        assert self.active is not None  # `active_subspace_of` gives it to those
        return self.active


Fill = Callable[[Tensor, Draw], Tensor]
"""Fills rows [n d] with unit directions; returns the norms [n] before, float64 on the CPU."""


@dataclass(frozen=True)
class Start:
    """A way of drawing directions, and what it needs.

    Attributes:
        fill: the function.
        subspace: whether it draws in an active subspace, and so needs a spectrum and `d_init`.
        sharded: whether it can fill a part of the rows, for a dictionary over several ranks.
        transcoders, lorsas: whether those can begin with it, too.
        norm: search of its own for the factor on unit encoder rows, given sums over the sample of |x|^2,
            x . r and |r|^2 (r the first reconstruction); without a search rows keep the norms of the draw.
            None is the best factor, in closed form.
    """

    name: str
    fill: Fill
    subspace: bool = False
    sharded: bool = False
    transcoders: bool = False
    lorsas: bool = False
    norm: Callable[[float, float, float], float] | None = None


STARTS: dict[str, Start] = {}
"""Starts by the name that `initialize` has for them."""


def start(
    name: str,
    *,
    subspace: bool = False,
    sharded: bool = False,
    transcoders: bool = False,
    lorsas: bool = False,
    norm: Callable[[float, float, float], float] | None = None,
) -> Callable[[Fill], Fill]:
    """Register a function as the start `name`, with what it needs (`Start`)."""

    def register(fill: Fill) -> Fill:
        STARTS[name] = Start(name, fill, subspace, sharded, transcoders, lorsas, norm)
        return fill

    return register


def find_start(name: str, among: Iterable[str] | None = None) -> Start:
    """The start of that name, of all or of some. Raises UnknownNameError, listing those."""
    known = list(STARTS if among is None else among)
    if name not in known:
        raise unknown_name("initialization method", name, known)
    return STARTS[name]


def starts_with(fact: Callable[[Start], bool]) -> str:
    """Names of the starts for which `fact` holds, as errors list them."""
    return " or ".join(repr(name) for name, each in STARTS.items() if fact(each))


def to_unit_norm(
    rows: Float[Tensor, "n d"], move: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, " n"]:
    """Put rows to unit norm, in float64, after `move` of [m d] float64 blocks; returns the norms before."""
    norms = []
    for block in rows.split(DRAW_ROWS):
        exact = block.double().cpu()
        norms.append(set_unit(block, exact if move is None else move(exact)))
    return torch.cat(norms)


def set_unit(rows: Float[Tensor, "n d"], exact: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Fill rows with the directions of `exact`; returns its norms."""
    norm = torch.linalg.vector_norm(exact, dim=1)
    rows.copy_(exact / norm.unsqueeze(1))
    return norm
