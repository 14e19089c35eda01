"""Options of `Trainer`, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_known, require_whole

OPTIMIZERS = ("adam", "sparse_adam", "sparse_adam_decay")
"""Names of optimizers; `sae.optim` describes how each treats rows that did not fire."""
KERNELS = ("auto", "triton", "plain")
"""Ways to compute a step; `sae.kernel_step` says what `triton` needs."""


@checked
@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. Raises OptionError or UnknownNameError for invalid values.

    Attributes:
        lr: largest learning rate of Adam (betas 0.9 and 0.999, eps 1e-8).
        batch_size: tokens per step.
        n_tokens: total number of tokens; the last batch may be smaller.
        optimizer: `adam`, `sparse_adam` (rows of features that did not fire are not updated) or
            `sparse_adam_decay` (the moments of these rows decay); see `optim`.
        warmup_steps: steps over which the learning rate rises linearly.
        decay_fraction: share of the steps, at the end, over which the learning rate falls linearly.
        aux_k: number of dead features that reconstruct the residual (AuxK, Gao et al. 2024); 0 is off,
            "auto" is d_out // 2.
        aux_weight: weight of the AuxK loss.
        clip_norm: largest L2 norm of the gradients of all four parameters together (the decoder's without
            its parallel part, loss summed over d_in); larger gradients are scaled down. None is off.
        seed: seed of the order of the data (the dictionary's own seed draws its weights).
        dead_window: tokens without a firing after which a feature counts as dead, in `StepOutput` and
            for AuxK.
        compute_dtype: dtype of the encoder's product: "float32", "bfloat16", or "auto" (bfloat16 if the
            machine is fast in it). All else is float32; a float64 dictionary computes in float64.
        encoder_lr: factor on the learning rate of the encoder's rows (of a Lorsa the rows that read).
            Below 1 fewer features die (`23_encoder_steps`).
        kernels: arithmetic of a step: `triton` (the project's GPU kernels), `plain` (PyTorch), or `auto`
            (`triton` on a GPU where that is possible). A checkpoint is continued by the same arithmetic.
    """

    lr: float = 8e-4
    batch_size: int = 2048
    n_tokens: int = 4_000_000
    optimizer: str = "adam"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    aux_k: int | str = 0
    aux_weight: float = 1 / 32
    clip_norm: float | None = None
    seed: int = 0
    dead_window: int = 500_000
    compute_dtype: str = "auto"
    kernels: str = "auto"
    encoder_lr: float = 1.0

    def __post_init__(self) -> None:
        for key in ("lr", "encoder_lr"):
            rate = getattr(self, key)
            require(_finite(rate) and rate > 0, key, rate, "above 0")
        least = {"batch_size": 1, "n_tokens": 1, "warmup_steps": 0, "seed": 0, "dead_window": 1}
        for key, minimum in least.items():
            require_whole(key, getattr(self, key), minimum)
        require_known([self.optimizer], OPTIMIZERS, "optimizer")
        share = _finite(self.decay_fraction) and 0 <= self.decay_fraction <= 1
        require(share, "decay_fraction", self.decay_fraction, "from 0 to 1")
        aux = self.aux_k == "auto" or (_whole(self.aux_k) and int(self.aux_k) >= 0)
        require(aux, "aux_k", self.aux_k, "'auto' or a whole number of at least 0")
        require(
            _finite(self.aux_weight) and self.aux_weight >= 0, "aux_weight", self.aux_weight, "at least 0"
        )
        clip = self.clip_norm is None or (_finite(self.clip_norm) and self.clip_norm > 0)
        require(clip, "clip_norm", self.clip_norm, "None or above 0")
        dtypes = ("auto", "float32", "bfloat16")
        require(self.compute_dtype in dtypes, "compute_dtype", self.compute_dtype, " or ".join(dtypes))
        require_known([self.kernels], KERNELS, "kernels")

    def as_dict(self) -> dict[str, Any]:
        """Return the options as JSON values, `kernels` and `encoder_lr` only if they are not the default."""
        values = asdict(self)
        for key in ("kernels", "encoder_lr"):  # files from before these options are without
            if values[key] == self.__dataclass_fields__[key].default:
                del values[key]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build the configuration from `values`. Raises UnknownNameError for an unknown key."""
        require_known(values, cls.__dataclass_fields__, "TrainConfig key")
        return cls(**values)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
