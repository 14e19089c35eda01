"""Text that a figure shows beside the pointer: where, how and from how much text a point was measured."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd

from asi_lens.figures.style import label


class Fact(NamedTuple):
    """One column of a table in words; `words` has a place for the value, `form` is the value's format."""

    column: str
    words: str
    form: str = ",.0f"
    factor: int = 1


# A line of text each. Columns that a table does not have are left out.
_LINES = (
    (Fact("model", "{}", ""), Fact("corpus", "on {}", "")),
    (Fact("site", "{}", ""), Fact("layer", "layer {}"), Fact("method", "{}", ""), Fact("seed", "seed {}")),
    (
        Fact("n_tokens", "{} tokens"),
        Fact("tokens", "{} training tokens"),
        Fact("n_left_out", "{} massive left out"),
    ),
    (
        Fact("d", "width {}"),
        Fact("effective_rank_fraction", "effective rank / width {}", ".3f"),
        Fact("intrinsic_dimension_99", "99 % of the variance in {} directions"),
    ),
    (
        Fact("dead_fraction", "no firing: {} %", ".2f", 100),
        Fact("dead_window_tokens", "in {} tokens"),
        Fact("fvu", "FVU {}", ".4f"),
    ),
)


class Hover(NamedTuple):
    """Text of a trace's points: a template, and the columns of text that the template names, a row per point.

    Values that all points share stand in the template once. `customdata` is None if all values are shared.
    """

    template: str
    customdata: list[list[str]] | None


def hover(rows: pd.DataFrame, by: str, name: str, x: str = "%{x:,}") -> Hover:
    """Return the text of one point per value of the column `by`, in ascending order.

    Several rows at a point have the range of their values. `name` is the first line, `x` and y the last.
    The words of the column `by` are around `x`.
    """
    points = rows.groupby(by)
    lines = [f"<b>{name}</b>"]
    varying: list[list[str]] = []
    for facts in _LINES:
        words = []
        for fact in facts:
            if fact.column == by:
                x = fact.words.format(x)
            if fact.column == by or fact.column not in rows or rows[fact.column].isna().all():
                continue
            texts = _texts(rows, points, fact)
            told = texts[0]
            if len(set(texts)) > 1:
                told = f"%{{customdata[{len(varying)}]}}"
                varying.append(texts)
            if told != name:
                words.append(told)
        lines.append(" · ".join(words))
    data = [list(texts) for texts in zip(*varying, strict=True)]
    template = "<br>".join(
        line for line in [*lines, f"{x}: <b>%{{y:.3f}}</b>" if x else "<b>%{y:.3f}</b>"] if line
    )
    return Hover(f"{template}<extra></extra>", data or None)


def _texts(rows: pd.DataFrame, points: pd.api.typing.DataFrameGroupBy, fact: Fact) -> list[str]:
    """Return a fact in words for every point; a dash for its value where it was not measured."""
    if not fact.form:
        names = [label(str(name)) for name in rows[fact.column].dropna().unique()]
        text = fact.words.format(", ".join(names) if len(names) <= 3 else f"{len(names)} in all")
        return [text] * points.ngroups
    ends = points[fact.column].agg(["min", "max"]).astype(float) * fact.factor
    texts = []
    for low, high in zip(ends["min"], ends["max"], strict=True):
        shown = dict.fromkeys(format(end, fact.form) for end in (low, high))
        texts.append(fact.words.format("–" if pd.isna(low) else " to ".join(shown)))
    return texts
