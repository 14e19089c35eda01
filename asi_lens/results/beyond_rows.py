"""Row types of the tables of notebooks beyond the paper, and of a diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asi_lens.results.rows import DeadFeatureRow
from asi_lens.results.tables import Row

Library = Literal["SAELens", "sparsify", "asi_lens"]


@dataclass(frozen=True)
class StartRow(Row):
    """Features that never fire at a random start, for one treatment of the inputs (`15_starts.csv`)."""

    model: str
    corpus: str
    n_tokens: int
    """Tokens that features could fire on."""
    site: str
    layer: int
    input: str
    """`raw`, `mean`, `geometric median` (what is subtracted), or `power 0.5` ... (of the spectrum)."""
    d_sae: int
    k: int
    seed: int
    gamma: float
    """|mean| / |sigma| of these inputs."""
    effective_rank_fraction: float
    """Of the raw activations."""
    predicted: float
    """Share that never fires, predicted from gamma (arXiv 2605.31518)."""
    dead: float
    """Measured share that never fires."""


@dataclass(frozen=True)
class InputRow(DeadFeatureRow):
    """A `DeadFeatureRow` of one treatment of the inputs and one start (`15_centering_or_subspace.csv`)."""

    input: str
    """As in `StartRow`."""
    start: str
    """`random` or `ASI`."""
    gamma: float
    """Of the raw activations."""
    effective_rank_fraction: float
    """Of the raw activations."""


@dataclass(frozen=True)
class DiagnosisRow(Row):
    """What to expect of a dictionary at one site, and what to do (`diagnosis.csv`)."""

    model: str
    corpus: str
    n_tokens: int
    site: str
    layer: int
    d: int
    n_left_out: int
    effective_rank_fraction: float
    intrinsic_dimension_99: int
    gamma: float
    """|mean| / |sigma| of the raw activations."""
    d_sae: int
    k: int
    n_rows: int
    """Tokens that the shares below are of."""
    predicted: float
    """Share of a random start that never fires on raw inputs, predicted from gamma."""
    dead_raw: float
    """The same, measured."""
    dead_centered: float
    """Measured with the mean subtracted."""
    center: Literal["needed", "harmless"]
    start: str
    """`asi` or `random`."""
    d_init: int | None
    d_sae_advised: int
    """`d_sae`, or the largest of its halves at which at most 1 % of the advised start never fire."""
    dead_advised: float
    """Share of the advised start that never fires at that size, measured on centered inputs."""
    reason: str


@dataclass(frozen=True)
class AnswerRow(Row):
    """An answer of a notebook beyond the paper, by a rule that its verdict function states."""

    question: str
    answer: Literal["yes", "no", "not testable here"]
    numbers: str
    """Numbers that decide, in words."""


@dataclass(frozen=True)
class DoseRow(DeadFeatureRow):
    """A `DeadFeatureRow` of activations with a changed spectrum (`17_dose_response.csv`)."""

    shape: str
    """`measured`, `power 0.5` ..., `flat head`, `lifted tail`; `other site` for activations as they are."""
    effective_rank_fraction: float
    """Effective rank over width of the activations that the dictionary was trained on."""
    intrinsic_dimension_99: int
    """Directions that hold 99 % of their variance."""
    participation_ratio: float
    """(sum of eigenvalues)^2 / sum of their squares."""
    width: int
    """Width of the site."""


@dataclass(frozen=True)
class KnownFeatureRow(Row):
    """True features that a dictionary recovers, where they are known (`17_known_features.csv`).

    A true feature is recovered if the decoder row that a one-to-one assignment gives it has a cosine of
    0.9 or more with it.
    """

    model: str
    """`known features`: activations are made up of them."""
    corpus: str
    """`rank 32`, ...: the subspace that holds all of them."""
    n_tokens: int
    """Rows that the dictionary was trained on."""
    width: int
    r: int
    """Dimensions of the subspace."""
    effective_rank_fraction: float
    method: str
    d_init: int | None
    d_sae: int
    k: int
    lr: float
    seed: int
    """Of the true features, their firings, and the dictionary."""
    fifth: int | None
    """1 (most frequent) to 5 (rarest) true features; None for all."""
    n_features: int
    """True features of the group."""
    frequency: float
    """Mean share of rows on which they are active."""
    matched: float
    """Mean cosine of true features with their decoder rows."""
    recovered: float
    """Share of the true features that is recovered."""
    live_recovered: float | None
    """Share of the dictionary's features that fire on held-out rows and recover one; None for a fifth."""
    silent: float | None
    """Share of the dictionary's features without a firing on held-out rows; None for a fifth."""
    fvu: float | None
    """On held-out rows; None for a fifth."""


@dataclass(frozen=True)
class TriedStartRow(DeadFeatureRow):
    """A `DeadFeatureRow` of one start (`18_starts.csv`), with numbers of the whole run in every row.

    Shares are means over features of the squared norm of a row inside the top directions of the training data
    (as many as ASI takes by itself). For whitened inputs they are of the rows in whitened coordinates.
    """

    encoder_norm: float
    """Mean norm of the encoder rows that training begins with (decoder rows have norm 1)."""
    decoder_inside_start: float
    """After the first step."""
    decoder_inside_end: float
    encoder_inside_start: float
    """After the first step."""
    encoder_inside_end: float
    train_seconds: float
    """Time spent in training steps, as the run recorded it, on the machine that trained it. Times of two runs
    compare only where they were trained in one call: what is cached may come from another machine."""


@dataclass(frozen=True)
class EncoderStepRow(DeadFeatureRow):
    """A `DeadFeatureRow` of one first norm and one rate of the encoder's rows (`23_encoder_steps.csv`)."""

    overshoot: float
    """Factor on the first norm with the smallest first error."""
    encoder_lr: float
    """Factor on the learning rate of the encoder's rows."""
    encoder_norm: float
    """Mean norm of the encoder rows that training begins with (decoder rows have norm 1)."""


@dataclass(frozen=True)
class LastStepRow(Row):
    """Encoder rows around the last firing of features that die (`16_last_steps.csv`).

    Means over the features that fired and are dead at the end of a run, and over those that are alive then,
    at the same logged rows.
    """

    model: str
    corpus: str
    site: str
    layer: int
    method: str
    optimizer: str
    lr: float
    d_sae: int
    k: int
    seed: int
    n_tokens: int
    """Training tokens of the whole run."""
    dead_window_tokens: int
    group: Literal["died", "alive"]
    n_features: int
    tokens: int
    """Tokens after the first logged row that had seen the last firing; negative before it."""
    bias: float | None
    norm: float | None
    mean_cosine: float | None
    """Cosine with the mean that is subtracted from the input."""


@dataclass(frozen=True)
class SavedFeatureRow(Row):
    """A feature of an ASI dictionary, looked at on held-out text (`14_features.csv`)."""

    model: str
    corpus: str
    n_tokens: int
    """Held-out tokens."""
    site: str
    layer: int
    d_sae: int
    k: int
    seed: int
    pair: int
    """A feature that ASI saved, and one as frequent that is alive either way, have the same number."""
    group: Literal["saved by ASI", "alive either way"]
    feature: int
    firings: int
    entropy: float
    """Of the tokens on which it fires, bits."""
    information: float
    """Entropy of as many tokens drawn at random, less `entropy`, bits."""
    loss_increase: float | None
    """Next-token loss without the feature, nats per firing; None if it does not fire on the loss tokens."""


@dataclass(frozen=True)
class LifeRow(Row):
    """Lives of the features of one run at one logged row (`16_when_features_die.csv`).

    Shares are of the features of the row's group. Dead: without a firing in the last `dead_window_tokens`.
    What depends on the window is None until it is full.
    """

    model: str
    corpus: str
    site: str
    layer: int
    method: str
    init: str
    """`random`, `asi`, ..."""
    optimizer: str
    d_sae: int
    k: int
    lr: float
    seed: int
    tenth: int | None
    """1 (least) to 10 (most): features by the share of their encoder row in the tail before the first step;
    None for all features."""
    tail_share: float
    """Mean share in the tail of the group's rows, before the first step."""
    n_features: int
    """Features of the group."""
    tokens: int
    """Training tokens up to this row."""
    n_tokens: int
    """Training tokens of the whole run."""
    dead_window_tokens: int
    fires_later: float
    """Share that fires after this row; up to the last window of the run this is the survival curve."""
    never_fired: float
    """Share without a firing so far."""
    dead: float | None
    died: float | None
    """Share that is dead and fired before."""
    once_dead: float | None
    """Share that is dead, or was dead at an earlier logged row."""
    came_back: float | None
    """Share that was dead at an earlier logged row and is not dead."""


@dataclass(frozen=True)
class ReleasedRow(Row):
    """A dictionary that was trained elsewhere, on text of ours (`22_released_dictionaries.csv`)."""

    dictionary: str
    """Folder or hub name."""
    library: Library
    """Whose format it has."""
    model: str
    corpus: str
    site: str
    layer: int
    width: int
    d_sae: int
    activation: str
    """`topk`, `jumprelu` ..."""
    k: int | None
    """Features per token; None for activations without a fixed k."""
    start: str | None
    """`random`, `asi` ...; None where the folder does not say."""
    trained_on: str | None
    """Text that it was trained on, where the folder says so; so the next two."""
    trained_context: int | None
    trained_bos: bool | None
    """Whether its sequences began with the BOS token; ours do."""
    n_tokens: int
    """Tokens behind the ranks and `dead_fraction`."""
    dead_fraction: float
    """Share of features that fired on none of `n_tokens`."""
    n_tokens_held_out: int
    """Tokens behind the next three."""
    silent_fraction: float
    """Share of features that fired on none of them."""
    fvu: float
    l0: float
    effective_rank_fraction: float
    """Effective rank over width of the site."""
    intrinsic_dimension_99: int
    """Directions that hold 99 % of its variance."""
    participation_ratio: float
    """(sum of eigenvalues)^2 / sum of their squares."""
