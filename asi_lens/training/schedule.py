"""The learning rate over a training."""

from __future__ import annotations


def lr_factor(step: int, n_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Factor on the learning rate in step `step` (from 0) of `n_steps`.

    Linear up over `warmup_steps` (1/w in the first step, 1 in the w-th), constant, linear down over the
    last `decay_fraction` of the steps, to 1/(decay steps) in the last. Either may be 0. Where both reach
    a step, the smaller factor holds.
    """
    up = (step + 1) / warmup_steps if warmup_steps else 1.0
    decay_steps = round(n_steps * decay_fraction)
    down = max(n_steps - step, 1) / decay_steps if decay_steps else 1.0
    return min(1.0, up, down)
