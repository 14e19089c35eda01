"""Made-up tables of the notebook on stability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from made_up_tables import row

from asi_lens.results.rows import frame
from asi_lens.results.stability_rows import OverlapRow, SeedMatchRow, TransferRow


def overlaps(kernel: Callable[[str, int], float], layers: int = 4) -> pd.DataFrame:
    """`kernel` by what differs and layer; two other texts; random subspaces have 0.25, give or take 0.01."""
    rows = []
    for against, other in (("half", "news"), ("text", "code"), ("text", "speech"), ("layer", "layer 2")):
        for layer in range(layers):
            if against == "layer" and layer == 2:
                continue
            values: dict[str, Any] = {"model": "m", "corpus": "news", "n_tokens": 4096, "site": "attn_out"}
            values |= {"layer": layer, "against": against, "other": other, "width": 64, "r": 16}
            values |= {"mean_cosine": 0.5, "kernel": kernel(against, layer), "random_kernel": 0.25}
            values |= {"random_deviation": 0.01, "captured": 0.6, "captured_by_its_own": 0.8}
            rows.append(OverlapRow(**values))
    return frame(rows)


def transfer(fvu: Callable[[str, str, int], float], texts: tuple[str, ...] = ("code",)) -> pd.DataFrame:
    """`fvu` by text (`news` is that of training), inputs and seed; two methods, two seeds."""
    rows = []
    for method in ("random", "ASI"):
        for seed in (0, 1):
            for text in ("news", *texts):
                for inputs in ("as they are", "its own mean", "rotated")[: 1 if text == "news" else 3]:
                    about: dict[str, Any] = {"seed": seed, "text": text, "inputs": inputs}
                    rows.append(row(method, TransferRow, fvu=fvu(text, inputs, seed), **about))
    return frame(rows)


def matches(
    matched: Callable[[str, int, int], float], methods: tuple[str, ...] = ("random", "ASI"), gap: float = 1e-3
) -> pd.DataFrame:
    """`matched` by method, tokens (0 or 1000) and the number of the pair; three pairs of seeds."""
    rows = []
    for method in methods:
        for tokens in (0, 1000):
            for i, (seed, other) in enumerate(((0, 1), (0, 2), (1, 2))):
                values: dict[str, Any] = {"model": "m", "corpus": "news", "site": "attn_out", "layer": 3}
                values |= {"method": method, "d_sae": 64, "k": 8, "seed": seed, "other_seed": other}
                share = matched(method, tokens, i)
                values |= {"tokens": tokens, "matched": share, "gap": gap, "best": share + 0.01}
                values |= {"alike": share / 2, "alive": 0.5, "matched_alive": share if tokens else None}
                rows.append(SeedMatchRow(**values))
    return frame(rows)
