"""Row types of the tables of the notebook on stability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asi_lens.results.rows import DeadFeatureRow
from asi_lens.results.tables import Row

Against = Literal["half", "text", "layer"]
Inputs = Literal["as they are", "its own mean", "rotated"]


@dataclass(frozen=True)
class OverlapRow(Row):
    """Overlap of the active subspace of one text and layer with another one (`20_overlaps.csv`)."""

    model: str
    corpus: str
    n_tokens: int
    """Tokens of each of the two."""
    site: str
    layer: int
    against: Against
    """Difference between the two: the next part of the same text (the floor), the text, or the layer."""
    other: str
    """Name of the other text, or `layer 15`."""
    width: int
    r: int
    """Dimensions of both subspaces."""
    mean_cosine: float
    """Mean cosine of the principal angles."""
    kernel: float
    """Projection Kernel over `r`, 0 to 1 (`collapse.subspaces`)."""
    random_kernel: float
    """Expected `kernel` of random subspaces."""
    random_deviation: float
    """Its standard deviation."""
    captured: float
    """Share of the other's variance inside the subspace of `corpus` at `layer`."""
    captured_by_its_own: float
    """Share of the other's variance inside its own subspace: the most that `r` directions hold."""


@dataclass(frozen=True)
class TransferRow(DeadFeatureRow):
    """A `held_out` row of a dictionary on any text (`20_off_its_text.csv`); `corpus` is the training text."""

    text: str
    """Text that the numbers are of."""
    inputs: Inputs
    """`its own mean`: the text's mean is replaced by the mean of the training text. `rotated`: the active
    subspace is turned onto that of the training text, too."""


@dataclass(frozen=True)
class SeedMatchRow(Row):
    """Features of two seeds' dictionaries matched one to one (`20_subspace_stability.csv`)."""

    model: str
    corpus: str
    site: str
    layer: int
    method: str
    d_sae: int
    k: int
    seed: int
    other_seed: int
    tokens: int
    """Tokens seen in training: 0 at the start."""
    matched: float
    """Mean cosine of matched decoder rows."""
    gap: float
    """The mean of the best assignment is at most this much higher."""
    best: float
    """Mean of the best cosines both ways, not one to one; exact."""
    alike: float
    """Share of pairs with a cosine of 0.7 or more."""
    alive: float
    """Share of pairs in which both features fire on held-out text."""
    matched_alive: float | None
    """`matched` over these pairs; None without any."""
