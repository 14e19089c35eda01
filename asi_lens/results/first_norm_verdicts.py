"""Answers of the notebook on the first norm: whether longer encoder rows keep features alive, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import pandas as pd

from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.beyond_verdicts import has_fewer
from asi_lens.results.judging import held_out

Cell = tuple[float, float]
"""Learning rate and overshoot."""

_CELL = ["lr", "overshoot"]
_MEASURES = ["dead_fraction", "fvu"]
_BEST = 1.0


def what_a_first_norm_does(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer, for every method, what the norm of the first encoder rows does to its features.

    Takes `FirstNormRow`s of one site. The best norm is that of the smallest first error (`overshoot` 1). All
    numbers are of held-out text, and whatever is compared must be so in every seed. Runs without a silent
    feature have none to save, so nothing is compared with them.

    - Norms above the best leave fewer features silent: each of them does, at each rate.
    - Rows that a step turns alike: Adam's step has one size for all rows, so it turns a row by about the rate
      over the norm. "yes" if in every pair of cells with one such ratio the longer rows leave fewer silent:
      then the turn is not what the norm acts by.
    - Some norm above the best leaves fewer silent at no higher FVU: at each rate there is one.
    - A larger rate costs no features: with some norm above the best it leaves no more silent than a smaller
      rate with the best norm, at no higher FVU.
    - ASI leaves fewer silent than random at each norm and rate.
    """
    held = held_out(table, ["method", *_CELL, "seed"], _MEASURES)
    out, by_method = [], {}
    for method, rows in held.groupby("method", sort=False):
        cells = {cell: part.set_index("seed")[_MEASURES] for cell, part in rows.groupby(_CELL)}
        out += _of_method(str(method), cells)
        by_method[method] = cells
    if {"random", "ASI"} <= set(by_method):
        ours, theirs = by_method["ASI"], by_method["random"]
        both = [(ours[cell], theirs[cell]) for cell in ours if cell in theirs]
        out.append(_fewer("ASI leaves fewer features silent than random at every norm", both))
    return out


def _of_method(method: str, cells: Mapping[Cell, pd.DataFrame]) -> list[AnswerRow]:
    """Answer the first four questions; `cells` hold silent share and FVU by seed."""
    best = {lr: part for (lr, o), part in cells.items() if o == _BEST}
    longer = {(lr, o): part for (lr, o), part in cells.items() if o > _BEST and lr in best}
    pairs = [(part, best[lr]) for (lr, _), part in longer.items()]
    turned = [(cells[one], cells[other]) for one, other in _equal_turns(cells)]
    free = [cell for cell, part in longer.items() if _is_better(part, best[cell[0]], strict=True)]
    faster = [
        (cell, slow)
        for cell, part in longer.items()
        for slow in best
        if slow < cell[0] and _is_better(part, best[slow], strict=False)
    ]
    known = bool(pairs) and not any(part.isna().any(axis=None) for pair in pairs for part in pair)
    to_save = known and all((part.dead_fraction > 0).all() for part in best.values())
    return [
        _fewer(f"{method}: norms above the best leave fewer features silent", pairs),
        _fewer(f"{method}: of rows that a step turns alike, the longer leave fewer silent", turned),
        _answer(
            f"{method}: some norm above the best leaves fewer silent at no higher FVU",
            {lr for lr, _ in free} == set(best) if to_save else None,
            "; ".join(map(_named, free)),
        ),
        _answer(
            f"{method}: a larger rate costs no features at some norm above the best",
            bool(faster) if known and len(best) > 1 else None,
            "; ".join(f"{_named(cell)} against rate {slow:g}" for cell, slow in faster),
        ),
    ]


def _equal_turns(cells: Iterable[Cell]) -> Iterator[tuple[Cell, Cell]]:
    """Yield pairs of cells with one ratio of rate to norm, the longer rows first."""
    for lr, o in sorted(cells):
        for other_lr, other_o in sorted(cells):
            if other_o < o and math.isclose(lr / o, other_lr / other_o, rel_tol=0.02):
                yield (lr, o), (other_lr, other_o)


def _is_better(one: pd.DataFrame, other: pd.DataFrame, *, strict: bool) -> bool:
    return bool(has_fewer(one, other.reindex(one.index), fvu=True, strict=strict).all())


def _named(cell: Cell) -> str:
    return "rate {:g} at {:g} times the best norm".format(*cell)


def _fewer(question: str, pairs: list[tuple[pd.DataFrame, pd.DataFrame]]) -> AnswerRow:
    """Answer whether the first has fewer silent features than the second in every pair and seed."""
    if not pairs:
        return _answer(question, None, "")
    ours = pd.concat([one.dead_fraction for one, _ in pairs])
    theirs = pd.concat([other.dead_fraction.reindex(one.index) for one, other in pairs])
    if ours.isna().any() or theirs.isna().any():
        return _answer(question, None, "")
    ours, theirs = ours[theirs.to_numpy() > 0], theirs[theirs.to_numpy() > 0]
    if theirs.empty:
        return _answer(question, None, "")
    good = ours.to_numpy() < theirs.to_numpy()
    told = f"silent {100 * ours.mean():.2f} against {100 * theirs.mean():.2f} %"
    return _answer(question, bool(good.all()), f"{told}; {int(good.sum())} of {len(good)} runs")


def _answer(question: str, holds: bool | None, told: str) -> AnswerRow:
    if holds is None:
        return AnswerRow(
            question, "not testable here", "a norm, a rate or a number is missing, or nothing is silent"
        )
    return AnswerRow(question, "yes" if holds else "no", told or "nowhere")
