"""Options of how dictionaries are kept sparse in training.

The main loss is the same for all kinds: squared error, for nested prefixes of the dictionary if `prefixes`
says so (Matryoshka, Bussmann et al. 2025). A penalty on top aims at `k` features a token where the activation
function itself does not see to it. What each kind adds is in its file of `kinds`. Penalties have d_out as a
factor since the main loss, too, is d_out times a fraction of the variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from asi_lens.base.errors import require, require_whole, unknown_name

PENALTIES = ("l0", "tanh")


@dataclass(frozen=True)
class SparsityConfig:
    """Options of training beyond TopK. Raises OptionError or UnknownNameError for values that cannot be.

    Attributes:
        coefficient: weight of the penalty (its first value where it is steered).
        warmup_steps: steps over which it rises linearly.
        penalty: of JumpReLU, one of `PENALTIES`.
        initial_l0: features a token that the target begins at, annealed linearly down to the dictionary's
            k; None is k from the first step.
        anneal_fraction: share of the steps that takes.
        bandwidth: of JumpReLU's kernel, in units of normalized activations.
        threshold_lr: factor on the learning rate of JumpReLU's thresholds. They are numbers around 1 in those
            units, on which Adam moves weights by the learning rate in a step: an l0 that is annealed would
            wait for them.
        prefixes: sizes of the nested dictionaries below the whole one, ascending; none is no Matryoshka.
    """

    coefficient: float | int = 1.0
    warmup_steps: int = 0
    penalty: str = "l0"
    initial_l0: float | int | None = None
    anneal_fraction: float | int = 0.5
    bandwidth: float | int = 0.1
    threshold_lr: float | int = 10.0
    prefixes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("coefficient", "bandwidth", "threshold_lr"):
            value = getattr(self, key)
            require(math.isfinite(value) and value > 0, key, value, "above 0")
        require_whole("warmup_steps", self.warmup_steps, 0)
        if self.penalty not in PENALTIES:
            raise unknown_name("penalty", self.penalty, PENALTIES)
        require(0 <= self.anneal_fraction <= 1, "anneal_fraction", self.anneal_fraction, "from 0 to 1")
        sizes = list(self.prefixes)
        ascending = sizes == sorted(set(sizes)) and all(size >= 1 for size in sizes)
        require(ascending, "prefixes", sizes, "whole numbers of at least 1, ascending")
        object.__setattr__(self, "prefixes", tuple(sizes))
