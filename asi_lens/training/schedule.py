"""Schedule of the learning rate."""

from __future__ import annotations


def lr_factor(step: int, n_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Return the factor on the learning rate in step `step` (from 0) of `n_steps`.

    The factor rises linearly over w = `warmup_steps` (1/w in the first step, 1 in the w-th), is constant, and
    falls linearly over the last `decay_fraction` of the steps, to 1/(decay steps) in the last step. Either
    may be 0. In steps of both, the smaller factor is used.
    """
    up = (step + 1) / warmup_steps if warmup_steps else 1.0
    decay_steps = round(n_steps * decay_fraction)
    down = max(n_steps - step, 1) / decay_steps if decay_steps else 1.0
    return min(1.0, up, down)
