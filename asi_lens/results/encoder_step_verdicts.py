"""Answers of the notebook on encoder steps: what in a step of the encoder's rows kills features."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pandas as pd

from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.beyond_verdicts import has_fewer
from asi_lens.results.judging import held_out


class Cell(NamedTuple):
    """What the runs of one method differ in."""

    lr: float
    overshoot: float
    encoder_lr: float

    @property
    def is_plain(self) -> bool:
        """Whether it is the method as it is, at its best first norm and one rate for all."""
        return self.overshoot == self.encoder_lr == 1

    @property
    def turn(self) -> float:
        """Angle that a step of Adam turns an encoder row by, up to a factor that all cells share.

        A step has one size for all rows, so it turns a short row further.
        """
        return self.lr * self.encoder_lr / self.overshoot

    def __str__(self) -> str:
        return f"rate {self.lr:g}, norm {self.overshoot:g}, encoder rate {self.encoder_lr:g}"


Cells = Mapping[Cell, pd.DataFrame]
"""Silent share and FVU on held-out text, by seed."""
_MEASURES = ["dead_fraction", "fvu"]


def what_in_a_step_kills(table: pd.DataFrame) -> list[AnswerRow]:
    """Answer, for every method, what in a step of the encoder's rows kills features.

    Takes `EncoderStepRow`s of one site. All numbers are of held-out text, and whatever is compared must be so
    in every seed. Runs without a silent feature have none to save, so nothing is compared with them.

    - Smaller turns leave fewer silent: every smaller rate of the encoder does, at the same learning rate and
      first norm.
    - A first reconstruction that is too large leaves fewer silent: every larger first norm does whose rows
      are turned alike, at the same learning rate.
    - Something costs nothing: at each rate some norm and rate of the encoder leave fewer silent than the
      method as it is, at no higher FVU.
    - A larger learning rate costs no features: some norm and rate of the encoder leave no more silent than
      the method as it is at a smaller learning rate, at no higher FVU.
    - ASI leaves fewer silent than random in every cell.
    """
    keys = ["lr", "overshoot", "encoder_lr"]
    held = held_out(table, ["method", *keys, "seed"], _MEASURES)
    out, by_method = [], {}
    for method, rows in held.groupby("method", sort=False):
        cells = {Cell(*cell): part.set_index("seed")[_MEASURES] for cell, part in rows.groupby(keys)}
        out += _of_method(str(method), cells)
        by_method[method] = cells
    if {"random", "ASI"} <= set(by_method):
        ours, theirs = by_method["ASI"], by_method["random"]
        both = [(ours[cell], theirs[cell]) for cell in ours if cell in theirs]
        out.append(_fewer("ASI leaves fewer features silent than random in every cell", both))
    return out


def _of_method(method: str, cells: Cells) -> list[AnswerRow]:
    plain = {cell.lr: part for cell, part in cells.items() if cell.is_plain}
    free = [
        cell
        for cell, part in cells.items()
        if cell.lr in plain and _is_better(part, plain[cell.lr], strict=True)
    ]
    faster = [
        (cell, rate)
        for cell, part in cells.items()
        for rate in plain
        if rate < cell.lr and _is_better(part, plain[rate], strict=False)
    ]
    known = bool(plain) and not any(part.isna().any(axis=None) for part in cells.values())
    some_died = all((part.dead_fraction > 0).all() for part in plain.values())
    return [
        _fewer(f"{method}: smaller turns of a row leave fewer features silent", _pairs(cells, _turns_less)),
        _fewer(
            f"{method}: at equal turns, a first reconstruction that is too large leaves fewer silent",
            _pairs(cells, _is_longer),
        ),
        _answer(
            f"{method}: some norm and rate of the encoder leave fewer silent at no higher FVU",
            {cell.lr for cell in free} == set(plain)
            if known and some_died and len(cells) > len(plain)
            else None,
            "; ".join(map(str, free)),
        ),
        _answer(
            f"{method}: a larger learning rate costs no features at some norm and rate of the encoder",
            bool(faster) if known and len(plain) > 1 else None,
            "; ".join(f"{cell} against rate {rate:g}" for cell, rate in faster),
        ),
    ]


def _turns_less(one: Cell, other: Cell) -> bool:
    return one[:2] == other[:2] and one.encoder_lr < other.encoder_lr


def _is_longer(one: Cell, other: Cell) -> bool:
    alike = one.lr == other.lr and math.isclose(one.turn, other.turn, rel_tol=1e-6)
    return alike and one.overshoot > other.overshoot


def _pairs(cells: Cells, fit: Callable[[Cell, Cell], bool]) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    return [(cells[a], cells[b]) for a, b in itertools.permutations(sorted(cells), 2) if fit(a, b)]


def _is_better(one: pd.DataFrame, other: pd.DataFrame, *, strict: bool) -> bool:
    return bool(has_fewer(one, other.reindex(one.index), fvu=True, strict=strict).all())


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
    return _answer(question, bool(good.all()), f"{told}; {int(good.sum())} of {len(good)} pairs of runs")


def _answer(question: str, holds: bool | None, told: str) -> AnswerRow:
    if holds is None:
        why = "a norm, a rate or a number is missing, or nothing is silent"
        return AnswerRow(question, "not testable here", why)
    return AnswerRow(question, "yes" if holds else "no", told or "nowhere")
