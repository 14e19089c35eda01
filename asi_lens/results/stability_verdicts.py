"""Answers of the notebook on stability: tables in, answers out, by rules that the function states."""

from __future__ import annotations

import math

import pandas as pd

from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.beyond_verdicts import PLACE
from asi_lens.results.judging import taken


def subspace_stability(
    overlaps: pd.DataFrame, transfer: pd.DataFrame, matches: pd.DataFrame
) -> list[AnswerRow]:
    """Answer whether active subspaces, dictionaries and features stay put.

    Takes `OverlapRow`s, `TransferRow`s and `SeedMatchRow`s. Subspaces overlap more than random ones if every
    kernel is two standard deviations above the expectation for random subspaces. Another text moves the
    subspace if its kernel is below that of the next part of the same text at every layer. FVUs are compared
    at every text, method and seed. Features of two seeds agree more if the mean cosine of their matching is
    higher for every pair of seeds, by more than the matching may miss (`gap`).
    """
    where = taken(overlaps, [*PLACE, "against"], ["kernel", "random_kernel", "random_deviation"])
    where = where.assign(floor=where.random_kernel + 2 * where.random_deviation)
    parts = {name: where[where.against == name] for name in ("half", "text", "layer")}
    half = parts["half"].set_index(PLACE).kernel
    texts = parts["text"].join(half.rename("half"), on=PLACE)
    keys = ["text", "corpus", "method", "seed", "inputs"]
    fvu = taken(transfer, keys, ["fvu"]).set_index(keys).fvu.unstack("inputs").reset_index()
    plain = fvu.get("as they are", pd.Series(math.nan, fvu.index))
    own = fvu.text == fvu.corpus
    home = fvu.assign(home=plain)[own].set_index(["method", "seed"]).home
    off = fvu.assign(plain=plain)[~own].join(home, on=["method", "seed"])
    columns = {name: off.get(name, pd.Series(math.nan, off.index)) for name in ("its own mean", "rotated")}
    return [
        _above("other texts' subspaces overlap more than random ones", texts.kernel, texts.floor),
        _above(
            "another text moves the subspace more than another part of the text", texts.half, texts.kernel
        ),
        _above(
            "other layers' subspaces overlap more than random ones",
            parts["layer"].kernel,
            parts["layer"].floor,
        ),
        _above("a dictionary is worse off its text", off.plain, off.home),
        _above("the text's own mean lowers the FVU off the text", off.plain, columns["its own mean"]),
        _above("a rotation of the subspace lowers it further", columns["its own mean"], columns["rotated"]),
        *_seeds(matches),
    ]


def _above(question: str, more: pd.Series, less: pd.Series) -> AnswerRow:
    """Answer whether `more` is above `less` in every row."""
    if more.empty or more.isna().any() or less.isna().any():
        return AnswerRow(question, "not testable here", "rows or numbers are missing")
    good = more > less
    told = f"{more.mean():.3f} against {less.mean():.3f} (means); {int(good.sum())} of {len(good)}"
    return AnswerRow(question, "yes" if good.all() else "no", told)


def _seeds(matches: pd.DataFrame) -> list[AnswerRow]:
    keys = ["method", "seed", "other_seed", "tokens"]
    found = taken(matches, keys, ["matched", "gap"])
    found = found.assign(most=found.matched + found.gap)
    pair = ["method", "seed", "other_seed"]
    first = found[found.tokens == 0].set_index(pair)
    last = found[found.tokens > 0].set_index(pair).reindex(first.index)
    out = []
    for method in dict.fromkeys(first.index.get_level_values("method")):
        begin, end = first.loc[method], last.loc[method]
        out.append(
            _above(f"training brings features of two seeds together: {method}", end.matched, begin.most)
        )
    names = set(first.index.get_level_values("method"))
    questions = (
        "features of two seeds agree more from ASI than from a random start",
        "training adds more agreement from ASI than from a random start",
    )
    if not {"random", "ASI"} <= names:
        return [*out, *(AnswerRow(one, "not testable here", "ASI or random is missing") for one in questions)]
    least, most = last.matched - first.most, last.most - first.matched
    ours, theirs = last.matched.loc["ASI"], last.most.loc["random"]
    out.append(_above(questions[0], ours, theirs.reindex(ours.index)))
    return [*out, _above(questions[1], least.loc["ASI"], most.loc["random"].reindex(ours.index))]
