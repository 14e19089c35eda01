"""Row types of every table that a notebook writes.

`tables` checks, writes and reads the rows. `provenance` records where and how the rows were made, `claims`
holds the claims' verdicts on them.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from asi_lens.results.tables import Row, columns, frame, read_rows, write_rows

if TYPE_CHECKING:
    import pandas as pd

Subspace = Literal["principal", "random"]
Variant = Literal[
    "z",
    "attn_out",
    "flat_spectrum",
    "random_orthogonal",
    "gaussian",
    "rotated_input",
    "isotropic_z",
    "orthogonal_heads",
    "sum_of_heads",
]
Split = Literal["train", "held_out"]

VARIANTS: tuple[str, ...] = typing.get_args(Variant)
"""Variants of the W_O ablation, in the order of its figure (paper, C4 and C5)."""
LOSSES: tuple[str, ...] = ("cross_entropy_delta", "cross_entropy_delta_error", "kl")
"""Columns of the language model's losses; also names of `sae.splice.SpliceLosses`."""


@dataclass(frozen=True)
class RankRow(Row):
    """Rank measures of the centered activations of one site at one layer (`01_rank_curves.csv`)."""

    model: str
    """Name the model was loaded by."""
    corpus: str
    """Name of the text."""
    site: str
    """`attn_out`, `mlp_out`, `resid_post`, `z`, a decoder's `cross_attn_out` or `cross_z`, or a hook name."""
    layer: int
    """Layer, from 0."""
    d: int
    """Width of the site."""
    n_tokens: int
    """Tokens seen; `n_left_out` of them are not in the covariance."""
    effective_rank: float
    """exp of the entropy (nats) of the singular values divided by their sum (Roy & Vetterli 2007)."""
    effective_rank_fraction: float
    """`effective_rank / d`."""
    intrinsic_dimension_99: int
    """Directions that hold 99 % of the variance."""
    participation_ratio: float
    """(sum of eigenvalues)^2 / sum of their squares."""
    stable_rank: float
    """Sum of eigenvalues / the largest."""
    n_left_out: int = 0
    """Tokens with massive activations (`activations.massive`)."""
    rank_with_massive: float | None = None
    """`effective_rank_fraction` with these tokens in the covariance; None if there are none."""


def left_out(table: pd.DataFrame) -> str:
    """Return in words how many massive activations the `RankRow`s of a table leave out."""
    hit = table[table.n_left_out > 0]
    if hit.empty:
        return "no massive activations were found"
    most = hit.loc[hit.n_left_out.idxmax()]
    share = f"{most.n_left_out:,} of {most.n_tokens:,} tokens"
    where = f"most at {most.site} of layer {most.layer}: {share}"
    return f"massive activations are left out at {len(hit)} of {len(table)} places ({where})"


@dataclass(frozen=True)
class SpectrumRow(Row):
    """One singular value of one site at one layer (`01_spectra.csv`)."""

    model: str
    corpus: str
    site: str
    layer: int
    d: int
    n_tokens: int
    index: int
    """Position in descending order, from 1."""
    index_fraction: float
    """`index / d`."""
    relative_singular_value: float
    """s_i / s_1."""


@dataclass(frozen=True)
class LossRow(Row):
    """Cross-entropy with a site truncated to a subspace (`02_downstream_loss.csv`)."""

    model: str
    corpus: str
    n_tokens: int
    """Tokens whose next-token loss was averaged."""
    site: str
    layer: int
    subspace: Subspace
    """`principal`: the top directions of the covariance; `random`: the same number of random directions."""
    seed: int | None
    """Seed of the random subspace; None for the principal subspace."""
    rank: int
    """Number of kept directions; all other directions are set to the mean."""
    rank_fraction: float
    """`rank / d`."""
    cross_entropy: float
    """Nats per token with the site truncated."""
    cross_entropy_clean: float
    """Nats per token of the unchanged model."""
    cross_entropy_mean_ablated: float
    """Nats per token with the site at its mean."""
    loss_recovered: float | None
    """(mean ablated - truncated) / (mean ablated - clean); None if the ablation does not raise the loss."""


@dataclass(frozen=True)
class PairedLossRow(Row):
    """Losses of the language model under two methods' dictionaries on the same text (`04_paired.csv`).

    Differences are `method` minus `reference`, means over sequences of the differences of each sequence.
    Their errors are standard errors over sequences: what both methods share on a sequence does not enter.
    """

    model: str
    corpus: str
    n_tokens: int
    """Tokens of the text."""
    n_sequences: int
    places: str
    """Sites and layers whose dictionaries were put in their places in one pass: `attn_out 3, attn_out 15`."""
    n_places: int
    method: str
    reference: str
    seed: int
    cross_entropy_delta: float
    """With the method's reconstructions, minus clean."""
    cross_entropy_difference: float
    cross_entropy_error: float
    kl: float
    """KL(clean || spliced) of the method."""
    kl_difference: float
    kl_error: float


@dataclass(frozen=True)
class OutputProjectionRow(Row):
    """Effective rank of a layer's attention output under one change (`03_wo_ablation.csv`)."""

    model: str
    corpus: str
    n_tokens: int
    layer: int
    variant: Variant
    """The measured or changed part; see `VARIANTS`."""
    seed: int | None
    """Seed of the draw; None if nothing is drawn."""
    effective_rank_fraction: float
    """Effective rank over d_model (over the width of z for `z`)."""


@dataclass(frozen=True)
class HeadOverlapRow(Row):
    """Principal angles between the output subspaces of two heads (`03_head_overlap.csv`)."""

    model: str
    corpus: str | None
    """Text that the subspaces were computed from; None if only the weights were used."""
    n_tokens: int | None
    layer: int
    head_a: int
    head_b: int
    mean_cosine: float
    """Mean cosine of the principal angles, 0 (orthogonal) to 1 (the same subspace)."""
    largest_cosine: float
    """Cosine of the smallest principal angle."""
    covariance_cosine: float
    """Cosine between the covariances of the two heads' outputs: overlap weighted by use."""
    random_mean_cosine: float
    """`mean_cosine` of two random subspaces of the same size."""


@dataclass(frozen=True)
class DeadFeatureRow(Row):
    """Measurements at one point in one dictionary's training (`04_dead_feature_curves.csv` and later)."""

    model: str
    corpus: str
    site: str
    layer: int
    method: str
    """Name of the recipe, as in the figure's legend."""
    init: str
    """`random`, `orthogonal`, `asi` ..."""
    d_init: int | None
    """Dimensions of the active subspace; None if the initialization does not use an active subspace."""
    optimizer: str
    aux_k: int
    """Number of dead features in the auxiliary loss; 0 turns the loss off."""
    d_sae: int
    k: int | None
    """Features per token; None for activations without a fixed k."""
    lr: float
    seed: int
    tokens: int
    """Tokens seen in training so far."""
    split: Split
    """`train`: on the training stream; `held_out`: on text that no dictionary was trained on."""
    dead_window_tokens: int
    """A feature is dead if it fired on none of this many tokens: the last tokens of training, or all held-out
    tokens."""
    dead_fraction: float
    fvu: float | None
    """Fraction of variance unexplained; None if not measured."""
    l0: float | None
    """Mean number of active features per token; None if not measured."""
    cross_entropy_delta: float | None
    """Increase of the loss (nats per token) when the reconstruction is spliced in; None if not measured."""
    cross_entropy_delta_error: float | None
    """Standard error of `cross_entropy_delta` over sequences: covers the choice of text, not the seeds."""
    kl: float | None
    """KL(clean || spliced) of the next-token distributions, nats per token."""


@dataclass(frozen=True)
class RankedDeadFeatureRow(DeadFeatureRow):
    """A `DeadFeatureRow` with the rank of the activations (`07_layers_and_sites.csv`)."""

    effective_rank_fraction: float
    """Effective rank over width of the activations that the dictionary was trained on."""
    intrinsic_dimension_99: int
    """Directions that hold 99 % of their variance."""
    participation_ratio: float
    """(sum of eigenvalues)^2 / sum of their squares."""


@dataclass(frozen=True)
class DriftRow(DeadFeatureRow):
    """A `DeadFeatureRow` with the share of the weights in a subspace (`08_jumprelu_schedule.csv`)."""

    activation: str
    """`topk`, `jumprelu` ..."""
    initial_l0: float | None
    """Features per token at the start of training; None if the final value applies from the first step."""
    d_active: int
    """Dimensions of the active subspace of the next columns: `d_init`, or the `d_init` that ASI would use."""
    decoder_inside: float
    """Mean over features of the share of a decoder row's squared norm in the active subspace."""
    decoder_inside_p10: float
    """10 % quantile of this share over features."""
    decoder_inside_median: float
    decoder_inside_p90: float
    encoder_inside: float
    """The same mean for encoder columns."""
    encoder_inside_p10: float
    encoder_inside_median: float
    encoder_inside_p90: float


@dataclass(frozen=True)
class DictionaryRow(DeadFeatureRow):
    """A `DeadFeatureRow` of one kind of dictionary (`10_dictionaries.csv`)."""

    dictionary: str
    """Kind of dictionary, as in the figure."""
    activation: str
    """`topk`, `jumprelu` ..."""
