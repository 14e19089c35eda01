"""Spearman's rank correlation of a few points, with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from asi_lens.base.errors import require

Values: TypeAlias = pd.Series | np.ndarray | Sequence[float | int]


def rank_correlation(x: Values, y: Values, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation, and a 95 % percentile interval from 2,000 resamplings of the points.

    NaN for fewer than 3 points, and where `x` or `y` does not vary; draws in which one of them does not are
    left out. Raises OptionError for unequal numbers.
    """
    require(len(x) == len(y), "x and y", f"{len(x)} and {len(y)} values", "equally many")
    points = np.stack([np.asarray(x, dtype=float), np.asarray(y, dtype=float)])
    n = points.shape[1]
    if n < 3:
        return math.nan, math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(0, n, (2_000, n))
    draws = _spearman(points[0][chosen], points[1][chosen])
    found = float(_spearman(points[:1], points[1:])[0])
    if math.isnan(found):
        return found, found, found
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return found, float(low), float(high)


def _spearman(x: Float[np.ndarray, "rows n"], y: Float[np.ndarray, "rows n"]) -> Float[np.ndarray, " rows"]:
    """Correlation of the ranks, row by row; NaN for a row that does not vary."""
    ranks = [pd.DataFrame(part).rank(axis=1).to_numpy() for part in (x, y)]
    a, b = (part - part.mean(1, keepdims=True) for part in ranks)
    norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norms, out=np.full(len(norms), np.nan), where=norms > 0)
