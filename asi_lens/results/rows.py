"""What a notebook leaves: the rows of every table.

They are checked, written and read by `tables`; where and how they were made is in `provenance`, what they say
about the paper's claims in `claims`.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal

from asi_lens.results.tables import Row, columns, frame, read_rows, write_rows

__all__ = [
    "LOSSES",
    "VARIANTS",
    "DeadFeatureRow",
    "DictionaryRow",
    "DriftRow",
    "HeadOverlapRow",
    "LossRow",
    "OutputProjectionRow",
    "RankRow",
    "RankedDeadFeatureRow",
    "Row",
    "SpectrumRow",
    "columns",
    "frame",
    "read_rows",
    "write_rows",
]

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
"""Rows of the W_O ablation, in the order in which its figure tells them (paper, C4 and C5)."""
LOSSES: tuple[str, ...] = ("cross_entropy_delta", "cross_entropy_delta_error", "kl")
"""Columns of what the language model loses, and so names of `sae.splice.SpliceLosses`."""


@dataclass(frozen=True)
class RankRow(Row):
    """Rank measures of the centered activations of one site at one layer (`01_rank_curves.csv`)."""

    model: str
    """Name the model was loaded by."""
    corpus: str
    """Name of the text."""
    site: str
    """`attn_out`, `mlp_out`, `resid_post`, `z`, or a full hook name."""
    layer: int
    """Layer, from 0."""
    d: int
    """Width of the site."""
    n_tokens: int
    """Tokens in the covariance."""
    effective_rank: float
    """exp of the entropy (nats) of singular values over their sum (Roy & Vetterli 2007)."""
    effective_rank_fraction: float
    """`effective_rank / d`."""
    intrinsic_dimension_99: int
    """Directions that hold 99 % of the variance."""
    participation_ratio: float
    """(sum of eigenvalues)^2 / sum of their squares."""
    stable_rank: float
    """Sum of eigenvalues / the largest."""


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
    """Place in descending order, from 1."""
    index_fraction: float
    """`index / d`."""
    relative_singular_value: float
    """s_i / s_1."""


@dataclass(frozen=True)
class LossRow(Row):
    """Cross-entropy with a site kept on a subspace only (`02_downstream_loss.csv`)."""

    model: str
    corpus: str
    n_tokens: int
    """Tokens whose next-token loss was averaged."""
    site: str
    layer: int
    subspace: Subspace
    """`principal`: the top directions of the covariance; `random`: as many random ones."""
    seed: int | None
    """Seed of the random subspace; none for the principal one."""
    rank: int
    """Directions kept; the rest stays at the mean."""
    rank_fraction: float
    """`rank / d`."""
    cross_entropy: float
    """Nats per token with the site truncated."""
    cross_entropy_clean: float
    """Nats per token of the untouched model."""
    cross_entropy_mean_ablated: float
    """Nats per token with the site at its mean."""
    loss_recovered: float | None
    """(mean ablated - truncated) / (mean ablated - clean); none where the ablation costs nothing."""


@dataclass(frozen=True)
class OutputProjectionRow(Row):
    """Effective rank of what a layer's attention writes, under one change (`03_wo_ablation.csv`)."""

    model: str
    corpus: str
    n_tokens: int
    layer: int
    variant: Variant
    """What is measured or changed; see `VARIANTS`."""
    seed: int | None
    """Seed of the draw; none where nothing is drawn."""
    effective_rank_fraction: float
    """Effective rank over d_model (over the width of z for `z`)."""


@dataclass(frozen=True)
class HeadOverlapRow(Row):
    """Principal angles between the output subspaces of two heads (`03_head_overlap.csv`)."""

    model: str
    corpus: str | None
    """Text behind the subspaces; none where they come from the weights alone."""
    n_tokens: int | None
    layer: int
    head_a: int
    head_b: int
    mean_cosine: float
    """Mean cosine of the principal angles, 0 (orthogonal) to 1 (the same subspace)."""
    largest_cosine: float
    """Cosine of the smallest principal angle."""
    covariance_cosine: float
    """Cosine between the covariances of what the two heads write: overlap weighed by use."""
    random_mean_cosine: float
    """`mean_cosine` of two random subspaces of the same size."""


@dataclass(frozen=True)
class DeadFeatureRow(Row):
    """One moment in the training of one dictionary (`04_dead_feature_curves.csv` and later)."""

    model: str
    corpus: str
    site: str
    layer: int
    method: str
    """Name of the recipe, as the figure's legend has it."""
    init: str
    """`random`, `orthogonal`, `asi` ..."""
    d_init: int | None
    """Dimensions of the active subspace; none where the initialization has none."""
    optimizer: str
    aux_k: int
    """Dead features in the auxiliary loss; 0 is off."""
    d_sae: int
    k: int | None
    """Features per token; none for activations without a fixed k."""
    lr: float
    seed: int
    tokens: int
    """Tokens seen in training so far."""
    split: Split
    """`train`: on the training stream; `held_out`: on text that no dictionary was trained on."""
    dead_window_tokens: int
    """A feature is dead that fired on none of so many tokens: the last ones of training, or all held-out
    ones."""
    dead_fraction: float
    fvu: float | None
    """Fraction of variance unexplained; none where it was not measured."""
    l0: float | None
    """Mean number of active features per token; none where it was not measured."""
    cross_entropy_delta: float | None
    """Nats per token that splicing in the reconstruction costs; none where it was not measured."""
    cross_entropy_delta_error: float | None
    """Its standard error over sequences; which text was taken is in it, seeds of the dictionary are not."""
    kl: float | None
    """KL(clean || spliced) of the next-token distributions, nats per token."""


@dataclass(frozen=True)
class RankedDeadFeatureRow(DeadFeatureRow):
    """A `DeadFeatureRow` beside the rank of the activations (`07_layers_and_sites.csv`)."""

    effective_rank_fraction: float
    """Effective rank over width of the activations that the dictionary was trained on."""


@dataclass(frozen=True)
class DriftRow(DeadFeatureRow):
    """A `DeadFeatureRow` beside where the rows of the weights lie (`08_jumprelu_schedule.csv`)."""

    activation: str
    """`topk`, `jumprelu` ..."""
    initial_l0: float | None
    """Features per token that training began at; none for the aim from the first step."""
    d_active: int
    """Dimensions of the subspace that the next columns are about: `d_init`, or what it would have been."""
    decoder_inside: float
    """Mean over features of the share of a decoder row's squared norm in the active subspace."""
    decoder_inside_p10: float
    """Its 10 % quantile over features."""
    decoder_inside_median: float
    decoder_inside_p90: float
    encoder_inside: float
    """The same of encoder columns."""
    encoder_inside_p10: float
    encoder_inside_median: float
    encoder_inside_p90: float


@dataclass(frozen=True)
class DictionaryRow(DeadFeatureRow):
    """A `DeadFeatureRow` of one kind of dictionary (`10_dictionaries.csv`)."""

    dictionary: str
    """Kind, as the figure names it."""
    activation: str
    """`topk`, `jumprelu` ..."""
