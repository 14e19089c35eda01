"""Answers on encoder steps on made-up tables that hold, half hold and fail."""

from __future__ import annotations

import math

import pandas as pd
from made_up_beyond import encoder_steps

from asi_lens.results.encoder_step_verdicts import Cell, what_in_a_step_kills

TURN = "smaller turns of a row leave fewer features silent"
LARGE = "at equal turns, a first reconstruction that is too large leaves fewer silent"
FREE = "some norm and rate of the encoder leave fewer silent at no higher FVU"
FASTER = "a larger learning rate costs no features at some norm and rate of the encoder"
SUBSPACE = "ASI leaves fewer features silent than random in every cell"


def good(method: str, lr: float, overshoot: float, encoder_lr: float) -> tuple[float, float]:
    """Silent features grow with the turn, fall with the first norm beside it, and cost nothing."""
    turn = 1000 * lr * encoder_lr / overshoot
    return (0.4 if method == "random" else 0.2) * turn / overshoot, 0.2 / (1000 * lr)


def told(table: pd.DataFrame, method: str = "ASI") -> dict[str, str]:
    found = {one.question: one.answer for one in what_in_a_step_kills(table)}
    assert len(found) == 9
    return {question.removeprefix(f"{method}: "): answer for question, answer in found.items()}


def numbers(table: pd.DataFrame) -> dict[str, str]:
    return {one.question: one.numbers for one in what_in_a_step_kills(table)}


def test_a_cell_says_what_a_step_turns() -> None:
    assert Cell(1e-3, 2, 1).turn == Cell(1e-3, 1, 0.5).turn == 5e-4
    assert Cell(1e-3, 1, 1).is_plain
    assert not Cell(1e-3, 2, 2).is_plain


def test_all_of_it_holds() -> None:
    for method in ("random", "ASI"):
        found = told(encoder_steps(good), method)
        assert [found[one] for one in (TURN, LARGE, FREE, FASTER, SUBSPACE)] == ["yes"] * 5
    said = numbers(encoder_steps(good))
    # At rates 1 and 2: 0.1 and 0.2 at half the turn against 0.2 and 0.4; 0.05 and 0.1 against 0.1 and 0.2.
    assert said[f"ASI: {TURN}"] == "silent 11.30 against 22.55 %; 8 of 8 pairs of runs"
    # Twice the norm at one turn, and twice the norm at half the turn.
    assert said[f"ASI: {LARGE}"] == "silent 11.30 against 22.55 %; 8 of 8 pairs of runs"
    assert "rate 0.002, norm 2, encoder rate 2 against rate 0.001" in said[f"ASI: {FASTER}"]


def test_the_turn_alone_and_the_norm_alone_are_told_apart() -> None:
    turn = encoder_steps(lambda method, lr, overshoot, encoder_lr: (100 * lr * encoder_lr / overshoot, 0.2))
    assert (told(turn)[TURN], told(turn)[LARGE], told(turn)[SUBSPACE]) == ("yes", "no", "no")
    norm = encoder_steps(lambda method, lr, overshoot, encoder_lr: (0.4 / overshoot, 0.2))
    assert (told(norm)[TURN], told(norm)[LARGE]) == ("no", "yes")


def test_what_is_gained_may_cost_too_much() -> None:
    dear = encoder_steps(lambda *cell: (good(*cell)[0], 0.1 * cell[2] / cell[3] + 0.1 * cell[2]))
    found = told(dear)
    assert (found[TURN], found[FREE], found[FASTER]) == ("yes", "no", "no")
    assert numbers(dear)[f"ASI: {FREE}"] == "nowhere"


def test_one_seed_or_one_rate_of_two_is_a_no() -> None:
    table = encoder_steps(good)
    fast = (table.seed == 1) & (table.lr == 2e-3) & (table.method == "ASI")
    once = fast & ~((table.overshoot == 1) & (table.encoder_lr == 1))
    found = told(table.assign(dead_fraction=table.dead_fraction.mask(once, 0.99)))
    assert [found[one] for one in (TURN, LARGE, FREE, SUBSPACE)] == ["no"] * 4


def test_what_is_missing_decides_nothing() -> None:
    table = encoder_steps(good)
    plain = table[(table.overshoot == 1) & (table.encoder_lr == 1)]
    assert [told(plain)[one] for one in (TURN, LARGE, FREE)] == ["not testable here"] * 3
    without = told(table[(table.overshoot != 1) | (table.encoder_lr != 1)])
    assert [without[one] for one in (FREE, FASTER)] == ["not testable here"] * 2
    lost = told(table.assign(fvu=math.nan))
    assert [lost[one] for one in (FREE, FASTER)] == ["not testable here"] * 2
    some = (table.seed == 0) & (table.overshoot == 2)
    missing = told(table.assign(dead_fraction=table.dead_fraction.mask(some)))
    assert [missing[one] for one in (TURN, LARGE, FREE)] == ["not testable here"] * 3
    assert told(table[table.lr == 1e-3])[FASTER] == "not testable here"


def test_where_nothing_is_silent_there_is_nothing_to_save() -> None:
    table = encoder_steps(good)
    alive = told(table.assign(dead_fraction=table.dead_fraction.mask(table.method == "ASI", 0.0)))
    assert [alive[one] for one in (TURN, LARGE, FREE)] == ["not testable here"] * 3
    assert (alive[FASTER], alive[SUBSPACE]) == ("yes", "yes")
    # Where nothing is silent at one rate, the other decides.
    some = table.assign(dead_fraction=table.dead_fraction.mask(table.lr == 1e-3, 0.0))
    assert numbers(some)[f"random: {TURN}"] == "silent 30.05 against 60.05 %; 4 of 4 pairs of runs"
