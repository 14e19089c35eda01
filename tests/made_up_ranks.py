"""Made-up tables of the notebooks on ranks, as their CSVs hold them."""

from __future__ import annotations

import pandas as pd

from asi_lens.results.rows import (
    VARIANTS,
    HeadOverlapRow,
    LossRow,
    OutputProjectionRow,
    RankRow,
    SpectrumRow,
    frame,
)

SITES = ("attn_out", "mlp_out", "resid_post", "z")
LEVEL = {"attn_out": 0.5, "mlp_out": 0.8, "resid_post": 0.7, "z": 0.75}


def ranks(
    models: tuple[str, ...] = ("m",),
    corpora: tuple[str, ...] = ("news",),
    n_tokens: tuple[int, ...] = (4096,),
) -> pd.DataFrame:
    rows = [
        RankRow(m, c, s, layer, 64, n, 64 * value, value, 40, 9.0, 3.0)
        for m in models
        for i, c in enumerate(corpora)
        for n in n_tokens
        for s in SITES
        for layer in range(6)
        for value in [LEVEL[s] - 0.1 * i + 0.01 * layer]
    ]
    return frame(rows)


def spectra(layers: tuple[int, ...] = (0, 3), models: tuple[str, ...] = ("m",)) -> pd.DataFrame:
    rows = [
        SpectrumRow(m, "news", s, layer, 4, 4096, i, i / 4, 10.0 ** (1 - i))
        for m in models
        for s in SITES
        for layer in layers
        for i in range(1, 5)
    ]
    return frame(rows)


def losses(lowest: float = 0.0) -> pd.DataFrame:
    rows = [
        LossRow("m", "news", 512, s, layer, kind, seed, r, r / 64, 3.0, 3.0, 4.0, value)
        for s in SITES[:3]
        for layer in (0, 2)
        for kind, seed in (("principal", None), ("random", 7))
        for r, value in ((8, lowest), (32, 0.5 + 0.1 * layer), (64, 1.0))
    ]
    return frame(rows)


def projections(variants: tuple[str, ...] = VARIANTS) -> pd.DataFrame:
    rows = [
        OutputProjectionRow("m", "news", 4096, layer, v, seed, 0.4 + 0.01 * layer + 0.1 * seed)
        for layer in range(3)
        for v in variants
        for seed in (0, 1)
    ]
    return frame(rows)


def overlaps(n_heads: int = 3, layers: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    rows = [
        HeadOverlapRow("m", "news", 4096, layer, a, b, 1.0 if a == b else (a + b) / 10, 0.9, 0.2, 0.33)
        for layer in layers
        for a in range(n_heads)
        for b in range(a, n_heads)
    ]
    return frame(rows)
