"""Made-up tables of claims C6 to C12: what a test is about in arguments, the rest as if it did not matter."""

from __future__ import annotations

import dataclasses
from typing import Any

import pandas as pd
from made_up_tables import END, row

from asi_lens.results.judging import Verdict
from asi_lens.results.rows import DeadFeatureRow, DriftRow, PairedLossRow, RankedDeadFeatureRow, frame

WINDOW = 400
SEEDS = (0, 1, 2)


def holds(verdict: Verdict | None) -> Any:
    assert verdict is not None
    return verdict.holds


def told(verdict: Verdict | None) -> dict[str, str]:
    assert verdict is not None
    return {number.name: number.text for number in verdict.numbers}


@dataclasses.dataclass(frozen=True)
class End:
    """How a run ends; a lower number is a better one."""

    dead: float = 0.2
    silent: float = 0.3
    fvu: float = 0.4
    kl: float = 0.2
    delta: float = 0.5


RANDOM, ASI = End(), End(0.02, 0.03, 0.3, 0.1, 0.3)


def runs(ends: dict[str, list[End]]) -> pd.DataFrame:
    """Runs by method, an End per seed. Earlier moments and the other window say the opposite."""
    rows: list[DeadFeatureRow] = []
    for method, of_seeds in ends.items():
        for seed, end in enumerate(of_seeds):
            none = {"cross_entropy_delta": None, "cross_entropy_delta_error": None, "kl": None}
            train: dict[str, Any] = {"seed": seed, "split": "train", **none}
            for tokens, window in ((END // 2, WINDOW), (END, 100), (END, WINDOW)):
                dead = end.dead if (tokens, window) == (END, WINDOW) else 1 - end.dead
                about = {"tokens": tokens, "dead_window_tokens": window, "dead_fraction": dead, "fvu": 9.0}
                rows.append(row(method, **about, **train))
            held = {
                "dead_fraction": end.silent,
                "fvu": end.fvu,
                "kl": end.kl,
                "cross_entropy_delta": end.delta,
            }
            rows.append(row(method, seed=seed, cross_entropy_delta_error=0.01, **held))
    return frame(rows)


def changed(seeds: int, part: str, ours: End, theirs: End) -> list[End]:
    """`ours` of every seed; in the first `seeds` of them `part` is as in `theirs`, and a little worse."""
    worse = dataclasses.replace(ours, **{part: 1.1 * getattr(theirs, part)})
    return [worse if seed < seeds else ours for seed in SEEDS]


def sizes(random: dict[int, list[float]], asi: dict[int, list[float]]) -> pd.DataFrame:
    """Silent share by size and seed."""
    return frame(
        [
            row(method, d_sae=size, seed=seed, dead_fraction=silent)
            for method, of_sizes in (("random", random), ("ASI", asi))
            for size, of_seeds in of_sizes.items()
            for seed, silent in enumerate(of_seeds)
        ]
    )


def sweep(curve: dict[int, tuple[float, float]], auto: int = 24, site: str = "attn_out") -> pd.DataFrame:
    """Two layers of one mean, so that the means over layers and seeds are those of `curve`."""
    rows = []
    for layer, shift in ((1, -0.01), (3, 0.01)):
        about: dict[str, Any] = {"site": site, "layer": layer}
        rows.append(row("random", dead_fraction=0.4 + 5 * shift, fvu=0.5, **about))
        rows.append(row("ASI, automatic d_init", d_init=auto, dead_fraction=0.2, fvu=0.45, **about))
        for d_init, (silent, fvu) in curve.items():
            rows.append(row("ASI", d_init=d_init, dead_fraction=silent + shift, fvu=fvu, **about))
    return frame(rows)


def points(dead: list[float]) -> pd.DataFrame:
    """The random start's silent share at ranks 0.1, 0.2 ... of two sites, two seeds of that mean."""
    rows = []
    for i, silent in enumerate([*dead, *dead]):
        rank = 0.1 * (i + 1)
        about: dict[str, Any] = {"site": ("attn_out", "mlp_out")[i // len(dead)], "layer": i % len(dead)}
        about |= {"kind": RankedDeadFeatureRow, "effective_rank_fraction": rank}
        about |= {"intrinsic_dimension_99": 10 * (i + 1), "participation_ratio": 9.0}
        for seed, times in ((0, 1.5), (1, 0.5)):
            rows.append(row("random", seed=seed, dead_fraction=times * silent, **about))
            rows.append(row("random", seed=seed, dead_fraction=rank, split="train", **about))
            rows.append(row("ASI", seed=seed, dead_fraction=rank, **about))
    return frame(rows)


def gains(**silent: tuple[list[float], list[float]]) -> pd.DataFrame:
    """Silent shares of the random start and of ASI by site: a number a layer."""
    return frame(
        [
            row(method, site=site, layer=layer, dead_fraction=share)
            for site, both in silent.items()
            for method, shares in zip(("random", "ASI"), both, strict=True)
            for layer, share in enumerate(shares)
        ]
    )


def drift(seeds: int = 0, part: str = "") -> pd.DataFrame:
    """Gains of 0.2 from a low l0 and 0.05 from a high one, from which features drift out of the subspace.

    The first `seeds` keep their gain, or do not drift, as `part` says.
    """
    sides = [f"{side}_inside{q}" for side in ("decoder", "encoder") for q in ("", "_p10", "_median", "_p90")]
    rows = []
    for seed in SEEDS:
        fails = part if seed < seeds else ""
        for method, silent, inside in (
            ("random, low l0", 0.4, 0.3),
            ("random, high l0", 0.3, 0.3),
            ("ASI, low l0", 0.2, 0.9),
            ("ASI, high l0", 0.15 if fails == "gain" else 0.25, 0.95 if fails == "drift" else 0.4),
        ):
            about: dict[str, Any] = {**dict.fromkeys(sides, 0.5), "decoder_inside": inside}
            about |= {"activation": "jumprelu", "initial_l0": None, "d_active": 8}
            rows.append(row(method, DriftRow, seed=seed, dead_fraction=silent, **about))
    return frame(rows)


def paired(differences: list[tuple[float, float]], error: float = 0.01) -> pd.DataFrame:
    """ASI minus random, (KL, loss) of each seed; another method says the opposite."""
    rows = []
    for seed, (kl, loss) in enumerate(differences):
        for method, sign in (("ASI", 1), ("random + AuxK", -1)):
            rows.append(
                PairedLossRow(
                    model="m",
                    corpus="news",
                    n_tokens=256,
                    n_sequences=8,
                    places="attn_out 3",
                    n_places=1,
                    method=method,
                    reference="random",
                    seed=seed,
                    cross_entropy_delta=0.1,
                    cross_entropy_difference=sign * loss,
                    cross_entropy_error=error,
                    kl=0.2,
                    kl_difference=sign * kl,
                    kl_error=error,
                )
            )
    return frame(rows)
