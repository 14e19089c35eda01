"""Tables of trained dictionaries with numbers that are made up, for the tests of figures."""

from __future__ import annotations

from typing import Any

import pandas as pd

from asi_lens.results.rows import DeadFeatureRow, RankedDeadFeatureRow, frame

# Method: init, d_init, optimizer, aux_k, percent dead.
METHODS: dict[str, tuple[str, int | None, str, int, float]] = {
    "random": ("random", None, "adam", 0, 40.0),
    "random + AuxK": ("random", None, "adam", 32, 10.0),
    "ASI": ("asi", 16, "adam", 0, 2.0),
    "ASI + sparse Adam": ("asi", 16, "sparse_adam", 0, 1.0),
    "ASI, automatic d_init": ("asi", 24, "adam", 0, 1.5),
}
PAPERS = tuple(METHODS)[:4]
SEEDS = (0, 1, 2)
END = 1000


def row(method: str, kind: type[DeadFeatureRow] = DeadFeatureRow, **changed: Any) -> DeadFeatureRow:
    init, d_init, optimizer, aux_k, percent = METHODS.get(method, METHODS["ASI"])
    values: dict[str, Any] = {"model": "m", "corpus": "news", "site": "attn_out", "layer": 3, "seed": 0}
    values |= {"method": method, "init": init, "d_init": d_init, "optimizer": optimizer, "aux_k": aux_k}
    values |= {"d_sae": 64, "k": 8, "lr": 1e-3, "tokens": END, "split": "held_out", "l0": 8.0, "fvu": 0.3}
    values |= {"dead_window_tokens": 4096, "dead_fraction": percent / 100, "cross_entropy_delta": 0.1}
    values |= {"cross_entropy_delta_error": 0.01, "kl": 0.2}
    return kind(**{**values, **changed})


def curves(
    methods: tuple[str, ...] = PAPERS,
    windows: tuple[int, ...] = (100, 400, 2000),
    seeds: tuple[int, ...] = SEEDS,
) -> pd.DataFrame:
    """Seed s has s percent more dead; by 100 tokens twice as many are dead as by others."""
    rows = []
    for method in methods:
        for seed in seeds:
            dead = (METHODS.get(method, METHODS["ASI"])[4] + seed) / 100
            for tokens in range(200, END + 1, 200):
                fvu = 50.0 if tokens == 200 else 0.3 + 0.01 * seed
                for window in windows:
                    share = 0.0 if tokens < window else dead * (2 if window == 100 else 1)
                    changed = {"tokens": tokens, "dead_window_tokens": window, "dead_fraction": share}
                    rows.append(
                        row(method, seed=seed, split="train", fvu=fvu, cross_entropy_delta=None, **changed)
                    )
            rows.append(row(method, seed=seed, dead_fraction=dead, cross_entropy_delta=0.1 + 0.01 * seed))
    return frame(rows)


def sweep(methods: tuple[str, ...] = ("random", "ASI", "ASI, automatic d_init")) -> pd.DataFrame:
    rows = []
    for i, site in enumerate(("attn_out", "mlp_out")):
        for layer in (1, 3):
            about = {"site": site, "layer": layer}
            percent = 40 / (1 + i) + layer
            rows.append(row("random", dead_fraction=percent / 100, fvu=0.5 + 0.1 * i, **about))
            for d_init in (8, 16, 32):
                dead = (d_init + 10 * layer) / 1000
                rows.append(row("ASI", d_init=d_init, dead_fraction=dead, fvu=0.2 + 0.1 * i, **about))
            rows.append(row("ASI, automatic d_init", d_init=20 + layer, dead_fraction=0.01, **about))
    return frame([one for one in rows if one.method in methods])


def sizes() -> pd.DataFrame:
    rows = []
    for method in PAPERS:
        for d_sae in (64, 128, 256):
            for seed in SEEDS[:2]:
                about = {"d_sae": d_sae, "seed": seed}
                # The smallest dictionaries have one window more.
                for window in (100, 400, *((1000,) if d_sae == 64 else ())):
                    for tokens, dead in ((END // 2, 0.9), (END, d_sae / 1000 + 0.01 * seed)):
                        changed = {"split": "train", "dead_window_tokens": window, "tokens": tokens}
                        rows.append(
                            row(method, dead_fraction=dead, cross_entropy_delta=None, **changed, **about)
                        )
                rows.append(row(method, **about))
    return frame(rows)


def rates() -> pd.DataFrame:
    """A method's share of dead features grows with the learning rate."""
    rows = []
    for method in PAPERS:
        for lr in (2e-4, 1e-3):
            dead = METHODS[method][4] * lr * 10
            for seed in SEEDS[:2]:
                about: dict[str, Any] = {"lr": lr, "seed": seed, "dead_fraction": dead}
                changed = {"split": "train", "dead_window_tokens": 400, "cross_entropy_delta": None}
                rows += [row(method, **changed, **about), row(method, **about)]
    return frame(rows)


def ranked(methods: tuple[str, ...] = ("random", "ASI")) -> pd.DataFrame:
    rows = [
        row(
            method,
            RankedDeadFeatureRow,
            site=site,
            layer=layer,
            seed=seed,
            dead_fraction=(base + layer + seed) / (100 if method == "random" else 10_000),
            effective_rank_fraction=rank + 0.01 * layer,
            intrinsic_dimension_99=30 + layer,
            participation_ratio=9.0,
        )
        for site, rank, base in (("attn_out", 0.5, 35), ("resid_post", 0.8, 3))
        for layer in (1, 3)
        for method in methods
        for seed in (0, 2)
    ]
    return frame(rows)
