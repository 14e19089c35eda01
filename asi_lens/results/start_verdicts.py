"""Answers of the notebook on starts: what a start must have to do what ASI does."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.beyond_verdicts import has_fewer, predicts
from asi_lens.results.judging import held_out

_WHO = ["method", "seed"]
# Question, and the start that should have fewer silent features than the other. Aligned rows have norm 1.
_NORMS = (
    ("norm 1 saves features that the best first norm loses, from random", "random, aligned", "random"),
    ("norm 1 saves features that the best first norm loses, from ASI", "ASI, aligned", "ASI"),
    ("the subspace saves features at norm 1, too", "ASI, aligned", "random, aligned"),
)


def what_a_start_must_have(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer whether the subspace is what a start needs, then for each start whether it does what ASI does.

    Takes `TriedStartRow`s of one site. The subspace decides if the whole 95 % interval of Spearman's
    correlation over starts (means over seeds), between the share of the decoder inside at the start and the
    silent share on held-out text, is below zero. Rows of a random start move in if, in every seed, the share
    inside is larger at the end than at the start, of encoder and decoder. A start saves features that another
    loses if it leaves fewer silent in every seed; both FVU stand beside. Then the answers of
    `starts_against_asi`.
    """
    inside = [f"{side}_inside_{when}" for side in ("decoder", "encoder") for when in ("start", "end")]
    held = held_out(table, _WHO, ["dead_fraction", *inside])
    means = held.groupby("method", sort=False)[["dead_fraction", *inside]].mean()
    starts = _by_start(table)
    subspace = "the more of a start lies inside the subspace, the fewer features are silent"
    return [
        predicts(subspace, means.decoder_inside_start, means.dead_fraction, -1),
        _moves_in(held[held.method == "random"]),
        *(_beside(question, starts, *pair, fewer_alone=True) for question, *pair in _NORMS),
        *starts_against_asi(table),
    ]


def _moves_in(random: pd.DataFrame) -> AnswerRow:
    question = "rows of a random start move into the subspace in training"
    before, after = (
        random[[f"{side}_inside_{when}" for side in ("decoder", "encoder")]] for when in ("start", "end")
    )
    if random.empty or before.isna().any(axis=None) or after.isna().any(axis=None):
        return AnswerRow(question, "not testable here", "no random start, or a share is missing")
    good = (after.to_numpy() > before.to_numpy()).all(axis=1)
    told = [
        f"{side} {100 * random[f'{side}_inside_start'].mean():.0f} to "
        f"{100 * random[f'{side}_inside_end'].mean():.0f} % inside"
        for side in ("decoder", "encoder")
    ]
    told.append(f"{int(good.sum())} of {len(good)} seeds")
    return AnswerRow(question, "yes" if good.all() else "no", "; ".join(told))


def starts_against_asi(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer for each start whether it does what ASI does.

    Takes `DeadFeatureRow`s of one site. A start does if in every seed it has at most as many silent features
    on held-out text as ASI, at an FVU that is not higher.
    """
    starts = _by_start(table)
    return [_beside(f"{name} does what ASI does", starts, name, "ASI") for name in starts if name != "ASI"]


def _by_start(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return silent share and FVU on held-out text of every start, a row for each seed of the table."""
    measures = ["dead_fraction", "fvu"]
    wide = held_out(table, _WHO, measures).set_index(_WHO)[measures].unstack("method", sort=False)
    return {name: wide.xs(name, axis=1, level="method") for name in wide.columns.unique("method")}


def _beside(
    question: str, starts: Mapping[str, pd.DataFrame], one: str, other: str, *, fewer_alone: bool = False
) -> AnswerRow:
    """Answer with yes if in every seed start `one` has no more silent features than `other` at no higher FVU,
    or, with `fewer_alone`, has fewer at any FVU."""
    pair = [starts[name] for name in (one, other) if name in starts]
    if len(pair) < 2 or any(part.isna().any(axis=None) for part in pair):
        return AnswerRow(question, "not testable here", f"{one}, {other} or a number is missing")
    ours, theirs = pair
    good = has_fewer(ours, theirs, fvu=not fewer_alone, strict=fewer_alone)
    told = (
        f"silent {100 * ours.dead_fraction.mean():.1f} against {100 * theirs.dead_fraction.mean():.1f} %, "
        f"FVU {ours.fvu.mean():.3f} against {theirs.fvu.mean():.3f}; {int(good.sum())} of {len(good)} seeds"
    )
    return AnswerRow(question, "yes" if good.all() else "no", told)
