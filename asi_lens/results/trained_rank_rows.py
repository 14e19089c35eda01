"""Row type of the notebook on rank and loss."""

from __future__ import annotations

from dataclasses import dataclass

from asi_lens.results.tables import Row


@dataclass(frozen=True)
class TrainedRankRow(Row):
    """A layer of a small transformer at one moment of its training (`21_rank_and_loss.csv`)."""

    model: str
    """Sizes in words."""
    corpus: str
    n_tokens: int
    """Training tokens of the whole run."""
    variant: str
    """`baseline`, or the one thing that differs from it."""
    seed: int
    layer: int
    tokens: int
    """Training tokens so far: 0 at the start."""
    validation_loss: float
    """Of the whole model on held-out text, nats per token; the same in all layers."""
    effective_rank_fraction: float
    """Effective rank over the width of the attention output, on held-out text."""
    z_effective_rank_fraction: float
    """The same of the heads' outputs before W_O."""
    head_overlap: float
    """Mean cosine of the principal angles between the heads' output subspaces, over pairs of heads."""
    n_left_out: int
    """Held-out tokens with massive activations, which are not in the ranks."""
    n_parameters: int
    n_trained: int
    """Parameters that training updates: fewer where W_O is frozen."""
    d_model: int
    d_mlp: int
    """Hidden width of the MLP: it pays for a gate."""
    vocab: int
    context: int
    lr: float
    weight_decay: float
