"""Answers on the first norm on made-up tables that hold, half hold and fail."""

from __future__ import annotations

import math

import pandas as pd
from made_up_beyond import first_norms

from asi_lens.results.first_norm_verdicts import what_a_first_norm_does

ABOVE = "norms above the best leave fewer features silent"
TURN = "of rows that a step turns alike, the longer leave fewer silent"
FREE = "some norm above the best leaves fewer silent at no higher FVU"
FASTER = "a larger rate costs no features at some norm above the best"
SUBSPACE = "ASI leaves fewer features silent than random at every norm"


def good(method: str, lr: float, overshoot: float) -> tuple[float, float]:
    """Longer rows save more than a smaller rate does, and cost nothing."""
    silent = (0.4 if method == "random" else 0.2) * (lr / 1e-3) / overshoot**2
    return silent, 0.2 / (lr / 1e-3)


def told(table: pd.DataFrame, method: str = "ASI") -> dict[str, str]:
    found = {one.question: one.answer for one in what_a_first_norm_does(table)}
    assert len(found) == 9
    return {question.removeprefix(f"{method}: "): answer for question, answer in found.items()}


def test_all_of_it_holds() -> None:
    for method in ("random", "ASI"):
        found = told(first_norms(good), method)
        assert [found[one] for one in (ABOVE, TURN, FREE, FASTER, SUBSPACE)] == ["yes"] * 5
    numbers = {one.question: one.numbers for one in what_a_first_norm_does(first_norms(good))}
    # Means over two rates and two seeds at twice the norm, and at the best.
    assert numbers[f"ASI: {ABOVE}"] == "silent 7.55 against 30.05 %; 4 of 4 runs"
    assert numbers[f"ASI: {TURN}"] == "silent 25.05 against 50.05 %; 4 of 4 runs"
    assert numbers[f"ASI: {FASTER}"] == "rate 0.002 at 2 times the best norm against rate 0.001"


def test_where_only_the_turn_counts_it_is_told() -> None:
    turn = first_norms(lambda method, lr, overshoot: (100 * lr / overshoot, 0.2))
    found = told(turn)
    assert (found[ABOVE], found[TURN]) == ("yes", "no")
    assert found[SUBSPACE] == "no", "as many are not fewer"


def test_where_the_norm_does_nothing_or_costs_too_much() -> None:
    found = told(first_norms(lambda method, lr, overshoot: (0.1, 0.2)))
    assert set(found.values()) == {"no"} | ({"yes"} if found[FASTER] == "yes" else set())
    assert found[FASTER] == "yes", "no more silent at no higher FVU"
    dear = first_norms(lambda method, lr, overshoot: (good(method, lr, overshoot)[0], 0.1 * overshoot))
    assert (told(dear)[ABOVE], told(dear)[FREE], told(dear)[FASTER]) == ("yes", "no", "no")
    numbers = {one.question: one.numbers for one in what_a_first_norm_does(dear)}
    assert numbers[f"ASI: {FREE}"] == "nowhere"


def test_one_seed_or_one_rate_of_two_is_a_no() -> None:
    table = first_norms(good)
    once = (table.seed == 1) & (table.overshoot == 2) & (table.lr == 2e-3) & (table.method == "ASI")
    found = told(table.assign(dead_fraction=table.dead_fraction.mask(once, 0.99)))
    assert [found[one] for one in (ABOVE, TURN, FREE, SUBSPACE)] == ["no"] * 4


def test_what_is_missing_decides_nothing() -> None:
    table = first_norms(good)
    alone = table[table.overshoot == 1]
    found = told(alone)
    assert [found[one] for one in (ABOVE, TURN, FREE, FASTER)] == ["not testable here"] * 4
    lost = table.assign(fvu=math.nan)
    assert [told(lost)[one] for one in (FREE, FASTER)] == ["not testable here"] * 2
    some = (table.seed == 0) & (table.overshoot == 2)
    assert told(table.assign(dead_fraction=table.dead_fraction.mask(some)))[ABOVE] == "not testable here"
    one_rate = table[table.lr == 1e-3]
    assert (told(one_rate)[TURN], told(one_rate)[FASTER]) == ("not testable here",) * 2


def test_where_nothing_is_silent_there_is_nothing_to_save() -> None:
    table = first_norms(good)
    alive = table.assign(dead_fraction=table.dead_fraction.mask(table.method == "ASI", 0.0))
    found = told(alive)
    assert [found[one] for one in (ABOVE, TURN, FREE)] == ["not testable here"] * 3
    assert (found[FASTER], found[SUBSPACE]) == ("yes", "yes")
    # Where some of the best are without a silent feature, the others decide.
    some = table.assign(dead_fraction=table.dead_fraction.mask(table.lr == 1e-3, 0.0))
    numbers = {one.question: one.numbers for one in what_a_first_norm_does(some)}
    assert numbers[f"random: {ABOVE}"] == "silent 20.05 against 80.05 %; 2 of 2 runs"
