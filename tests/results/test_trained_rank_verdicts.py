"""Answers on rank and loss on made-up tables: the loss follows, it does not, nothing moves, no numbers."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from made_up_trained_rank import NAMES, trained_ranks

from asi_lens.base.errors import DataError
from asi_lens.results.beyond_rows import AnswerRow
from asi_lens.results.trained_rank_verdicts import differences_to_baseline, rank_and_loss

# Differences between seeds are far larger than those between variants: only pairs show the latter.
RANKS = {name: 0.5 + 0.1 * i for i, name in enumerate(NAMES)}


def noisy(seed: int, variant: str) -> float:
    return 0.3 * seed + 0.002 * ((seed * 7 + len(variant)) % 3)


def answers(table: pd.DataFrame) -> dict[str, AnswerRow]:
    return {row.question: row for row in rank_and_loss(table)}


def told(table: pd.DataFrame) -> list[str]:
    return [row.answer for row in rank_and_loss(table)]


def test_rank_up_and_loss_down() -> None:
    table = trained_ranks(
        lambda name, seed: RANKS[name] + noisy(seed, name) / 10,
        lambda name, seed: 5.0 - RANKS[name] + noisy(seed, name),
    )
    found = answers(table)
    assert [row.answer for row in found.values()] == ["yes"] * 13
    assert found["some change raises the rank of attention"].numbers == "gate, muon, frozen, decay, heads"
    follows = found["where the rank is higher, the loss is lower"]
    assert follows.numbers == "5 of 5 variants (gate, muon, frozen, decay, heads)"
    gate = found["gate: the loss is lower"].numbers
    assert gate.startswith("-0.1")
    assert gate.endswith("against the baseline; 3 seeds")


def test_rank_up_and_loss_not() -> None:
    up = answers(trained_ranks(lambda name, seed: RANKS[name], lambda name, seed: 4.5 + RANKS[name] + seed))
    assert up["muon: the rank of attention is higher"].answer == "yes"
    assert up["muon: the loss is lower"].answer == "no"
    assert up["muon: the loss is lower"].numbers.endswith("; the opposite")
    assert up["where the rank is higher, the loss is lower"].numbers == "0 of 5 variants"
    assert [row.answer for row in up.values()][-3:] == ["yes", "no", "no"]
    # One that follows is not all.
    one = answers(trained_ranks(lambda name, seed: RANKS[name], lambda name, seed: 5.0 - (name == "muon")))
    assert one["where the rank is higher, the loss is lower"].answer == "no"
    assert one["where the rank is higher, the loss is lower"].numbers == "1 of 5 variants (muon)"


def test_no_change_raises_the_rank() -> None:
    found = answers(trained_ranks(lambda name, seed: 1 - RANKS[name], lambda name, seed: 5.0))
    assert found["some change raises the rank of attention"].answer == "no"
    assert found["where the rank is higher, the loss is lower"].answer == "not testable here"
    last = found["over all variants a higher rank goes with a lower loss"]
    assert (last.answer, last.numbers) == ("not testable here", "too few variants, or nothing differs")


def test_an_interval_that_holds_zero_decides_nothing() -> None:
    # Differences 0.1, 0.1 and -0.01: mean 0.063, standard error 0.037, and t(2) = 4.303.
    table = trained_ranks(
        lambda name, seed: 0.5 + (name == "gate") * (0.1 if seed < 2 else -0.01),
        lambda name, seed: 5.0,
        names=("baseline", "gate"),
    )
    row = answers(table)["gate: the rank of attention is higher"]
    assert row.answer == "no"
    half = 4.303 * pd.Series([0.1, 0.1, -0.01]).std() / math.sqrt(3)
    mean = 0.19 / 3
    assert row.numbers == (
        f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f}) against the baseline; 3 seeds; not decided"
    )


def test_pairs_of_the_same_seed_and_the_last_measurement_count() -> None:
    table = trained_ranks(lambda name, seed: RANKS[name] + seed / 10, lambda name, seed: 5.0 + seed)
    found = differences_to_baseline(table).set_index(["variant", "seed"])
    assert set(found.index.get_level_values("variant")) == set(NAMES[1:])
    assert found.loc[("muon", 2), "rank"] == pytest.approx(0.9)
    assert found.loc[("muon", 2), "rank_difference"] == pytest.approx(0.2)
    assert (found.loss_difference == 0).all()


def test_what_is_missing_is_not_judged() -> None:
    one = told(trained_ranks(lambda n, s: RANKS[n], lambda n, s: 5 - RANKS[n], seeds=(0,)))
    assert one == ["not testable here"] * 13
    table = trained_ranks(lambda n, s: RANKS[n], lambda n, s: 5 - RANKS[n])
    lacks = table[(table.variant != "baseline") | (table.seed != 1)]
    assert set(told(lacks)) == {"not testable here"}
    assert told(table[table.variant == "baseline"])[1:] == ["not testable here"] * 2
    with pytest.raises(DataError, match="no column validation_loss"):
        rank_and_loss(table.drop(columns="validation_loss"))
