"""Answers of the notebook on rank and loss: a table in, answers out, by rules that the function states."""

from __future__ import annotations

import math

import pandas as pd

from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.judging import counted, rank_correlation, taken

_BASELINE = "baseline"
# 97.5 % points of Student's t with 1, 2, ... degrees of freedom. Beyond the last one the interval is a little
# wider than needed.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def rank_and_loss(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer whether a change to model or training raises attention's rank, and whether the loss follows.

    Takes `TrainedRankRow`s, of which the last measurement of every run counts, with ranks averaged over
    layers. A variant's rank is higher (its loss lower) than the baseline's if the whole 95 % interval of the
    mean difference between runs of the same seed is above (below) zero (Student's t). The loss follows if it
    is lower for every variant whose rank is higher. A higher rank predicts a lower loss if the whole 95 %
    interval of Spearman's correlation between the variants' mean differences, baseline included, is negative.
    Not testable: a variant with fewer than two seeds, or without the baseline's.
    """
    final = differences_to_baseline(table)
    out, raised, lowered, unknown = [], [], [], []
    for variant, rows in final.groupby("variant", sort=False):
        higher = _interval(f"{variant}: the rank of attention is higher", rows.rank_difference, 1)
        lower = _interval(f"{variant}: the loss is lower", rows.loss_difference, -1)
        out += [higher, lower]
        unknown += [variant] if "not testable here" in (higher.answer, lower.answer) else []
        raised += [variant] if higher.answer == "yes" else []
        lowered += [variant] if lower.answer == "yes" else []
    out.append(_any("some change raises the rank of attention", raised, unknown))
    question = "where the rank is higher, the loss is lower"
    if raised and not set(raised) & set(unknown):
        both = [name for name in raised if name in lowered]
        told = f"{len(both)} of {counted(len(raised), 'variant')}"
        told += f" ({', '.join(both)})" if both else ""
        out.append(AnswerRow(question, "yes" if both == raised else "no", told))
    else:
        out.append(AnswerRow(question, "not testable here", "no variant is known to have a higher rank"))
    known = final[~final.variant.isin(unknown)]
    means = known.groupby("variant", sort=False)[["rank_difference", "loss_difference"]].mean()
    points = pd.concat([means, pd.DataFrame(0.0, index=[_BASELINE], columns=means.columns)])
    question = "over all variants a higher rank goes with a lower loss"
    rho, low, high = rank_correlation(points.rank_difference, points.loss_difference)
    if math.isnan(rho):
        out.append(AnswerRow(question, "not testable here", "too few variants, or nothing differs"))
    else:
        told = f"Spearman {rho:.2f} ({low:.2f} to {high:.2f}) over {len(points)} variants"
        out.append(AnswerRow(question, "yes" if high < 0 else "no", told))
    return out


def differences_to_baseline(table: pd.DataFrame) -> pd.DataFrame:
    """Return `final_numbers` of all variants but the baseline, and their differences to the baseline.

    Further columns: rank_difference, loss_difference, less the baseline of the same seed; NaN where the
    baseline lacks the seed.
    """
    final = final_numbers(table)
    base = final[final.variant == _BASELINE].set_index("seed")
    others = final[final.variant != _BASELINE]
    differences = {
        f"{name}_difference": others[name] - others.seed.map(base[name]) for name in ("rank", "loss")
    }
    return others.assign(**differences)


def final_numbers(table: pd.DataFrame) -> pd.DataFrame:
    """Return variant, seed, loss and rank (mean over layers) of `TrainedRankRow`s at the end of each run."""
    measures = ["validation_loss", "effective_rank_fraction"]
    rows = taken(table, ["variant", "seed", "layer", "tokens", "n_tokens"], measures)
    last = rows[rows.tokens == rows.groupby(["variant", "seed"]).tokens.transform("max")]
    final = last.groupby(["variant", "seed"], sort=False)[measures].mean().reset_index()
    return final.rename(columns={"validation_loss": "loss", "effective_rank_fraction": "rank"})


def _interval(question: str, values: pd.Series, sign: int) -> AnswerRow:
    """Answer whether the whole 95 % interval of the mean of `values` is on the side of `sign`.

    If not, the numbers say whether it is on the other side or holds zero.
    """
    n = len(values)
    if n < 2 or values.isna().any():
        return AnswerRow(question, "not testable here", "fewer than two seeds, or no baseline of a seed")
    half = _T[min(n - 1, len(_T)) - 1] * values.sem()
    low, high = values.mean() - half, values.mean() + half
    side = 1 if low > 0 else -1 if high < 0 else 0
    word = {sign: "", 0: "; not decided", -sign: "; the opposite"}[side]
    told = f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f}) against the baseline; {n} seeds{word}"
    return AnswerRow(question, "yes" if side == sign else "no", told)


def _any(question: str, found: list[str], unknown: list[str]) -> AnswerRow:
    if found:
        return AnswerRow(question, "yes", ", ".join(found))
    if unknown:
        return AnswerRow(question, "not testable here", f"not known: {', '.join(unknown)}")
    return AnswerRow(question, "no", "none")
