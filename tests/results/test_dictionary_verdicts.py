"""Claims C6 to C12 on made-up tables: hold in all seeds, in some, in none; what is missing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_beyond import released
from made_up_claims import (
    ASI,
    RANDOM,
    WINDOW,
    End,
    changed,
    drift,
    gains,
    holds,
    points,
    runs,
    sizes,
    sweep,
    told,
)

from asi_lens.base.errors import DataError
from asi_lens.results import dictionary_verdicts as verdicts
from asi_lens.results.judging import Verdict

IN_SEEDS = pytest.mark.parametrize(("seeds", "expected"), [(0, True), (1, None), (2, None), (3, False)])

# --- C7, C9, C10 ------------------------------------------------------------------------------------


@IN_SEEDS
@pytest.mark.parametrize("part", ["dead", "silent", "fvu", "kl", "delta"])
def test_c7_needs_every_part_in_every_seed(part: str, seeds: int, expected: bool | None) -> None:
    table = runs({"random": [RANDOM] * 3, "ASI": changed(seeds, part, ASI, RANDOM)})
    if part not in ("dead", "silent") and seeds:  # dead features alone: half of the claim
        expected = "partly"
    assert holds(verdicts.c7(table, WINDOW)) == expected


def test_c7_tells_silent_features_and_fvu_over_seeds() -> None:
    others = [dataclasses.replace(RANDOM, silent=silent) for silent in (0.2, 0.3, 0.4)]
    verdict = verdicts.c7(runs({"ASI": [ASI] * 3, "random": others, "more": [RANDOM]}), WINDOW)
    assert verdict is not None
    assert (verdict.claim, verdict.over, verdict.holds) == ("C7", "3 seeds", True)
    assert told(verdict) == {
        "random, silent held out": "30.0 % (20.0 to 40.0 %)",
        "ASI, silent held out": "3.0 % (3.0 to 3.0 %)",
        "random, FVU": "0.4 (0.4 to 0.4)",
        "ASI, FVU": "0.3 (0.3 to 0.3)",
    }


def test_c7_takes_a_loss_within_two_errors_as_none() -> None:
    higher = dataclasses.replace(ASI, delta=RANDOM.delta + 0.025)
    assert holds(verdicts.c7(runs({"random": [RANDOM], "ASI": [higher]}), WINDOW)) is True
    assert holds(verdicts.c7(runs({"random": [RANDOM], "ASI": [RANDOM]}), WINDOW)) is False, (
        "equal is no gain"
    )


@given(st.lists(st.sampled_from([-1, 1]), min_size=1, max_size=4))
def test_c7_is_flipped_by_swapping_the_methods(signs: list[int]) -> None:
    ours, theirs = ([RANDOM if sign == s else ASI for sign in signs] for s in (-1, 1))
    one, other = (
        holds(verdicts.c7(runs({"random": a, "ASI": b}), WINDOW)) for a, b in ((theirs, ours), (ours, theirs))
    )
    assert one == (signs[0] > 0 if len(set(signs)) == 1 else None)
    assert other == (None if one is None else not one)


AUX, SPARSE = End(0.1, 0.2), End(0.001, 0.002)


@IN_SEEDS
@pytest.mark.parametrize("part", ["dead", "silent"])
@pytest.mark.parametrize("pair", ["AuxK", "sparse Adam"])
def test_c9_needs_both_orders_in_every_seed(part: str, pair: str, seeds: int, expected: bool | None) -> None:
    ends = {"random + AuxK": [AUX] * 3, "ASI": [ASI] * 3, "ASI + sparse Adam": [SPARSE] * 3}
    if pair == "AuxK":
        ends["ASI"] = changed(seeds, part, ASI, AUX)
    else:
        ends["ASI + sparse Adam"] = changed(seeds, part, SPARSE, ASI)
    assert holds(verdicts.c9(runs(ends), WINDOW)) == ("partly" if seeds else expected)


def test_c9_fails_where_neither_order_holds() -> None:
    ends = {"random + AuxK": [SPARSE] * 2, "ASI": [ASI] * 2, "ASI + sparse Adam": [AUX] * 2}
    assert holds(verdicts.c9(runs(ends), WINDOW)) is False


def test_c9_tells_why_it_does_not_hold() -> None:
    ends = {"random + AuxK": [AUX] * 2, "ASI": [dataclasses.replace(ASI, dead=0.15)] * 2}
    verdict = verdicts.c9(runs({**ends, "ASI + sparse Adam": [SPARSE] * 2}), WINDOW)
    assert holds(verdict) == "partly", "sparse Adam is best"
    assert list(told(verdict).values())[:3] == [
        "20.0 % (20.0 to 20.0 %)",
        "3.0 % (3.0 to 3.0 %)",
        "0.2 % (0.2 to 0.2 %)",
    ]
    assert told(verdict)["random + AuxK minus ASI, dead in training"] == "-5.0 % (-5.0 to -5.0 %)"


@IN_SEEDS
@pytest.mark.parametrize("part", ["dead", "silent", "fvu"])
def test_c10_needs_every_part_in_every_seed(part: str, seeds: int, expected: bool | None) -> None:
    table = runs({"random": [RANDOM] * 3, "ASI": changed(seeds, part, ASI, RANDOM)})
    assert holds(verdicts.c10(table, WINDOW)) is expected


def test_c10_allows_an_equal_fvu_and_does_not_ask_for_the_loss() -> None:
    equal = dataclasses.replace(ASI, fvu=RANDOM.fvu, kl=9.0, delta=9.0)
    table = runs({"random": [RANDOM], "ASI": [equal]})
    assert holds(verdicts.c10(table, WINDOW)) is True
    assert holds(verdicts.c10(table.assign(kl=None, cross_entropy_delta=math.nan), WINDOW)) is True
    same = runs({"random": [RANDOM], "ASI": [dataclasses.replace(RANDOM, silent=0.1)]})
    assert holds(verdicts.c10(same, WINDOW)) is False, "as many dead"


def test_a_seed_that_one_method_lacks_is_not_judged() -> None:
    table = runs({"random": [RANDOM] * 3, "ASI": [ASI] * 2})
    assert holds(verdicts.c7(table, WINDOW)) is holds(verdicts.c10(table, WINDOW)) is None
    full = runs({"random": [RANDOM] * 3, "ASI": [ASI] * 3})
    assert holds(verdicts.c7(full, WINDOW + 1)) is None, "no such window"


# --- C7 by size -------------------------------------------------------------------------------------


GROWS = {4096: [0.1, 0.2], 512: [0.05, 0.06], 32_768: [0.3, 0.4]}
CURED = {512: [0.01, 0.02], 4096: [0.03, 0.04], 32_768: [0.1, 0.1]}


@pytest.mark.parametrize(
    ("random", "asi", "expected"),
    [
        ({}, {}, True),
        ({}, {4096: [0.03, 0.21]}, False),  # one size, one seed
        ({}, {4096: [0.1, 0.2]}, False),
        ({32_768: [0.05, 0.055]}, {32_768: [0.01, 0.01]}, False),  # falls with size
        ({32_768: [0.06, 0.05]}, {32_768: [0.01, 0.01]}, False),  # does not grow
        ({32_768: [0.02, 0.08]}, {32_768: [0.01, 0.01]}, False),  # falls by the mean over seeds
        ({512: [0.05, 0.5]}, {}, True),  # grows by the mean
        ({4096: [0.9, 0.9]}, {}, True),  # only the ends count
    ],
)
def test_c7_by_size_needs_every_size_and_growth(random: Any, asi: Any, expected: bool) -> None:
    table = sizes(GROWS | random, CURED | asi)
    train = table.assign(split="train", dead_fraction=1 - table.dead_fraction)
    assert holds(verdicts.c7_by_size(pd.concat([train, table]))) is expected


def test_c7_by_size_tells_the_ends() -> None:
    verdict = verdicts.c7_by_size(sizes(GROWS, CURED))
    assert told(verdict) == {
        "random, 512 features": "5.5 % (5.0 to 6.0 %)",
        "random, 32,768 features": "35.0 % (30.0 to 40.0 %)",
        "ASI, 32,768 features": "10.0 % (10.0 to 10.0 %)",
        "random minus ASI, smallest": "4.0 %",
    }
    assert holds(verdicts.c7_by_size(sizes({8: [0.1], 9: [0.2]}, {8: [0.01], 9: [0.01]}))) is True
    assert verdicts.c7_by_size(sizes({512: [0.1]}, {512: [0.01]})) is None, "one size"


# --- C8 ---------------------------------------------------------------------------------------------

# d_init: (silent, FVU). A random start: 0.4, 0.5.
CURVE = {8: (0.3, 0.48), 16: (0.1, 0.4), 32: (0.1, 0.41), 64: (0.39, 0.5)}


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({}, True),
        ({32: (0.195, 0.41)}, True),  # half of the random start's, means over layers
        ({32: (0.21, 0.41)}, False),  # good at 16 alone: no factor of two
        ({16: (0.3, 0.4), 32: (0.3, 0.4)}, False),  # none is good
        ({16: (0.1, 0.51), 32: (0.1, 0.51)}, False),  # fewer silent, at a higher FVU
        ({64: (0.1, 0.5)}, False),  # the largest is good
        ({8: (0.3, 0.39)}, False),  # the smallest reconstructs best
        ({8: (0.1, 0.48), 16: (0.3, 0.4), 32: (0.3, 0.4), 64: (0.3, 0.4)}, False),
        ({8: (0.1, 0.48)}, True),
    ],
)
def test_c8_needs_a_wide_range_between_bad_ends(curve: Any, expected: bool) -> None:
    table = sweep(CURVE | curve)
    other = sweep(dict.fromkeys(CURVE, (0.9, 0.9)), site="mlp_out")
    train = table.assign(split="train", dead_fraction=0.01)
    assert holds(verdicts.c8(pd.concat([other, train, table]))) is expected


def test_c8_tells_the_range() -> None:
    verdict = verdicts.c8(sweep(CURVE))
    assert verdict is not None
    assert verdict.over == "2 layers and 1 seed"
    assert told(verdict) == {
        "smallest good d_init": "16",
        "largest good d_init, of 64 tried": "32",
        "FVU at d_init 8, the smallest tried": "0.48 (0.48 to 0.48)",
        "FVU at d_init 16, the lowest": "0.4 (0.4 to 0.4)",
    }
    none = verdicts.c8(sweep({**CURVE, 16: (0.3, 0.4), 32: (0.3, 0.4)}))
    assert len(told(none)) == 2, "no good value to tell"
    table = sweep(CURVE)
    assert holds(verdicts.c8(table[table.method != "ASI, automatic d_init"])) is True
    assert holds(verdicts.c8(table.assign(fvu=table.fvu.where(table.d_init != 32)))) is None, "one unknown"
    assert holds(verdicts.c8(sweep({16: (0.1, 0.4), 64: (0.3, 0.5)}))) is False
    assert verdicts.c8(sweep({16: (0.1, 0.4)})) is None, "one value"
    assert verdicts.c8(sweep(CURVE, site="mlp_out")) is None


@pytest.mark.parametrize(("auto", "inside"), [(15, False), (16, True), (24, True), (32, True), (33, False)])
def test_the_automatic_choice_is_held_against_the_good_range(auto: int, inside: bool) -> None:
    bad = sweep({16: (0.9, 0.9), 32: (0.9, 0.9)}, auto, site="mlp_out")
    found = verdicts.good_d_init(pd.concat([sweep(CURVE, auto), bad]))
    assert found.loc["attn_out", "inside the good range"].tolist() == [inside, inside]
    assert found.loc[("attn_out", 3), ["good d_init, min", "good d_init, max", "d_init"]].tolist() == [
        16,
        32,
        auto,
    ]
    assert found.loc[("attn_out", 1), ["fvu", "fvu random"]].tolist() == [0.45, 0.5]
    more = sweep({**CURVE, 32: (0.25, 0.41)}, auto).assign(seed=1)  # good by the mean over seeds
    assert (
        verdicts.good_d_init(pd.concat([sweep(CURVE, auto), more]))["inside the good range"].all() == inside
    )
    assert not found.loc["mlp_out", "inside the good range"].any()
    assert found.loc["mlp_out", "good d_init, min"].isna().all()


# --- C6, C11 ----------------------------------------------------------------------------------------


def test_c6_needs_the_whole_interval_below_zero() -> None:
    falling = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    verdict = verdicts.c6(points(falling))
    assert verdict is not None
    assert verdict.over == "12 (layer, site) points, resampled"
    # The participation ratio does not vary: it predicts nothing, and is not told.
    assert list(told(verdict)) == [
        "Spearman",
        "within attn_out, effective rank",
        "within attn_out, directions for 99 %",
    ]
    assert told(verdict)["within attn_out, effective rank"] == "-1 (-1 to -1)"
    table = points(falling)
    first = table[table.site == "attn_out"]
    assert holds(verdicts.c6(first)) is True
    assert holds(verdicts.c6(first.assign(dead_fraction=1 - first.dead_fraction))) is False, "rises"
    ties = table.assign(dead_fraction=table.dead_fraction.where(table.site == "mlp_out", 0.9))
    assert holds(verdicts.c6(ties)) == "partly", "attention outputs do not vary"
    mixed = points([0.3, 0.1, 0.4, 0.2, 0.1, 0.3])
    assert holds(verdicts.c6(mixed[mixed.site == "attn_out"])) is False, "the interval holds zero"


def test_c6_is_not_judged_where_nothing_dies() -> None:
    verdict = verdicts.c6(points([0.0] * 4))
    assert holds(verdict) is None
    assert told(verdict) == {}
    few = points([0.5, 0.4, 0.3, 0.2, 0.1])
    assert holds(verdicts.c6(few[few.site == "attn_out"])) is None, "five points"


def test_points_are_means_of_the_random_start_on_held_out_text() -> None:
    found = verdicts.rank_points(points([0.4, 0.3, 0.2]))
    assert found.loc["attn_out"].dead_fraction.tolist() == pytest.approx([0.4, 0.3, 0.2])
    assert found.loc[("mlp_out", 2), "effective_rank_fraction"] == pytest.approx(0.6)


def test_c6_of_dictionaries_trained_elsewhere() -> None:
    falling, mixed = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [0.3, 0.1, 0.4, 0.2, 0.1, 0.3]
    verdict = verdicts.c6_released(released(falling))
    assert holds(verdict) is True
    assert verdict is not None
    assert verdict.over == "12 (layer, site) points of 512 features, resampled"
    assert told(verdict)["within attn_out, effective rank"] == "-1 (-1 to -1)"
    first = released(falling)
    assert holds(verdicts.c6_released(released(falling[::-1])[:6])) is False, "rises"
    ties = first.assign(dead_fraction=first.dead_fraction.where(first.site == "mlp_out", 0.9))
    assert holds(verdicts.c6_released(ties)) == "partly", "attention outputs do not vary"
    assert holds(verdicts.c6_released(released(mixed)[:6])) is False, "the interval holds zero"
    # Another start says the opposite and does not count; nor do two dictionaries of another size.
    other = [released(falling[::-1], start="asi"), released(falling[::-1], d_sae=64)[:2]]
    assert told(verdicts.c6_released(pd.concat([first, *other]))) == told(verdict)
    twice = pd.concat([first, released([0.0] * 6)])
    assert told(verdicts.c6_released(twice)) == told(verdict), "a point is the mean of its dictionaries"


def test_c6_without_dictionaries_is_not_testable_here() -> None:
    for table in (None, released([0.4, 0.2, 0.1], start="asi"), released([0.0] * 4), released([0.4])):
        verdict = verdicts.c6_released(table)
        assert verdict is not None
        assert verdict.verdict("quick") == "not testable here"
    with pytest.raises(DataError, match="no column start"):
        verdicts.c6_released(released([0.4, 0.2, 0.1]).drop(columns="start"))


SMALL: dict[str, Any] = {"mlp_out": ([0.1, 0.1], [0.0, 0.1]), "resid_post": ([0.1, 0.1], [0.1, 0.1])}


@pytest.mark.parametrize(
    ("silent", "expected"),
    [
        ({"attn_out": ([0.4, 0.2], [0.1, 0.1])}, True),
        ({"attn_out": ([0.4, 0.2], [0.0, 0.3])}, True),  # the mean over layers
        ({"attn_out": ([0.5, 0.25], [0.25, 0.125])}, True),  # half of them
        ({"attn_out": ([0.4, 0.2], [0.3, 0.1])}, False),  # less than half of them
        ({"attn_out": ([0.1, 0.0], [0.0, 0.0]), "mlp_out": ([0.07, 0.07], [0.0, 0.0])}, False),
        ({"attn_out": ([0.1, 0.1], [0.05, 0.05])}, False),  # as much as elsewhere
        ({"attn_out": ([0.4, 0.2], [0.1, 0.1]), "mlp_out": ([0.9, 0.9], [0.1, 0.1])}, False),
        ({"attn_out": ([0.4, 0.2], [0.1, 0.1]), "resid_post": ([0.9, 0.9], [0.1, 0.1])}, False),
        ({"attn_out": ([0.1, 0.1], [0.4, 0.2])}, False),
    ],
)
def test_c11_needs_the_largest_gain_and_half_of_the_silent(silent: Any, expected: bool) -> None:
    assert holds(verdicts.c11(gains(**SMALL | silent))) is expected


def test_c11_tells_the_gains_over_layers() -> None:
    assert told(verdicts.c11(gains(**SMALL, attn_out=([0.4, 0.2], [0.1, 0.1])))) == {
        "attn_out, silent taken away": "20.0 % (10.0 to 30.0 %)",
        "mlp_out, silent taken away": "5.0 % (0.0 to 10.0 %)",
        "resid_post, silent taken away": "0.0 % (0.0 to 0.0 %)",
        "attn_out, silent left of the random start's": "33.3 %",
    }


def test_c11_leaves_out_places_with_a_random_start_alone() -> None:
    table = gains(**SMALL, attn_out=([0.4, 0.2], [0.1, 0.1]))
    alone = table[(table.site == "attn_out") & (table.method == "random")].assign(layer=99, dead_fraction=0.9)
    assert verdicts.c11(pd.concat([table, alone])) == verdicts.c11(table)


# --- C12 --------------------------------------------------------------------------------------------


@IN_SEEDS
@pytest.mark.parametrize("part", ["gain", "drift"])
def test_c12_needs_both_parts_in_every_seed(part: str, seeds: int, expected: bool | None) -> None:
    assert holds(verdicts.c12(drift(seeds, part))) == ("partly" if part == "drift" and seeds else expected)


def test_c12_tells_gains_and_drift() -> None:
    assert told(verdicts.c12(drift())) == {
        "low l0, silent taken away by ASI": "20.0 % (20.0 to 20.0 %)",
        "high l0, silent taken away by ASI": "5.0 % (5.0 to 5.0 %)",
        "low l0, decoder inside the subspace": "90.0 % (90.0 to 90.0 %)",
        "high l0, decoder inside the subspace": "40.0 % (40.0 to 40.0 %)",
    }


# --- what is missing --------------------------------------------------------------------------------

Judge = Callable[[pd.DataFrame], Verdict | None]
THREE = {"random + AuxK": [AUX] * 3, "ASI": [ASI] * 3, "ASI + sparse Adam": [SPARSE] * 3}
BOTH = runs({"random": [RANDOM] * 3, "ASI": [ASI] * 3})
LOST = ["dead_fraction", "fvu", "kl", "cross_entropy_delta", "cross_entropy_delta_error"]
SITES = gains(**SMALL, attn_out=([0.4, 0.2], [0.1, 0.1]))
_POINTS = points([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
FALLING = _POINTS[_POINTS.site == "attn_out"]
# A table of which the claim holds, its function, and the columns of numbers that it compares.
JUDGED: dict[str, tuple[pd.DataFrame, Judge, list[str]]] = {
    "C6": (FALLING, verdicts.c6, ["dead_fraction", "effective_rank_fraction"]),
    "C7": (BOTH, partial(verdicts.c7, dead_window=WINDOW), LOST),
    "C7 by size": (sizes(GROWS, CURED), verdicts.c7_by_size, ["dead_fraction"]),
    "C8": (sweep(CURVE), verdicts.c8, ["dead_fraction", "fvu"]),
    "C9": (runs(THREE), partial(verdicts.c9, dead_window=WINDOW), ["dead_fraction"]),
    "C10": (BOTH, partial(verdicts.c10, dead_window=WINDOW), ["dead_fraction", "fvu"]),
    "C11": (SITES, verdicts.c11, ["dead_fraction"]),
    "C12": (drift(), verdicts.c12, ["dead_fraction", "decoder_inside"]),
}


@pytest.mark.parametrize("claim", JUDGED)
def test_no_verdict_without_what_is_compared(claim: str) -> None:
    table, judge, measures = JUDGED[claim]
    assert holds(judge(table)) is True
    compared = {"random"} if claim == "C6" else set(table.method) - {"ASI, automatic d_init"}
    for method in compared:
        assert judge(table[table.method != method]) is None, method
    for column in [*measures, "method", "split"]:
        with pytest.raises(DataError, match=column):
            judge(table.drop(columns=column))


@pytest.mark.parametrize("claim", JUDGED)
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_what_was_not_measured_is_not_judged(claim: str, nothing: float | None) -> None:
    table, judge, measures = JUDGED[claim]
    for measure in measures:
        empty = pd.Series([nothing] * len(table), index=table.index)
        assert holds(judge(table.assign(**{measure: empty}))) is None, measure
        part = table[measure].where(table.method == "ASI" if claim not in ("C6", "C12") else table.seed != 0)
        if claim != "C6":  # its points are means over the seeds there are
            assert holds(judge(table.assign(**{measure: part}))) is None, measure


def test_c11_needs_all_three_sites() -> None:
    for site in ("attn_out", "mlp_out", "resid_post"):
        assert verdicts.c11(SITES[SITES.site != site]) is None


@given(st.sampled_from(sorted(JUDGED)), st.permutations([0, 1, 7]), st.randoms(use_true_random=False))
def test_neither_order_of_rows_nor_names_of_seeds_change_anything(
    claim: str, seeds: list[int], random: Any
) -> None:
    table, judge, _ = JUDGED[claim]
    order = list(range(len(table)))
    random.shuffle(order)
    shuffled = table.iloc[order]
    assert judge(shuffled.assign(seed=shuffled.seed.map(dict(enumerate(seeds))))) == judge(table)
