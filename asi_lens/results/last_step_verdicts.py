"""Answers on the last steps before death, and on death by learning rate and optimizer."""

from __future__ import annotations

import pandas as pd

from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.judging import taken

_CASE = ["optimizer", "lr", "seed"]


def last_steps(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer what encoder rows do before features die, beside rows of live features at the same time.

    Takes `LastStepRow`s. A number (bias, norm, the cosine's absolute value) falls behind if its change from
    the first point to the last firing is smaller in features that die than in live features, in every case of
    optimizer, learning rate and seed.
    """
    table = taken(table, [*_CASE, "group", "tokens"], ["bias", "norm", "mean_cosine", "n_features"])
    # A case in which nothing fired and died says nothing.
    some = table[(table.group == "died") & (table.n_features > 0)][_CASE].drop_duplicates()
    table = table.merge(some, on=_CASE)
    table = table.assign(mean_cosine=table.mean_cosine.abs())
    questions = {
        "bias": "before features die, their encoder bias falls behind that of live features",
        "norm": "before features die, their encoder row falls behind in norm",
        "mean_cosine": "before features die, their encoder row turns less towards the mean",
    }
    return [_falls(question, table, column) for column, question in questions.items()]


def _falls(question: str, table: pd.DataFrame, column: str) -> AnswerRow:
    if table.empty:
        return AnswerRow(question, "not testable here", "no feature fired and died")
    first = table[table.tokens == table.groupby(_CASE).tokens.transform("min")]
    last = table[table.tokens == 0]
    change = (
        last.set_index([*_CASE, "group"])[column] - first.set_index([*_CASE, "group"])[column]
    ).unstack()
    change = change.reindex(columns=["died", "alive"])
    if change.isna().any(axis=None):
        return AnswerRow(question, "not testable here", "a number is missing")
    good = change.died < change.alive
    told = f"change {change.died.mean():+.3g}, of live features {change.alive.mean():+.3g}; "
    told += f"{int(good.sum())} of {len(good)} cases"
    return AnswerRow(question, "yes" if good.all() else "no", told)


def death_by_rate(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer, for each optimizer, whether more features die at a higher learning rate.

    Takes `LifeRow`s of random starts. "yes" if in every seed the dead share at the end rises from each rate
    to the next; not testable with one rate, or where nothing is dead.
    """
    table = taken(table, [*_CASE, "tenth", "tokens", "n_tokens"], ["dead"])
    ends = table[table.tenth.isna() & (table.tokens == table.n_tokens)]
    out = []
    for optimizer, rows in ends.groupby("optimizer", sort=False):
        dead = rows.pivot_table(index="seed", columns="lr", values="dead", dropna=False)
        question = f"{optimizer}: the higher the learning rate, the more features are dead"
        if dead.shape[1] < 2 or dead.isna().any(axis=None) or not dead.any(axis=None):
            out.append(
                AnswerRow(question, "not testable here", "one rate, nothing dead, or a missing number")
            )
            continue
        good = (dead.diff(axis=1).iloc[:, 1:] > 0).all(axis=1)
        told = ", ".join(f"{100 * share:.2f} % at {rate:g}" for rate, share in dead.mean().items())
        told += f"; {int(good.sum())} of {len(good)} seeds"
        out.append(AnswerRow(question, "yes" if good.all() else "no", told))
    return out
