"""Made-up tables of the notebook on rank and loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from asi_lens.results.rows import frame
from asi_lens.results.trained_rank_rows import TrainedRankRow

Value = Callable[[str, int], float]
NAMES = ("baseline", "gate", "muon", "frozen", "decay", "heads")


def trained_ranks(
    rank: Value, loss: Value, names: Sequence[str] = NAMES, seeds: Sequence[int] = (0, 1, 2)
) -> pd.DataFrame:
    """`rank` (mean over two layers) and `loss` at the end by variant and seed; a start and an end."""
    rows = []
    for variant in names:
        for seed in seeds:
            for tokens in (0, 500, 1000):
                for layer in (0, 1):
                    values: dict[str, Any] = {"model": "m", "corpus": "news", "n_tokens": 1000}
                    values |= {"variant": variant, "seed": seed, "layer": layer, "tokens": tokens}
                    shift = 0.1 * (layer - 0.5)
                    values |= {"effective_rank_fraction": (rank(variant, seed) if tokens else 0.9) + shift}
                    values |= {"validation_loss": loss(variant, seed) if tokens == 1000 else 7.0}
                    values |= {"z_effective_rank_fraction": 0.8, "head_overlap": 0.4, "n_left_out": 0}
                    values |= {"n_parameters": 900, "n_trained": 900, "d_model": 32, "d_mlp": 40}
                    values |= {"vocab": 30, "context": 16, "lr": 0.002, "weight_decay": 0.1}
                    rows.append(TrainedRankRow(**values))
    return frame(rows)
