"""Answers of the notebook on doses: whether the spectrum is the cause, and which features are lost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.beyond_verdicts import predicts
from asi_lens.results.dictionary_verdicts import PLACE, RANKS
from asi_lens.results.judging import held_out, taken

OTHER = "other site"
"""`DoseRow.shape` of activations as they are."""


class Curve(NamedTuple):
    """A falling curve through points, and how far points lie from it (root mean squares, in shares).

    `inside` of the points that it was fitted to, `outside` of the other points, `mean_outside` of the other
    points from the mean of the fitted points: what a measure without information would reach.
    """

    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    inside: float
    outside: float
    mean_outside: float


def dose_points(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per (site, layer, shape): means over seeds of ranks over width, and of the silent share.

    Takes `DoseRow`s. The first place with a changed spectrum is the one of the doses (`dosed`).
    """
    measures = ["dead_fraction", *RANKS]
    held = held_out(table, [*PLACE, "shape"], [*measures, "width"])
    for name in ("intrinsic_dimension_99", "participation_ratio"):
        held = held.assign(**{name: held[name] / held.width})
    points = held.groupby([*PLACE, "shape"], sort=False)[measures].mean().reset_index()
    changed = points["shape"] != OTHER
    first = points.loc[changed, PLACE].iloc[0] if changed.any() else points[PLACE].iloc[0]
    return points.assign(changed=changed, dosed=changed & (points[PLACE] == first).all(axis=1))


def falling_curve(points: pd.DataFrame, measure: str) -> Curve:
    """Return the best falling curve through the doses (isotonic regression of the silent share on `measure`).

    Takes `dose_points`. Between its points the curve is a straight line, beyond its ends it is level.
    """
    doses = points[points.dosed].groupby(measure).dead_fraction.mean()
    x, y = doses.index.to_numpy(dtype=float), doses.to_numpy(dtype=float)
    n = len(y)
    # Isotonic regression as the minimax of means (Robertson, Wright and Dykstra 1988, theorem 1.4.4).
    means = [[y[min(i, j) : max(i, j) + 1].mean() for j in range(n)] for i in range(n)]
    fit = np.array([min(max(means[j][k] for k in range(i, n)) for j in range(i + 1)) for i in range(n)])
    rest = points[~points.dosed]

    def off(part: pd.DataFrame, told: Float[np.ndarray, " m"] | float) -> float:
        return float(np.sqrt(np.mean((part.dead_fraction - told) ** 2))) if len(part) else float("nan")

    doses_too = points[points.dosed]
    inside = off(doses_too, np.interp(doses_too[measure], x, fit))
    outside = off(rest, np.interp(rest[measure], x, fit))
    return Curve(x, fit, inside, outside, off(rest, float(doses_too.dead_fraction.mean())))


def dose_and_response(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer whether the spectrum alone changes how many features are silent, and which measure they follow.

    Takes `DoseRow`s of a random start; points are means over seeds. At each place with changed spectra, a
    measure of rank decides if the whole 95 % interval of Spearman's correlation with the silent share is
    below zero. Other points (other places, changed or as they are) lie on the curve of the doses if they are
    nearer to the falling curve through the doses than to the mean of the doses, in root mean square. The tail
    counts more than the head if the error of the effective rank is below that of the participation ratio.
    """
    points = dose_points(table)
    out = []
    for (site, layer), here in points[points.changed].groupby(PLACE, sort=False):
        for column, name in RANKS.items():
            question = (
                f"{site} {layer}: silent features follow the {name} where nothing but the spectrum changes"
            )
            out.append(predicts(question, here[column], here.dead_fraction, -1))
    rest = points[~points.dosed]
    known = points.dead_fraction.notna().all() and points.dead_fraction[points.dosed].nunique() > 1
    errors = {}
    for column, name in RANKS.items():
        question = f"other sites lie on the doses' curve of the {name}"
        if rest.empty or not known:
            why = "no other site was trained" if rest.empty else "nothing is silent, or a number is missing"
            out.append(AnswerRow(question, "not testable here", why))
            continue
        curve = falling_curve(points, column)
        errors[column] = curve.outside
        told = (
            f"root mean square {100 * curve.outside:.1f} points from the curve, "
            f"{100 * curve.mean_outside:.1f} from the doses' mean ({len(rest)} places and shapes); "
            f"doses {100 * curve.inside:.1f} from the curve"
        )
        out.append(AnswerRow(question, "yes" if curve.outside < curve.mean_outside else "no", told))
    question = "the tail (effective rank) tells more of other sites than the head (participation ratio)"
    if not errors:
        return [*out, AnswerRow(question, "not testable here", "there is no curve")]
    tail, head = errors["effective_rank_fraction"], errors["participation_ratio"]
    told = f"root mean square {100 * tail:.1f} against {100 * head:.1f} points"
    return [*out, AnswerRow(question, "yes" if tail < head else "no", told)]


def are_the_right_features_lost(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer what a dictionary finds of features that are known, from a random start and from ASI.

    Takes `KnownFeatureRow`s. A random start loses true features with the rank if in every seed it recovers
    fewer at the lowest than at the highest rank. The start decides if ASI recovers more at every rank below
    the highest, in every seed. Rare features are lost if at every rank and seed a random start recovers less
    of the rarest fifth than of the most frequent. Live features are true if at every rank, start and seed
    more than half of those that fire recover a true feature. Silent features cost true ones if the whole 95 %
    interval of Spearman's correlation over ranks and starts (means over seeds) is below zero.
    """
    keys = ["method", "r", "seed", "fifth"]
    table = taken(table, keys, ["recovered", "live_recovered", "silent"])
    whole = table[table.fifth.isna()]
    found = whole.pivot_table(index=["r", "seed"], columns="method", values="recovered", dropna=False)
    found = found.reindex(columns=["random", "ASI"])
    ranks = found.index.unique("r").sort_values()
    low, high = ranks[0], ranks[-1]
    below = found[found.index.get_level_values("r") < high]
    random = table[table.method == "random"].set_index(["r", "seed"])
    often, rare = (random.recovered[random.fifth == n] for n in (1, 5))
    points = whole.groupby(["method", "r"])[["silent", "recovered"]].mean()
    return [
        _compared(
            "random: the lower the rank, the fewer true features are recovered",
            found.random.xs(high, level="r"),
            found.random.xs(low, level="r"),
            (f"rank {high}", f"rank {low}"),
            untold="there is one rank" if low == high else "",
        ),
        _compared(
            "ASI recovers more true features than a random start",
            below.ASI,
            below.random,
            ("ASI", "random"),
        ),
        _compared("a random start loses the rare features", often, rare, ("most frequent fifth", "rarest")),
        _compared(
            "features that stay alive are true features",
            whole.live_recovered,
            pd.Series(0.5, index=whole.index),
            ("of live features", "asked for"),
        ),
        predicts(
            "the more features are silent, the fewer true ones are recovered",
            points.silent,
            points.recovered,
            -1,
        ),
    ]


def _compared(
    question: str, larger: pd.Series, smaller: pd.Series, names: tuple[str, str], *, untold: str = ""
) -> AnswerRow:
    """Answer whether `larger` exceeds `smaller` in every row."""
    smaller = smaller.reindex(larger.index)
    if untold or larger.empty or larger.isna().any() or smaller.isna().any():
        return AnswerRow(question, "not testable here", untold or "a number is missing")
    good = larger > smaller
    told = f"{names[0]} {100 * larger.mean():.0f} %, {names[1]} {100 * smaller.mean():.0f} %"
    told += f"; {int(good.sum())} of {len(good)} cases"
    return AnswerRow(question, "yes" if good.all() else "no", told)
