"""Answers beyond the paper on made-up tables: each account alone, both, neither; what is missing."""

from __future__ import annotations

import math

import pandas as pd
from made_up_beyond import LIVES, inputs, lives, starts

from asi_lens.results.beyond_verdicts import (
    centering_or_subspace,
    do_saved_features_mean_something,
    when_features_die,
)


def answers(first: pd.DataFrame, trained: pd.DataFrame) -> dict[str, str]:
    return {one.question: one.answer for one in centering_or_subspace(first, trained)}


def listed(first: pd.DataFrame, trained: pd.DataFrame) -> list[str]:
    return list(answers(first, trained).values())


def test_the_mean_alone() -> None:
    first = starts(lambda name, gamma, rank: gamma / 3 if name == "raw" else 0.001 * (rank > 0))
    trained = inputs(lambda name, start, rank: 0.4 if name == "raw" else 0.0)
    assert listed(first, trained) == ["yes", *["not testable here"] * 3, "yes", "no", "no"]


def test_the_rank_alone() -> None:
    first = starts(lambda name, gamma, rank: 1 - rank)
    trained = inputs(lambda name, start, rank: (1 - rank) * (0.5 if start == "ASI" else 1))
    assert listed(first, trained) == ["no", "no", "yes", "yes", "no", "yes", "no"]


def test_both_and_what_reverses_them() -> None:
    first = starts(lambda name, gamma, rank: gamma / 3 if name == "raw" else (1 - rank) / 2)
    trained = inputs(lambda name, start, rank: 1 - rank if start == "random" and name != "power 0" else 0.01)
    assert listed(first, trained) == ["yes", "no", "yes", "yes", "yes", "yes", "no"]
    turned = first.assign(dead=1 - first.dead)
    reversed_too = listed(turned, trained.assign(dead_fraction=1 - trained.dead_fraction))
    assert reversed_too == ["no", "no", "no", "no", "yes", "no", "no"], "white and ASI are alike"


def test_whitening_needs_an_fvu_as_low() -> None:
    trained = inputs(lambda name, start, rank: 0.0 if name == "power 0" or start == "ASI" else 0.3)
    worse = trained.assign(fvu=trained.fvu.where(trained.input != "power 0", 0.3))
    first = starts(lambda name, gamma, rank: gamma)
    question = "whitening alone does what ASI does"
    assert answers(first.assign(dead=0.1), trained)[question] == "yes"
    assert answers(first.assign(dead=0.1), worse)[question] == "no"
    train = trained.assign(split="train", dead_fraction=0.9)
    assert answers(first, pd.concat([trained, train])) == answers(first, trained)


def test_a_power_improves_asi_only_at_every_place_and_no_higher_fvu() -> None:
    first = starts(lambda name, gamma, rank: gamma)
    trained = inputs(lambda name, start, rank: 0.1 if name == "power 0.5" else 0.2)
    question = "power 0.5 improves ASI"
    assert answers(first, trained)[question] == "yes"
    here = (trained.input == "power 0.5") & (trained.start == "ASI") & (trained.layer == 3)
    for column, value in (("dead_fraction", 0.2), ("fvu", 0.21)):
        assert answers(first, trained.assign(**{column: trained[column].mask(here, value)}))[question] == "no"
    assert question not in answers(first, trained[trained.input != "power 0.5"])
    assert answers(first, trained[~here])[question] == "yes", "of the places that are there"


def test_what_is_missing_is_not_answered() -> None:
    first = starts(lambda name, gamma, rank: gamma)
    trained = inputs(lambda name, start, rank: 0.1)
    questions = list(answers(first, trained))
    without = answers(first, trained[trained.input != "power 0"])
    assert without[questions[4]] == "not testable here"
    unknown = trained.assign(dead_fraction=math.nan)
    assert [answers(first, unknown)[q] for q in questions[3:]] == ["not testable here"] * 4
    assert answers(first[first.layer < 1], trained)[questions[0]] == "not testable here", "two points"


def saved(information: tuple[float, float], loss: tuple[float, float | None], seeds: int = 2) -> pd.DataFrame:
    """Six pairs a seed: (saved, alive) means with a spread of 0.1 bits and 0.01 nats."""
    rows = []
    for seed in range(seeds):
        for pair in range(6):
            off = (-1) ** pair
            for group, bits, nats in zip(
                ("saved by ASI", "alive either way"), information, loss, strict=True
            ):
                increase = None if nats is None else nats + 0.01 * off
                rows.append((group, seed, pair, bits + 0.1 * off, increase))
    return pd.DataFrame(rows, columns=["group", "seed", "pair", "information", "loss_increase"])


def told(table: pd.DataFrame) -> list[str]:
    return [one.answer for one in do_saved_features_mean_something(table)]


def test_saved_features() -> None:
    assert told(saved((2.0, 2.0), (0.3, 0.3))) == ["yes"] * 4
    assert told(saved((2.0, 3.0), (0.3, 0.4))) == ["yes", "no", "yes", "no"]
    assert told(saved((0.0, 2.0), (-0.3, 0.3))) == ["no", "no", "no", "no"]
    none_alone = saved((2.0, 2.0), (0.3, 0.3))
    none_alone = none_alone[none_alone.group == "alive either way"]
    assert told(none_alone) == ["not testable here"] * 4
    assert told(saved((2.0, 2.0), (0.3, None))) == ["yes", "yes", "yes", "not testable here"]
    one_seed_fails = saved((2.0, 2.0), (0.3, 0.3))
    one_seed_fails.loc[one_seed_fails.seed == 1, "information"] -= 2.0
    assert told(one_seed_fails)[0] == "no"


def lived(table: pd.DataFrame) -> list[str]:
    """Never fired, early and back for each method; the tail for random starts; sparse Adam for each start."""
    return [one.answer for one in when_features_die(table)]


def test_features_that_never_fire_and_features_that_die() -> None:
    unborn = lives(lambda *_: 0.3, lambda *_: 0.1, early=0.75, back=0.05)
    assert lived(unborn) == ["yes", "yes", "no"] * 4 + ["yes", "yes", "no", "no"]
    late = lives(lambda *_: 0.1, lambda *_: 0.3, early=0.25, back=0.5, slope=-1.0)
    assert lived(late) == ["no", "no", "yes"] * 4 + ["no", "no", "no", "no"]
    numbers = when_features_die(unborn)[0].numbers
    assert numbers == "30.00 of 40.00 % of the features; 2 of 2 seeds"


def test_a_seed_that_disagrees_is_a_no() -> None:
    half = lives(lambda method, seed: 0.3 if seed else 0.05, lambda *_: 0.1, early=0.75, back=0.05)
    assert lived(half)[:3] == ["no", "yes", "no"]
    assert when_features_die(half)[0].numbers.endswith("1 of 2 seeds")


def test_sparse_adam_helps_in_every_seed_or_does_not() -> None:
    helps = lives(lambda method, seed: 0.1 if "sparse" in method else 0.3, lambda *_: 0.1)
    assert lived(helps)[-2:] == ["yes", "yes"]
    once = lives(lambda method, seed: 0.1 if "sparse" in method and seed else 0.3, lambda *_: 0.1)
    assert lived(once)[-2:] == ["no", "no"]
    assert lived(helps[helps.method != "ASI"])[-2:] == ["yes", "not testable here"]


def test_nothing_died_or_the_window_was_never_full() -> None:
    alive = lives(lambda *_: 0.0, lambda *_: 0.0, back=0.1)
    assert lived(alive) == ["not testable here", "not testable here", "yes"] * 4 + ["not testable here"] * 4
    full = lives(lambda *_: 0.2, lambda *_: 0.1)
    short = full[full.tokens == 100].assign(n_tokens=100)
    assert lived(short) == ["not testable here"] * 16
    assert lived(full[full.tenth.isna()])[12:] == ["no", "no"], "without tenths nothing is said of the tail"
    assert len(lived(full[full.method == "ASI"])) == 4
    assert set(LIVES) == set(full.method)
