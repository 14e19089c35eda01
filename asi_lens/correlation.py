"""Spearman's rank correlation of a few points, with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from asi_lens.errors import require


def rank_correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation, and a 95 % percentile interval from 2,000 resamplings of the points.

    NaN for fewer than 3 points, and where `x` or `y` does not vary; draws in which one of them does not are
    left out. Raises OptionError for unequal numbers.
    """
    require(len(x) == len(y), "x and y", f"{len(x)} and {len(y)} values", "equally many")
    points = pd.DataFrame({"x": list(x), "y": list(y)})
    if len(points) < 3:
        return math.nan, math.nan, math.nan
    generator = np.random.default_rng(seed)
    draws = [_spearman(points.iloc[generator.integers(0, len(points), len(points))]) for _ in range(2_000)]
    low, high = np.nanquantile(draws, [0.025, 0.975]) if not np.isnan(draws).all() else (math.nan, math.nan)
    return _spearman(points), float(low), float(high)


def _spearman(points: pd.DataFrame) -> float:
    ranks = points.rank()
    if (ranks.nunique() < 2).any():
        return math.nan
    return float(np.corrcoef(ranks.x, ranks.y)[0, 1])
