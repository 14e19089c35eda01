"""Options of sparsity in training.

The main loss is the same for all kinds: squared error, also of nested prefixes of the dictionary if
`prefixes` is given (Matryoshka, Bussmann et al. 2025). If the activation function itself does not limit the
number of features, a penalty aims at `k` features per token. The file of each kind in `kinds` defines its
penalty. Penalties have d_out as a factor because the main loss is d_out times a fraction of the variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_known, require_whole

PENALTIES = ("l0", "tanh")


@checked
@dataclass(frozen=True)
class SparsityConfig:
    """Options of training beyond TopK. Raises OptionError or UnknownNameError for invalid values.

    Attributes:
        coefficient: weight of the penalty (the first value, for a steered coefficient).
        warmup_steps: steps over which the weight rises linearly to its full value.
        penalty: penalty of JumpReLU, one of `PENALTIES`.
        initial_l0: first target in features per token, annealed linearly down to the dictionary's k; None is
            k from the first step.
        anneal_fraction: share of the steps over which the target is annealed.
        bandwidth: width of JumpReLU's kernel, in units of normalized activations.
        threshold_lr: factor on the learning rate of JumpReLU's thresholds. Thresholds are numbers around 1 in
            these units, and Adam moves a weight by about the learning rate in a step, so without the factor
            they would lag behind an annealed l0.
        prefixes: sizes of the nested dictionaries below the whole one, ascending; empty without Matryoshka.
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
        require_known([self.penalty], PENALTIES, "penalty")
        require(0 <= self.anneal_fraction <= 1, "anneal_fraction", self.anneal_fraction, "from 0 to 1")
        sizes = list(self.prefixes)
        ascending = sizes == sorted(set(sizes)) and all(size >= 1 for size in sizes)
        require(ascending, "prefixes", sizes, "whole numbers of at least 1, ascending")
        object.__setattr__(self, "prefixes", tuple(sizes))
