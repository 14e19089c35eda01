"""Made-up tables of the notebooks beyond the paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
from made_up_tables import row

from asi_lens.results.beyond_rows import (
    DoseRow,
    EncoderStepRow,
    InputRow,
    KnownFeatureRow,
    LastStepRow,
    LifeRow,
    ReleasedRow,
    StartRow,
    TriedStartRow,
)
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
    """`silent` by input, start and rank, at six layers and two seeds; FVU 0.2, and 0.1 on white inputs."""
    rows = []
    for layer in range(6):
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


LIVES = {
    "random": ("random", "adam"),
    "random + sparse Adam": ("random", "sparse_adam"),
    "ASI": ("asi", "adam"),
    "ASI + sparse Adam": ("asi", "sparse_adam"),
}


def lives(
    never: Callable[[str, int], float],
    died: Callable[[str, int], float],
    early: float = 0.75,
    back: float = 0.1,
    slope: float = 1.0,
    seeds: int = 2,
) -> pd.DataFrame:
    """Features that never fire, and that fire and die, by method and seed; 1,000 tokens, a window of 200.

    `early` is the share of the latter that fires last before token 400, `back` the share that comes back.
    From the first tenth to the last, deaths rise by `slope` times their mean.
    """
    rows = []
    for method, (init, optimizer) in LIVES.items():
        for seed in range(seeds):
            for tenth in (None, *range(1, 11)) if init == "random" else (None,):
                times = 1 + slope * ((tenth or 5.5) - 5.5) / 9
                lost, later = times * never(method, seed), times * died(method, seed)
                for tokens in range(100, 1001, 100):
                    gone = later * (early * min(1, tokens / 400) + (1 - early) * max(0, tokens - 400) / 400)
                    about: dict[str, Any] = {"method": method, "init": init, "optimizer": optimizer}
                    about |= {"seed": seed, "tenth": tenth, "tail_share": 0.1 * (tenth or 5)}
                    fates: dict[str, Any] = dict.fromkeys(("dead", "died", "once_dead", "came_back"))
                    if tokens >= 200:
                        dead = lost + later * (tokens == 1000)
                        fates = {
                            "dead": dead,
                            "died": dead - lost,
                            "once_dead": dead + back,
                            "came_back": back,
                        }
                    rows.append(
                        LifeRow(
                            model="m",
                            corpus="news",
                            site="attn_out",
                            layer=3,
                            d_sae=64,
                            k=8,
                            lr=1e-3,
                            n_features=64 if tenth is None else 6,
                            tokens=tokens,
                            n_tokens=1000,
                            dead_window_tokens=200,
                            fires_later=max(0.0, 1 - lost - gone),
                            never_fired=lost,
                            **about,
                            **fates,
                        )
                    )
    return frame(rows)


def released(
    dead: list[float], *, d_sae: int = 512, start: str | None = None, **changes: Any
) -> pd.DataFrame:
    """A dictionary at ranks 0.1, 0.2 ... of two sites, with these dead shares, and a tenth of them."""
    rows = []
    for i, share in enumerate([*dead, *(0.1 * one for one in dead)]):
        about: dict[str, Any] = {"site": ("attn_out", "mlp_out")[i // len(dead)], "layer": i % len(dead)}
        about |= {"effective_rank_fraction": 0.1 * (i + 1), "intrinsic_dimension_99": 10 * (i + 1)}
        about |= {"participation_ratio": 9.0, "dictionary": f"folder/{i}", "library": "SAELens"}
        about |= {"model": "m", "corpus": "news", "width": 64, "d_sae": d_sae, "activation": "topk", "k": 8}
        about |= {"start": start, "trained_on": "pile", "trained_context": 128, "trained_bos": True}
        about |= {"n_tokens": 4096, "dead_fraction": share, "n_tokens_held_out": 512, "fvu": 0.2, "l0": 8.0}
        rows.append(ReleasedRow(**{**about, "silent_fraction": min(1.0, 2 * share), **changes}))
    return frame(rows)


def tried(ends: dict[str, tuple[float, float, float]], seeds: int = 2, moved: float = 0.1) -> pd.DataFrame:
    """By method: share inside at the start, silent share, FVU. Rows move in by `moved`, the encoder twice."""
    rows = []
    for method, (inside, silent, fvu) in ends.items():
        for seed in range(seeds):
            about: dict[str, Any] = {"seed": seed, "fvu": fvu, "dead_fraction": silent + 0.01 * seed}
            about |= {"decoder_inside_start": inside, "decoder_inside_end": inside + moved}
            about |= {"encoder_inside_start": inside, "encoder_inside_end": inside + 2 * moved}
            about |= {"encoder_norm": 0.5 + 0.1 * seed, "train_seconds": 5.0 + seed}
            rows.append(row(method, TriedStartRow, **about))
            wrong = {
                **about,
                "dead_fraction": 1 - silent,
                "fvu": 9.0,
                "cross_entropy_delta": None,
                "kl": None,
            }
            rows.append(row(method, TriedStartRow, split="train", **wrong))
    return frame(rows)


CELLS = ((1.0, 1.0), (1.0, 0.5), (2.0, 2.0), (2.0, 1.0))
"""First norm and rate of the encoder: as they are, half the turn, twice the norm at one turn, and both."""


def encoder_steps(
    ends: Callable[[str, float, float, float], tuple[float, float]],
    cells: tuple[tuple[float, float], ...] = CELLS,
    seeds: int = 2,
) -> pd.DataFrame:
    """`ends` (silent share, FVU) by method, rate, first norm and rate of the encoder, at two rates."""
    rows = []
    for seed in range(seeds):
        for method in ("random", "ASI"):
            for lr in (1e-3, 2e-3):
                for overshoot, encoder_lr in cells:
                    silent, fvu = ends(method, lr, overshoot, encoder_lr)
                    about: dict[str, Any] = {"lr": lr, "overshoot": overshoot, "encoder_lr": encoder_lr}
                    about |= {"encoder_norm": overshoot / 2, "seed": seed, "fvu": fvu}
                    rows.append(row(method, EncoderStepRow, **about, dead_fraction=silent + 0.001 * seed))
                    wrong = {**about, "dead_fraction": 1 - silent, "fvu": 9.0}
                    rows.append(row(method, EncoderStepRow, split="train", **wrong))
    return frame(rows)


def known(
    recovered: Callable[[str, int, int | None], float],
    silent: Callable[[str, int], float] = lambda method, r: 0.1,
    live: float = 0.8,
    seeds: int = 2,
) -> pd.DataFrame:
    """`recovered` by method, rank and fifth (None: all), `silent` by method and rank; ranks 8, 16, 32."""
    rows = []
    for r in (8, 16, 32):
        for seed in range(seeds):
            for method in ("random", "ASI"):
                for fifth in (None, 1, 2, 3, 4, 5):
                    about: dict[str, Any] = {
                        "model": "m",
                        "corpus": f"rank {r}",
                        "n_tokens": 999,
                        "width": 32,
                    }
                    about |= {"r": r, "effective_rank_fraction": r / 40, "method": method, "d_init": None}
                    about |= {"d_sae": 64, "k": 4, "lr": 1e-3, "seed": seed, "fifth": fifth}
                    about |= {"n_features": 64 if fifth is None else 13, "frequency": 0.1, "matched": 0.7}
                    whole = {"live_recovered": live, "silent": silent(method, r) + 0.01 * seed, "fvu": 0.2}
                    own = whole if fifth is None else dict.fromkeys(whole)
                    share = recovered(method, r, fifth)
                    rows.append(KnownFeatureRow(**about, recovered=share, **own))  # type: ignore[arg-type]
    return frame(rows)


def steps(
    change: Callable[[str, str, float, int], float], died: Callable[[str, float, int], int] = lambda *_: 9
) -> pd.DataFrame:
    """Bias, norm and |cosine| rise by `change` (group, optimizer, lr, seed) until the last firing; 2 x 2 x 2
    cases. Without features that `died`, numbers are missing."""
    rows = []
    for optimizer in ("adam", "sparse_adam"):
        for lr in (1e-3, 2e-3):
            for seed in (0, 1):
                for group in ("died", "alive"):
                    for tokens in (-200, -100, 0, 100):
                        n = died(optimizer, lr, seed)
                        up = change(group, optimizer, lr, seed) * (tokens + 200) / 200
                        about: dict[str, Any] = {
                            "model": "m",
                            "corpus": "news",
                            "site": "attn_out",
                            "layer": 3,
                        }
                        about |= {"method": "random", "optimizer": optimizer, "lr": lr, "seed": seed}
                        about |= {"d_sae": 64, "k": 8, "n_tokens": 1000, "dead_window_tokens": 200}
                        about |= {
                            "group": group,
                            "n_features": n if group == "died" else 50,
                            "tokens": tokens,
                        }
                        values = {"bias": up, "norm": 2 + up, "mean_cosine": -0.5 - up}
                        known = values if n else dict.fromkeys(values)
                        rows.append(LastStepRow(**about, **known))
    return frame(rows)
