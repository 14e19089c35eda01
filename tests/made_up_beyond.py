"""Made-up tables of the notebooks beyond the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from made_up_tables import row

from asi_lens.results.beyond_rows import DoseRow, InputRow, StartRow
from asi_lens.results.rows import frame

INPUTS = ("raw", "mean", "geometric median", "power 0.5", "power 0")
SITES = ("attn_out", "mlp_out")


def starts(dead: Callable[[str, float, float], float], layers: int = 6) -> pd.DataFrame:
    """`dead` by input, gamma and rank; gamma and rank vary independently over layers and sites."""
    rows = []
    for i, site in enumerate(SITES):
        for layer in range(layers):
            gamma, rank = 0.2 + 0.3 * layer, 0.3 + 0.1 * ((5 * layer + 3 * i) % 7)
            for name in INPUTS:
                left = gamma if name == "raw" else 0.0
                about = (site, layer, name, 512, 8, 0, left, rank, min(1.0, left / 3))
                rows.append(StartRow("m", "news", 4096, *about, dead(name, gamma, rank)))
    return frame(rows)


def inputs(silent: Callable[[str, str, float], float], **changes: Any) -> pd.DataFrame:
    """`silent` by input, start and rank, at four layers and two seeds; FVU 0.2, and 0.1 on white inputs."""
    rows = []
    for layer in range(4):
        for seed in (0, 1):
            rank = 0.4 + 0.1 * layer
            for name in INPUTS:
                for start in ("random", "ASI"):
                    about: dict[str, Any] = {"layer": layer, "seed": seed, "site": "attn_out"}
                    about |= {"input": name, "start": start, "gamma": 1.0, "effective_rank_fraction": rank}
                    about |= {"fvu": 0.1 if name == "power 0" else 0.2, **changes}
                    share = silent(name, start, rank)
                    rows.append(row(f"{start}, {name}", InputRow, dead_fraction=share, **about))
    return frame(rows)


SHAPES = ("power 1.5", "measured", "power 0.5", "power 0.25", "power 0", "flat head", "lifted tail")


def doses(silent: Callable[[float, int, float], float], others: int = 3) -> pd.DataFrame:
    """`silent` by effective rank, dimension of 99 % and participation ratio; two seeds a point."""
    ranks = [0.3, 0.5, 0.7, 0.85, 1.0, 0.52, 0.75, 0.4, 0.6, 0.8][: len(SHAPES) + others]
    heads = [5.0, 40.0, 20.0, 10.0, 64.0, 60.0, 30.0, 50.0, 15.0, 35.0]
    rows = []
    for i, (rank, head) in enumerate(zip(ranks, heads, strict=False)):
        shape = SHAPES[i] if i < len(SHAPES) else "other site"
        about: dict[str, Any] = {"layer": 3 if i < len(SHAPES) else 10 + i, "shape": shape, "width": 64}
        about |= {"effective_rank_fraction": rank, "participation_ratio": head}
        about |= {"intrinsic_dimension_99": round(64 * rank)}
        for seed, times in ((0, 1.1), (1, 0.9)):
            share = times * silent(rank, round(64 * rank), head)
            rows.append(row("random", DoseRow, seed=seed, dead_fraction=share, **about))
            rows.append(row("random", DoseRow, seed=seed, split="train", dead_fraction=rank, **about))
    return frame(rows)
