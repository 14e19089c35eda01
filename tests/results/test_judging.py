"""Verdicts and their numbers, and the statistics that several claims share."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.results import judging
from asi_lens.results.judging import Number, Verdict, combined, rank_correlation

VERDICT = Verdict("C1", "statement", "0.6", (Number("attn_out", 0.5),), "3 layers", True)

# --- numbers and verdicts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Number("x", 0.346, 0.339, 0.352, percent=True), "34.6 % (33.9 to 35.2 %)"),
        (Number("x", 0.5, percent=True), "50.0 %"),
        (Number("x", -0.0001, -0.0123, 0.0, percent=True), "0.0 % (-1.2 to 0.0 %)"),
        (Number("x", 0.51, 0.43, 0.60), "0.51 (0.43 to 0.60)"),
        (Number("x", 0.51), "0.51"),
        (Number("x", 0.16579, 0.1649, 0.17), "0.166 (0.165 to 0.170)"),
        (Number("x", -0.8213, -0.943, -0.55), "-0.821 (-0.943 to -0.550)"),
        (Number("x", 0.0009996, 0.0001, 0.002), "0.0010 (0.0001 to 0.0020)"),
        (Number("x", 144.0), "144"),
        (Number("x", 1234.5), "1,234"),
        (Number("x", 10.0), "10"),
        (Number("x", 0.0), "0"),
    ],
)
def test_a_number_is_told_with_its_spread(number: Number, text: str) -> None:
    assert number.text == text


@pytest.mark.parametrize(
    "given_",
    [
        {"value": math.nan},
        {"low": 0.1},
        {"high": 0.1},
        {"low": 0.3, "high": 0.2},
        {"low": 0.0, "high": math.inf},
    ],
)
def test_a_number_that_cannot_be_told_is_refused(given_: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="random, FVU"):
        Number(**{"name": "random, FVU", "value": 0.2, **given_})


@pytest.mark.parametrize(
    ("holds", "words"),
    [
        (True, "supported"),
        (False, "not supported"),
        ("partly", "partly supported"),
        (None, "not testable here"),
    ],
)
def test_a_verdict_in_words(holds: Any, words: str) -> None:
    verdict = dataclasses.replace(VERDICT, holds=holds)
    assert verdict.verdict("quick") == verdict.verdict("gpu") == words
    assert verdict.verdict("smoke") == "not testable here"


def test_a_verdict_has_a_number_and_tells_four_at_most() -> None:
    with pytest.raises(OptionError, match="C1, C2"):
        dataclasses.replace(VERDICT, claim="C0")
    with pytest.raises(OptionError, match="C1: numbers=5"):
        dataclasses.replace(VERDICT, numbers=5 * VERDICT.numbers)


@pytest.mark.parametrize(
    ("verdicts", "one"),
    [
        ([], "not testable here"),
        (["not testable here", "not testable here"], "not testable here"),
        (["not testable here", "supported"], "supported"),
        (["not supported", "not supported"], "not supported"),
        (["supported", "not supported"], "partly supported"),
        (["supported", "partly supported", "not testable here"], "partly supported"),
    ],
)
def test_several_verdicts_make_one(verdicts: list[str], one: str) -> None:
    assert combined(verdicts) == combined(verdicts[::-1]) == one


def test_an_unknown_verdict_is_not_combined() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'supported'"):
        combined(["suported"])


def test_a_spread_is_of_what_was_measured() -> None:
    [number] = judging.spread("x", pd.Series([0.1, math.nan, 0.4, 0.4]))
    assert (number.value, number.low, number.high) == (pytest.approx(0.3), 0.1, 0.4)
    assert judging.spread("x", pd.Series([0.1, math.nan])) == judging.spread("x", 0.1) == [Number("x", 0.1)]
    assert judging.spread("x", pd.Series([math.nan])) == judging.spread("x", math.nan) == []
    assert (judging.counted(1, "seed"), judging.counted(3, "seed")) == ("1 seed", "3 seeds")


# --- tables -----------------------------------------------------------------------------------------


def test_a_missing_column_is_named() -> None:
    with pytest.raises(DataError, match=r"has no column fvu, kl; it has seed, l0$"):
        judging.taken(pd.DataFrame({"seed": [0], "l0": [8]}), ["seed"], ["fvu", "l0", "kl"])


def test_what_was_not_measured_is_nan_whatever_the_table_holds() -> None:
    found = judging.taken(pd.DataFrame({"seed": [0, 1], "kl": [None, None]}), ["seed"], ["kl"])
    assert found.kl.isna().all()
    assert found.kl.dtype == float


def test_final_numbers_are_of_the_end_of_every_run() -> None:
    losses = {"cross_entropy_delta": 0.1, "cross_entropy_delta_error": 0.01, "kl": 0.2}
    none = dict.fromkeys(losses)
    rows = [
        dict(method=method, seed=0, split=split, tokens=tokens, dead_window_tokens=window, **none | numbers)
        for method, end in (("a", 100), ("b", 90))
        for split, tokens, window, numbers in (
            ("train", 50, 20, {"dead_fraction": 0.1, "fvu": 9, "l0": 9}),
            ("train", end, 20, {"dead_fraction": 0.2, "fvu": 9, "l0": 9}),
            ("train", end, 40, {"dead_fraction": 0.9, "fvu": 9, "l0": 9}),
            ("held_out", end, 64, {"dead_fraction": 0.3, "fvu": 0.5, "l0": 4, **losses}),
        )
    ]
    found = judging.final_numbers(pd.DataFrame(rows), 20)
    assert found.columns.tolist() == ["dead_in_training", "silent_held_out", "fvu", "l0", *losses]
    assert found.loc["b", 0].tolist() == [0.2, 0.3, 0.5, 4, 0.1, 0.01, 0.2]
    assert judging.final_numbers(pd.DataFrame(rows), 30).dead_in_training.isna().all()


@pytest.mark.parametrize(("delta", "higher"), [(0.05, False), (0.12, False), (0.13, False), (0.15, True)])
def test_a_loss_is_higher_that_is_beyond_two_standard_errors(delta: float, higher: bool) -> None:
    ours, theirs = (
        pd.DataFrame({"cross_entropy_delta": [one, 0.5], "cross_entropy_delta_error": [error, error]})
        for one, error in ((delta, 0.015), (0.1, 0.008))
    )
    assert judging.loss_is_higher(ours, theirs).tolist() == [higher, False]


def test_a_claim_of_parts_needs_every_seed_either_way() -> None:
    holds, mixed, fails = [True, True], [True, False], [False, False]
    assert judging.in_every_seed(pd.DataFrame({"a": holds, "b": holds})) is True
    assert judging.in_every_seed(pd.DataFrame({"a": holds, "b": mixed})) is None
    assert judging.in_every_seed(pd.DataFrame({"a": mixed, "b": fails})) is False


def test_a_rule_becomes_a_verdict_or_nothing() -> None:
    @judging.claim("C3", "statement", "paper")
    def rule(value: float) -> judging.Found:
        if value < 0:
            raise judging.UntestedError
        return judging.Found(judging.spread("x", value), "3 layers", value > 1)

    assert rule(2.0) == Verdict("C3", "statement", "paper", (Number("x", 2.0),), "3 layers", True)
    assert rule(-1.0) is None


def test_an_unknown_number_leaves_a_claim_open() -> None:
    known, unknown = pd.DataFrame({"a": [0.1, 0.2]}), pd.Series([0.1, None], dtype=float)
    assert judging.if_known(np.True_, known, 0.5) is True
    assert judging.if_known(False, known) is False
    assert judging.if_known(True, known, unknown) is judging.if_known(False, math.nan) is None
    assert judging.if_known(None, known) is None
    assert judging.if_known("partly", known) == "partly"
    found = judging.by_seed([], "partly", known, known)
    assert (found.over, found.holds) == ("2 seeds", "partly")


def test_held_out_means_stand_by_method() -> None:
    rows = [
        ("held_out", 0, "a", 0.1),
        ("held_out", 0, "a", 0.3),
        ("held_out", 0, "b", 0.5),
        ("train", 0, "b", 9.0),
    ]
    table = pd.DataFrame(rows, columns=["split", "layer", "method", "fvu"])
    found = judging.by_method(table, ["layer"], ["fvu"], ["b", "a"]).fvu
    assert (found.a[0], found.b[0]) == (pytest.approx(0.2), 0.5)
    with pytest.raises(judging.UntestedError):
        judging.by_method(table[:2], ["layer"], ["fvu"], ["a", "b"])


# --- rank correlation -------------------------------------------------------------------------------


def test_known_values() -> None:
    # One minus 6 times the squared differences of ranks (two of 1) over n^3 - n.
    swapped = rank_correlation([1, 2, 3, 4, 5, 6], [10, 20, 40, 30, 50, 60])[0]
    assert swapped == pytest.approx(1 - 6 * 2 / 210)
    # A tie takes the mean rank: ranks 1, 2.5, 2.5, 4, 5, 6 against 1 to 6.
    tied = rank_correlation([1, 2, 2, 5, 7, 8], [1, 2, 3, 4, 5, 6])[0]
    assert tied == pytest.approx(17 / math.sqrt(17 * 17.5))


@given(st.lists(st.integers(-1000, 1000), min_size=6, max_size=12, unique=True), st.integers(0, 3))
def test_only_order_matters(values: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    other = list(generator.normal(size=len(values)))
    one = rank_correlation(values, other)
    two = rank_correlation([float(v) ** 3 for v in values], [-math.exp(-y) for y in other])
    assert one == pytest.approx(two)


def test_the_interval_holds_the_value_and_narrows() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=200)
    y = -x + generator.normal(size=200)
    widths = []
    for n in (15, 200):
        rho, low, high = rank_correlation(list(x[:n]), list(y[:n]))
        assert low < rho < high < 0
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_what_does_not_vary_has_no_correlation() -> None:
    assert all(math.isnan(value) for value in rank_correlation([1] * 6, range(6)))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_points_say_nothing(n: int) -> None:
    """Of three points in a falling order every resampling falls, as in one of six orders by chance."""
    assert all(math.isnan(value) for value in rank_correlation(range(n), range(n)))


def test_the_interval_is_rarely_wrong_of_the_fewest_points() -> None:
    """Of all orders of six points 2.5 % at most have an interval below zero: that is what 95 % says."""
    x = list(range(6))
    below = [rank_correlation(x, order)[2] < 0 for order in itertools.permutations(x)]
    assert 0 < sum(below) / len(below) <= 0.025


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(OptionError, match=r"\(3, 2\) is not allowed"):
        rank_correlation([1, 2, 3], [1, 2])


@pytest.mark.parametrize(
    ("main", "rest", "expected"),
    [
        ([True, True], [True, True], True),
        ([True, True], [True, False], "partly"),
        ([True, True], [False, False], "partly"),
        ([True, False], [True, True], None),
        ([False, False], [True, True], False),
    ],
)
def test_a_main_part_alone_is_half_a_claim(main: list[bool], rest: list[bool], expected: Any) -> None:
    assert judging.graded(pd.DataFrame({"main": main}), pd.DataFrame({"rest": rest})) == expected
