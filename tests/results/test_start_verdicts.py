"""Answers on starts on made-up tables: whether the subspace decides; whether a start does what ASI does."""

from __future__ import annotations

import math

import pandas as pd
from made_up_beyond import tried
from made_up_claims import ASI, RANDOM, changed, runs

from asi_lens.results.start_verdicts import starts_against_asi, what_a_start_must_have

GOOD = {
    "random": (0.3, 0.4, 0.3),
    "orthogonal": (0.31, 0.39, 0.3),
    "ASI of another layer": (0.5, 0.3, 0.3),
    "ASI of another text": (0.7, 0.2, 0.28),
    "data points": (0.9, 0.1, 0.19),
    "ASI": (1.0, 0.05, 0.2),
}


def told(table: pd.DataFrame) -> dict[str, str]:
    return {one.question: one.answer for one in what_a_start_must_have(table)}


def test_the_subspace_decides_or_does_not() -> None:
    found = told(tried(GOOD))
    assert list(found.values()) == ["yes", "yes", *["not testable here"] * 3, *["no"] * 5]
    # The more inside, the more silent: the other way round is a no.
    turned = {name: (inside, 0.5 - silent, fvu) for name, (inside, silent, fvu) in GOOD.items()}
    assert next(iter(told(tried(turned)).values())) == "no"
    flat = {name: (inside, 0.2, fvu) for name, (inside, _, fvu) in GOOD.items()}
    assert next(iter(told(tried(flat)).values())) == "not testable here"


def test_rows_move_in_in_every_seed_and_on_both_sides() -> None:
    question = "rows of a random start move into the subspace in training"
    assert told(tried(GOOD, moved=-0.1))[question] == "no"
    table = tried(GOOD)
    once = table.assign(decoder_inside_end=table.decoder_inside_end.where(table.seed == 0, 0.0))
    assert told(once)[question] == "no"
    numbers = what_a_start_must_have(table)[1].numbers
    assert numbers == "decoder 30 to 40 % inside; encoder 30 to 50 % inside; 2 of 2 seeds"
    assert told(table[table.method != "random"])[question] == "not testable here"
    assert told(table.assign(encoder_inside_end=math.nan))[question] == "not testable here"


def test_the_norm_and_the_subspace_count_each_by_itself() -> None:
    norm, asi_norm, at_norm_1 = (
        "norm 1 saves features that the best first norm loses, from random",
        "norm 1 saves features that the best first norm loses, from ASI",
        "the subspace saves features at norm 1, too",
    )
    both = {**GOOD, "random, aligned": (0.3, 0.1, 0.4), "ASI, aligned": (1.0, 0.02, 0.3)}
    found = told(tried(both))
    assert [found[one] for one in (norm, asi_norm, at_norm_1)] == ["yes"] * 3, "FVU is told, not judged"
    numbers = what_a_start_must_have(tried(both))[2].numbers
    assert numbers == "silent 10.5 against 40.5 %, FVU 0.400 against 0.300; 2 of 2 seeds"
    # As many silent features are not fewer.
    found = told(tried({**both, "ASI, aligned": (1.0, 0.05, 0.2), "random, aligned": (0.3, 0.05, 0.3)}))
    assert [found[one] for one in (norm, asi_norm, at_norm_1)] == ["yes", "no", "no"]
    # One seed of two is a no; a lost number decides nothing.
    table = tried(both)
    once = (table.method == "ASI, aligned") & (table.seed == 1)
    assert told(table.assign(dead_fraction=table.dead_fraction.mask(once, 0.9)))[at_norm_1] == "no"
    assert told(table.assign(fvu=table.fvu.mask(once)))[at_norm_1] == "not testable here"


def test_a_start_that_does_what_asi_does() -> None:
    same = tried({**GOOD, "ASI + data points": (1.0, 0.05, 0.2)})
    assert told(same)["ASI + data points does what ASI does"] == "yes"
    assert told(same)["data points does what ASI does"] == "no", "fewer silent, but not as few"


def test_a_start_does_what_asi_does_in_every_seed() -> None:
    table = runs(
        {"random": [RANDOM] * 3, "ASI": [ASI] * 3, "same": [ASI] * 3, "some": changed(1, "fvu", ASI, RANDOM)}
    )
    found = {one.question: one.answer for one in starts_against_asi(table)}
    assert found == {
        "random does what ASI does": "no",
        "same does what ASI does": "yes",
        "some does what ASI does": "no",
    }
    assert [one.answer for one in starts_against_asi(table[table.method != "ASI"])] == [
        "not testable here"
    ] * 3
    lost = table.assign(fvu=table.fvu.where(table.method != "same"))
    assert [one.answer for one in starts_against_asi(lost)] == ["no", "not testable here", "no"]
