"""Answers of the notebook on starts: what a start must have to do what ASI does."""

from __future__ import annotations

import pandas as pd

from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.beyond_verdicts import predicts
from asi_lens.results.judging import held_out

_WHO = ["method", "seed"]


def what_a_start_must_have(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer whether the subspace is what a start needs, then for each start whether it does what ASI does.

    Takes `TriedStartRow`s of one site. The subspace decides if the whole 95 % interval of Spearman's
    correlation over starts (means over seeds), between the share of the decoder inside at the start and the
    silent share on held-out text, is below zero. Rows of a random start move in if, in every seed, the share
    inside is larger at the end than at the start, of encoder and decoder. Then the answers of
    `starts_against_asi`.
    """
    inside = [f"{side}_inside_{when}" for side in ("decoder", "encoder") for when in ("start", "end")]
    held = held_out(table, _WHO, ["dead_fraction", *inside])
    means = held.groupby("method", sort=False)[["dead_fraction", *inside]].mean()
    subspace = "the more of a start lies inside the subspace, the fewer features are silent"
    return [
        predicts(subspace, means.decoder_inside_start, means.dead_fraction, -1),
        _moves_in(held[held.method == "random"]),
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
    held = held_out(table, _WHO, ["dead_fraction", "fvu"]).set_index(_WHO)
    silent, fvu = (held[column].unstack("method", sort=False) for column in ("dead_fraction", "fvu"))
    out = []
    for method in [name for name in silent if name != "ASI"]:
        question, pair = f"{method} does what ASI does", [method, "ASI"]
        if "ASI" not in silent or silent[pair].isna().any(axis=None) or fvu[pair].isna().any(axis=None):
            out.append(AnswerRow(question, "not testable here", "ASI or a number is missing"))
            continue
        good = (silent[method] <= silent.ASI) & (fvu[method] <= fvu.ASI)
        told = (
            f"silent {100 * silent[method].mean():.1f} against {100 * silent.ASI.mean():.1f} %, FVU "
            f"{fvu[method].mean():.3f} against {fvu.ASI.mean():.3f}; {int(good.sum())} of {len(good)} seeds"
        )
        out.append(AnswerRow(question, "yes" if good.all() else "no", told))
    return out
