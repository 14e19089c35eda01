"""What methods cost the language model, by paired differences on the same text (claim C7)."""

from __future__ import annotations

import pandas as pd

from asi_lens.results.judging import Found, Number, UntestedError, by_seed, claim, graded, spreads, taken


@claim(
    "C7",
    "ASI takes less from the language model, with the dictionaries of several layers in their places",
    "lower delta LM loss",
)
def c7_spliced(paired: pd.DataFrame) -> Found:
    """C7, its loss alone: dictionaries from ASI cost the language model less (a figure).

    Takes `PairedLossRow`s. Holds if in every seed both KL and loss are lower than those of the random start
    on the same text, by two standard errors of the paired difference; partly, if only the KL is, in every
    seed. Does not hold if the KL is higher by as much in every seed; a difference within its error says
    nothing either way.
    """
    own = paired_differences(paired)
    kl, loss = (below(own, name).to_frame() for name in ("kl", "cross_entropy"))
    holds = graded(kl, loss) or (False if above(own, "kl").all() else None)
    return by_seed(told_differences(own), holds, own)


_DIFFERENCES = [f"{name}_{what}" for name in ("kl", "cross_entropy") for what in ("difference", "error")]


def paired_differences(paired: pd.DataFrame) -> pd.DataFrame:
    """Return the differences of ASI from the random start, a row per seed."""
    rows = taken(paired, ["method", "reference", "seed"], _DIFFERENCES)
    rows = rows[(rows.method == "ASI") & (rows.reference == "random")]
    if rows.empty:
        raise UntestedError
    return rows.set_index("seed")[_DIFFERENCES].sort_index()


def below(own: pd.DataFrame, name: str) -> pd.Series:
    """Return, per seed, whether the difference in `name` is below zero by two standard errors."""
    return own[f"{name}_difference"] + 2 * own[f"{name}_error"] < 0


def above(own: pd.DataFrame, name: str) -> pd.Series:
    """Return, per seed, whether the difference in `name` is above zero by two standard errors."""
    return own[f"{name}_difference"] - 2 * own[f"{name}_error"] > 0


def told_differences(own: pd.DataFrame) -> list[Number]:
    """Return the differences in KL and loss, and the largest of their standard errors."""
    told = {"kl": "KL, ASI minus random", "cross_entropy": "loss, ASI minus random"}
    return spreads(
        {
            f"{words} (paired, ± {own[f'{name}_error'].max():.2g})": own[f"{name}_difference"]
            for name, words in told.items()
        }
    )
