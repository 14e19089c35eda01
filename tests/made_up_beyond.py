"""Made-up tables of the notebooks beyond the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from made_up_tables import row

from asi_lens.results.rows import InputRow, StartRow, frame

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
