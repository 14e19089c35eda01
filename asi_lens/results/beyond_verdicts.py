"""Answers of the notebooks beyond the paper: one function per notebook, tables in, answers out.

An answer is "yes" or "no" by the rule that the function states; "not testable here" where the table has too
few points, or where nothing varies.
"""

from __future__ import annotations

import math

import pandas as pd

from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.dictionary_verdicts import PLACE
from asi_lens.results.judging import held_out, rank_correlation, taken


def centering_or_subspace(starts: pd.DataFrame, trained: pd.DataFrame) -> list[AnswerRow]:
    """Answer what kills features: the mean (arXiv 2605.31518) or the rank (arXiv 2508.16929).

    Takes `StartRow`s and `InputRow`s. A measure predicts death if the whole 95 % interval of Spearman's
    correlation over (layer, site) points lies on the predicted side of zero: above for gamma, below for
    rank. Whitening does what ASI does if, at every place and seed, the random start on white inputs (power 0)
    has at most as many silent features on held-out text as ASI on centered inputs, at no higher FVU. ASI adds
    to centering if it has fewer at every place and seed. A power between 0 and 1 improves ASI if ASI on such
    inputs has fewer than on centered ones at every place and seed, at no higher FVU.
    """
    first = taken(starts, [*PLACE, "input", "seed"], ["gamma", "effective_rank_fraction", "dead"])
    raw, mean = (
        first[first.input == name].groupby(PLACE).mean(numeric_only=True) for name in ("raw", "mean")
    )
    keys = [*PLACE, "seed", "input", "start"]
    held = held_out(trained, keys, ["dead_fraction", "fvu", "effective_rank_fraction"])
    held = held.set_index(keys).sort_index()
    measured, centered_asi = ["dead_fraction", "effective_rank_fraction"], ("mean", "ASI")
    centered = _part(held, "mean", "random").groupby(PLACE)[measured].mean()
    # Gamma of the raw activations: after centering it is zero everywhere.
    return [
        predicts("gamma predicts death at a random start on raw inputs", raw.gamma, raw.dead, 1),
        predicts(
            "gamma of the raw inputs predicts death at the start after centering", raw.gamma, mean.dead, 1
        ),
        predicts(
            "rank predicts death at the start after centering", mean.effective_rank_fraction, mean.dead, -1
        ),
        predicts(
            "rank predicts silent features after training on centered inputs",
            centered.effective_rank_fraction,
            centered.dead_fraction,
            -1,
        ),
        _better("whitening alone does what ASI does", held, ("power 0", "random"), centered_asi, fvu=True),
        _better("ASI adds to centering", held, centered_asi, ("mean", "random"), strict=True),
        *(
            _better(f"{name} improves ASI", held, (name, "ASI"), centered_asi, fvu=True, strict=True)
            for name in held.index.unique("input")
            if name.startswith("power ") and 0 < float(name.removeprefix("power ")) < 1
        ),
    ]


def _part(held: pd.DataFrame, name: str, start: str) -> pd.DataFrame:
    """Return the rows of one treatment and start, by place and seed."""
    chosen = (held.index.get_level_values("input") == name) & (held.index.get_level_values("start") == start)
    return held[chosen].droplevel(["input", "start"])


def predicts(question: str, x: pd.Series, y: pd.Series, sign: int) -> AnswerRow:
    """Answer whether the whole 95 % interval of Spearman's correlation has the `sign` (1 or -1).

    Not testable if there are fewer than six points, or `x` or `y` does not vary.
    """
    y = y.reindex(x.index)
    rho, low, high = rank_correlation(x, y)
    if math.isnan(rho):
        return AnswerRow(
            question, "not testable here", f"{len(x)} points, of which nothing varies or too few"
        )
    told = f"Spearman {rho:.2f} ({low:.2f} to {high:.2f}) over {len(x)} points"
    return AnswerRow(question, "yes" if (low > 0 if sign > 0 else high < 0) else "no", told)


def has_fewer(
    one: pd.DataFrame, other: pd.DataFrame, *, fvu: bool = False, strict: bool = False
) -> pd.Series:
    """Return by row whether `one` has at most as many dead features as `other`; fewer, if `strict`.

    With `fvu` its FVU may not be higher, either.
    """
    fewer = one.dead_fraction < other.dead_fraction if strict else one.dead_fraction <= other.dead_fraction
    return fewer & (one.fvu <= other.fvu) if fvu else fewer


def _better(
    question: str,
    held: pd.DataFrame,
    ours: tuple[str, str],
    theirs: tuple[str, str],
    *,
    fvu: bool = False,
    strict: bool = False,
) -> AnswerRow:
    one, other = _part(held, *ours), _part(held, *theirs)
    other = other.reindex(one.index)
    columns = ["dead_fraction", *(["fvu"] if fvu else [])]
    if one.empty or one[columns].isna().any(axis=None) or other[columns].isna().any(axis=None):
        return AnswerRow(
            question, "not testable here", f"{', '.join(ours)} or {', '.join(theirs)} is missing"
        )
    good = has_fewer(one, other, fvu=fvu, strict=strict)
    told = [
        f"{', '.join(who)}: silent {100 * part.dead_fraction.mean():.1f} %, FVU {part.fvu.mean():.3f}"
        for who, part in ((ours, one), (theirs, other))
    ]
    told.append(f"{int(good.sum())} of {len(good)} places and seeds")
    return AnswerRow(question, "yes" if good.all() else "no", "; ".join(told))


def do_saved_features_mean_something(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer whether the features that ASI saves are about something, beside features as frequent.

    Takes `SavedFeatureRow`s. A number is above zero if its mean less two standard errors is, in every seed;
    saved features have less of it than their partners if the mean difference plus two standard errors is
    below zero in some seed.
    """
    rows = taken(table, ["group", "seed", "pair"], ["information", "loss_increase"])
    out = []
    for column, name, unit in (
        ("information", "tell about the token", "bits"),
        ("loss_increase", "lower the loss", "nats per firing"),
    ):
        wide = rows.pivot_table(index=["seed", "pair"], columns="group", values=column, dropna=False)
        wide = wide.reindex(columns=["saved by ASI", "alive either way"])
        own = wide["saved by ASI"].dropna()
        out.append(_above_zero(f"features that ASI saves {name}", own, unit))
        difference = (wide["saved by ASI"] - wide["alive either way"]).dropna()
        out.append(_not_below(f"they {name} as much as features as frequent", difference, unit))
    return out


def _by_seed(values: pd.Series) -> pd.DataFrame | None:
    """Return mean and standard error of each seed; None if a seed has fewer than two values."""
    groups = values.groupby(level="seed")
    found = pd.DataFrame({"mean": groups.mean(), "error": groups.sem(), "n": groups.size()})
    return None if found.empty or (found.n < 2).any() else found


def _above_zero(question: str, values: pd.Series, unit: str) -> AnswerRow:
    found = _by_seed(values)
    if found is None:
        return AnswerRow(question, "not testable here", "fewer than two such features in a seed")
    good = bool((found["mean"] - 2 * found.error > 0).all())
    return AnswerRow(question, "yes" if good else "no", _told_means(found, unit))


def _not_below(question: str, values: pd.Series, unit: str) -> AnswerRow:
    found = _by_seed(values)
    if found is None:
        return AnswerRow(question, "not testable here", "fewer than two such pairs in a seed")
    good = bool((found["mean"] + 2 * found.error >= 0).all())
    return AnswerRow(question, "yes" if good else "no", "difference " + _told_means(found, unit))


def _told_means(found: pd.DataFrame, unit: str) -> str:
    means = ", ".join(f"{row['mean']:.3g} ± {row['error']:.2g}" for _, row in found.iterrows())
    return f"{means} {unit} (mean ± standard error by seed; {int(found.n.sum())} features)"


def when_features_die(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer when and how features die, for each method; then what where they began and sparse Adam do.

    Takes `LifeRow`s. A statement about shares is "yes" if it is true in every seed. It is not testable if in
    some seed nothing died (for features that come back: if none was dead at a logged row). At the end of
    training: most of the dead never fired; of those that fired and died, more fired last in the first half of
    the tokens before the last window than in the second; most that were dead at a logged row are alive.
    Where a row began decides if the whole 95 % interval of Spearman's correlation between tenths of the tail
    and the dead share (means over seeds) is above zero. Sparse Adam helps if fewer are dead in every seed.
    """
    keys = ["method", "init", "optimizer", "seed", "tenth", "tokens", "n_tokens", "dead_window_tokens"]
    shares = ["fires_later", "never_fired", "dead", "died", "once_dead", "came_back"]
    table = taken(table, keys, shares)
    every, ends = table[table.tenth.isna()], table[table.tokens == table.n_tokens]
    out = []
    for method, rows in every.groupby("method", sort=False):
        last = rows[rows.tokens == rows.n_tokens].set_index("seed")
        early = pd.Series({seed: _early(own) for seed, own in rows.groupby("seed")})
        out += [
            _most(f"{method}: most dead features never fired", last.never_fired, last.dead),
            _most(f"{method}: most that fire and die do so early", early, last.died),
            _most(f"{method}: most features once dead come back", last.came_back, last.once_dead),
        ]
    for method, rows in ends[ends.tenth.notna()].groupby("method", sort=False):
        dead = rows.groupby("tenth").dead.mean()
        question = f"{method}: rows that begin in the tail of the spectrum die more often"
        out.append(predicts(question, dead.index.to_series(), dead, 1))
    whole = ends[ends.tenth.isna()]
    for start, rows in whole.groupby("init", sort=False):
        dead = rows.pivot_table(index="seed", columns="optimizer", values="dead", dropna=False)
        question = f"{start} start: sparse Adam leaves fewer dead features than Adam"
        if not {"adam", "sparse_adam"} <= set(dead) or dead.isna().any(axis=None):
            out.append(AnswerRow(question, "not testable here", "an optimizer or a number is missing"))
            continue
        if not dead.adam.any():
            out.append(AnswerRow(question, "not testable here", "nothing is dead under Adam"))
            continue
        good = dead.sparse_adam < dead.adam
        told = f"{100 * dead.sparse_adam.mean():.2f} against {100 * dead.adam.mean():.2f} % dead"
        told += f"; {int(good.sum())} of {len(good)} seeds"
        out.append(AnswerRow(question, "yes" if good.all() else "no", told))
    return out


def _early(rows: pd.DataFrame) -> float:
    """Return the share of features that fired, and fired last in the first half of the tokens before the last
    window. NaN if no row was logged in that half.
    """
    rows = rows.sort_values("tokens")
    last = rows.iloc[-1]
    half = rows[rows.tokens <= (last.n_tokens - last.dead_window_tokens) / 2]
    return math.nan if half.empty else 1 - half.iloc[-1].fires_later - last.never_fired


def _most(question: str, part: pd.Series, whole: pd.Series) -> AnswerRow:
    """Answer whether `part` is more than half of `whole` in every seed."""
    part = part.reindex(whole.index)
    if whole.empty or part.isna().any() or not (whole > 0).all():
        return AnswerRow(question, "not testable here", "some seed has no such dead feature")
    good = part > whole / 2
    told = f"{100 * part.mean():.2f} of {100 * whole.mean():.2f} % of the features"
    return AnswerRow(
        question, "yes" if good.all() else "no", f"{told}; {int(good.sum())} of {len(good)} seeds"
    )
