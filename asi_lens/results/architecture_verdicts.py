"""C1, C4 and C5 on several architectures, and answers for each: tables in, verdicts and answers out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from asi_lens.results import rank_verdicts
from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.beyond_verdicts import has_fewer
from asi_lens.results.judging import (
    Found,
    Holds,
    UntestedError,
    Verdict,
    claim,
    counted,
    held_out,
    spread,
    taken,
)

CROSS_ATTENTION = " (cross-attention)"
"""Follows a decoder's name where its attention to the encoder is shown as an architecture of its own."""
_SHOWN = 3
"""Numbers of each architecture's verdict whose mean and range are shown."""


@claim(
    "C1",
    "Attention outputs use fewer directions than MLP outputs and residual streams, on every architecture",
    "effective rank: attn_out 0.60, others 0.90 (text decoders; v3)",
)
def c1_on_each(ranks: pd.DataFrame) -> Found:
    """C1 on several architectures: `rank_verdicts.c1` of each model.

    Takes `RankRow`s. Holds if C1 holds on every model, partly if on some; not judged if it cannot be judged
    on one of them.
    """
    return _on_each(_c1(ranks))


@claim(
    "C4",
    "The output projection makes the collapse on every architecture",
    "rank of z high, restored by a flat W_O (text decoders)",
)
def c4_on_each(projections: pd.DataFrame, ranks: pd.DataFrame) -> Found:
    """C4 on several architectures: `rank_verdicts.c4` of each model, by the rule of `c1_on_each`.

    Takes `OutputProjectionRow`s and `RankRow`s.
    """
    return _on_each(_c4(projections, ranks))


@claim(
    "C5",
    "The squeeze comes from overlap among the heads' output subspaces on every architecture",
    "orthogonal heads restore the rank (text decoders)",
)
def c5_on_each(projections: pd.DataFrame, overlaps: pd.DataFrame) -> Found:
    """C5 on several architectures: `rank_verdicts.c5` of each model, by the rule of `c1_on_each`.

    Takes `OutputProjectionRow`s and `HeadOverlapRow`s.
    """
    return _on_each(_c5(projections, overlaps))


def architectures(
    ranks: pd.DataFrame,
    projections: pd.DataFrame,
    overlaps: pd.DataFrame,
    trained: pd.DataFrame,
    cross: tuple[pd.DataFrame, pd.DataFrame] | None = None,
) -> list[AnswerRow]:
    """Answer for each architecture whether C1, C4 and C5 hold, and whether ASI keeps features alive.

    Takes `RankRow`s, `OutputProjectionRow`s, `HeadOverlapRow`s and `DeadFeatureRow`s of the methods `random`
    and `ASI`. ASI keeps features alive if in every seed it has fewer silent features than the random start on
    held-out data, at no higher FVU. A claim that holds in part is a "no" that says so.

    `cross`: `OutputProjectionRow`s and `HeadOverlapRow`s of decoders' cross-attention. It is judged by the
    same rules, `cross_attn_out` in the place of `attn_out`, and answered under its own name.
    """
    if cross is not None:
        ranks = pd.concat([ranks, _as_attention(ranks)])
        projections, overlaps = (
            pd.concat([own, of_cross_attention(one)])
            for own, one in zip((projections, overlaps), cross, strict=True)
        )
    judged = {"C1": _c1(ranks), "C4": _c4(projections, ranks), "C5": _c5(projections, overlaps)}
    out = [
        _answer(f"{name} on {model}", verdict)
        for name, verdicts in judged.items()
        for model, verdict in verdicts.items()
    ]
    held = held_out(cross_named(trained), ["model", "method", "seed"], ["dead_fraction", "fvu"])
    return [*out, *(_gain(str(model), part) for model, part in held.groupby("model", sort=False))]


def of_cross_attention(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with its models' names followed by "(cross-attention)"."""
    return table.assign(model=table.model + CROSS_ATTENTION)


def cross_named(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table in which rows of `cross_attn_out` have a model of their own, "... (cross-attention)"."""
    return table.assign(
        model=table.model + (table.site == "cross_attn_out").map({True: CROSS_ATTENTION, False: ""})
    )


def _as_attention(ranks: pd.DataFrame) -> pd.DataFrame:
    """Return the ranks of decoders with cross-attention in the place of self-attention."""
    decoders = ranks.model[ranks.site == "cross_attn_out"].unique()
    own = ranks[ranks.model.isin(decoders) & (ranks.site != "attn_out")]
    site = own.site.replace("cross_attn_out", "attn_out")
    return of_cross_attention(own.assign(site=site))


def _c1(ranks: pd.DataFrame) -> dict[str, Verdict | None]:
    return _judged(ranks, lambda one, model: rank_verdicts.c1(one, model, str(one.corpus.iloc[0])))


def _c4(projections: pd.DataFrame, ranks: pd.DataFrame) -> dict[str, Verdict | None]:
    return _judged(projections, lambda one, model: rank_verdicts.c4(one, ranks[ranks.model == model]))


def _c5(projections: pd.DataFrame, overlaps: pd.DataFrame) -> dict[str, Verdict | None]:
    return _judged(projections, lambda one, model: rank_verdicts.c5(one, overlaps[overlaps.model == model]))


def _judged(
    table: pd.DataFrame, judge: Callable[[pd.DataFrame, str], Verdict | None]
) -> dict[str, Verdict | None]:
    """Return the verdict on each model, in the order of the table."""
    models = taken(table, ["model", "corpus"], []).model.unique()
    return {str(model): judge(table[table.model == model], str(model)) for model in models}


def _on_each(judged: Mapping[str, Verdict | None]) -> Found:
    """Return one result of the verdicts on several models; means and ranges are over the models."""
    known = [verdict for verdict in judged.values() if verdict is not None]
    if not known or len(known) < len(judged):
        raise UntestedError
    numbers = spread(
        "architectures where it holds", pd.Series([one.holds is True for one in known]).mean(), percent=True
    )
    # A number that one of them lacks (Gemma's z is too wide for the drop of C5) is none on all of them.
    named = [{number.name: number for number in verdict.numbers} for verdict in known]
    for name in [name for name in named[0] if all(name in one for one in named)][:_SHOWN]:
        same = [one[name] for one in named]
        numbers += spread(name, pd.Series([number.value for number in same]), percent=same[0].percent)
    results = {verdict.holds for verdict in known}
    holds: Holds = None if None in results else "partly"
    if len(results) == 1:
        holds = known[0].holds
    return Found(numbers, counted(len(known), "architecture"), holds)


def _answer(question: str, verdict: Verdict | None) -> AnswerRow:
    if verdict is None or verdict.holds is None:
        return AnswerRow(question, "not testable here", "rows or numbers are missing")
    told = ", ".join(f"{number.name} {number.text}" for number in verdict.numbers[:_SHOWN])
    part = "in part: " if verdict.holds == "partly" else ""
    return AnswerRow(question, "yes" if verdict.holds is True else "no", f"{part}{told}")


def _gain(model: str, held: pd.DataFrame) -> AnswerRow:
    question = f"ASI keeps more features alive than a random start on {model}"
    wide = held.set_index(["seed", "method"])[["dead_fraction", "fvu"]].unstack("method")
    if not {"random", "ASI"} <= set(held.method) or wide.isna().any(axis=None):
        return AnswerRow(question, "not testable here", "ASI or random is missing")
    asi, random = (wide.xs(name, axis=1, level="method") for name in ("ASI", "random"))
    better = has_fewer(asi, random, fvu=True, strict=True)
    told = f"silent {random.dead_fraction.mean():.1%} from a random start, {asi.dead_fraction.mean():.1%} "
    told += f"from ASI; FVU {random.fvu.mean():.3f}, {asi.fvu.mean():.3f}; better in {int(better.sum())} of "
    return AnswerRow(question, "yes" if better.all() else "no", told + counted(len(better), "seed"))
