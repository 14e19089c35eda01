"""Interface of a start: a function that fills unit rows, registered with its requirements."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import require_known
from asi_lens.kernels.draws import DRAW_ROWS


@dataclass(frozen=True)
class Draw:
    """Inputs of a draw of directions.

    Attributes:
        seed: seed of the draw.
        active: V_active [d d_init], orthonormal, float64, on the device of the rows; None for starts without
            a subspace.
        spectrum, sample: spectrum and sample of the raw activations, or None.
        first, total: the rows are those from `first` on of a draw of `total` rows; by default all rows.
    """

    seed: int
    active: Float[Tensor, "d d_init"] | None = None
    spectrum: Spectrum | None = None
    sample: Float[Tensor, "n width"] | None = None
    first: int = 0
    total: int | None = None

    @property
    def subspace(self) -> Float[Tensor, "d d_init"]:
        """V_active, for a start that needs it."""
        assert self.active is not None  # set by `active_subspace_of` for such starts
        return self.active


Fill = Callable[[Tensor, Draw], Tensor]
"""Fills rows [n d] with unit directions. Returns the norms [n] before normalization, float64."""


@dataclass(frozen=True)
class Start:
    """A way of drawing directions, and its requirements.

    Attributes:
        fill: the function.
        subspace: whether it draws in an active subspace, and so needs a spectrum and `d_init`.
        sharded: whether it can fill a part of the rows, for a dictionary over several ranks.
        transcoders, lorsas: whether transcoders and Lorsas can use it too.
        norm: the start's own search for the factor on unit encoder rows. It takes sums over the sample of
            |x|^2, x . r and |r|^2 (r is the first reconstruction). With `norm_search=False` rows keep the
            norms of the draw. None: the best factor is computed in closed form.
    """

    name: str
    fill: Fill
    subspace: bool = False
    sharded: bool = False
    transcoders: bool = False
    lorsas: bool = False
    norm: Callable[[float, float, float], float] | None = None


STARTS: dict[str, Start] = {}
"""Starts by their name in `initialize`."""


def start(name: str, **facts: Any) -> Callable[[Fill], Fill]:
    """Return a decorator that registers a function as the start `name`, with its requirements (`Start`)."""

    def register(fill: Fill) -> Fill:
        STARTS[name] = Start(name, fill, **facts)
        return fill

    return register


def find_start(name: str, among: Collection[str] | None = None) -> Start:
    """Return the start of that name, from `among` (default: all). Raises UnknownNameError with a list."""
    require_known([name], STARTS if among is None else among, "initialization method")
    return STARTS[name]


def starts_with(fact: Callable[[Start], bool]) -> str:
    """Return, for error messages, the names of the starts for which `fact` holds."""
    return " or ".join(repr(name) for name, each in STARTS.items() if fact(each))


def to_unit_norm(
    rows: Float[Tensor, "n d"], move: Callable[[Tensor], Tensor] | None = None
) -> Float[Tensor, " n"]:
    """Apply `move` to float64 blocks [m d] of the rows, then scale the rows to unit norm.

    Returns the norms before scaling.
    """
    norms = []
    for block in rows.split(DRAW_ROWS):
        exact = block.double()
        norms.append(set_unit(block, exact if move is None else move(exact)))
    return torch.cat(norms)


def set_unit(rows: Float[Tensor, "n d"], exact: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Fill rows with the unit directions of `exact`. Returns the norms of `exact`."""
    norm = torch.linalg.vector_norm(exact, dim=1)
    rows.copy_(exact / norm.unsqueeze(1))
    return norm
