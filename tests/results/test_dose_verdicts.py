"""Answers on doses on made-up tables: measures that decide, curves that fit elsewhere, lost features."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from made_up_beyond import doses, known

from asi_lens.results.dose_verdicts import (
    are_the_right_features_lost,
    dose_and_response,
    dose_points,
    falling_curve,
)


def dosed(table: pd.DataFrame) -> list[str]:
    """Effective rank, dimension of 99 %, participation ratio: changed spectra, then other sites; the tail."""
    return [one.answer for one in dose_and_response(table)]


def test_death_follows_the_tail_or_the_head() -> None:
    tail = dosed(doses(lambda rank, dimension, head: (1 - rank) / 2))
    assert tail[:3] == ["yes", "yes", "no"]
    assert tail[3:5] == ["yes", "yes"]
    assert tail[6] == "yes"
    head = dosed(doses(lambda rank, dimension, head: (70 - head) / 100))
    assert head[:3] == ["no", "no", "yes"]
    assert (head[5], head[6]) == ("yes", "no")
    assert dosed(doses(lambda rank, dimension, head: rank / 2))[:3] == ["no"] * 3


def test_other_sites_off_the_curve_are_told() -> None:
    table = doses(lambda rank, dimension, head: (1 - rank) / 2)
    other = table["shape"] == "other site"
    off = table.assign(dead_fraction=table.dead_fraction.where(~other, table.effective_rank_fraction))
    assert dosed(off)[:3] == ["yes", "yes", "no"]
    assert dosed(off)[3:6] == ["no"] * 3
    assert dosed(table[~other])[3:] == ["not testable here"] * 4
    assert dosed(table.assign(dead_fraction=0.0)) == ["not testable here"] * 7
    assert dosed(table.assign(dead_fraction=math.nan)) == ["not testable here"] * 7


def test_a_second_place_is_judged_by_itself_and_against_the_first() -> None:
    table = doses(lambda rank, dimension, head: (1 - rank) / 2, others=0)
    second = table.assign(site="mlp_out", dead_fraction=table.effective_rank_fraction / 2)
    found = dose_and_response(pd.concat([table, second]))
    assert [one.answer for one in found[:3]] == ["yes", "yes", "no"]
    assert [one.answer for one in found[3:6]] == ["no"] * 3
    assert found[3].question.startswith("mlp_out 3: ")
    points = dose_points(pd.concat([table, second]))
    assert set(points[points.dosed].site) == {"attn_out"}
    assert set(points[~points.dosed].site) == {"mlp_out"}


def test_the_falling_curve_is_isotonic_regression() -> None:
    points = dose_points(doses(lambda rank, dimension, head: (1 - rank) / 2))
    curve = falling_curve(points, "effective_rank_fraction")
    assert curve.inside == pytest.approx(0)
    assert list(curve.y) == pytest.approx(list((1 - curve.x) / 2))
    # Values that rise are pooled to their mean, the others stay.
    shares = dict(zip(curve.x, [0.4, 0.3, 0.1, 0.2, 0.0, 0.0, 0.3], strict=True))
    bent = points.assign(dead_fraction=points.effective_rank_fraction.map(shares).fillna(0.0))
    found = falling_curve(bent, "effective_rank_fraction")
    assert list(found.y) == pytest.approx([0.4, 0.3, 0.15, 0.15, 0.1, 0.1, 0.1])
    assert (np.diff(found.y) <= 1e-12).all()
    expected = math.sqrt((2 * 0.05**2 + 2 * 0.1**2 + 0.2**2) / 7)
    assert found.inside == pytest.approx(expected)


def right(table: pd.DataFrame) -> list[str]:
    return [one.answer for one in are_the_right_features_lost(table)]


def test_a_low_rank_that_loses_rare_features_and_a_start_that_keeps_them() -> None:
    def recovered(method: str, r: int, fifth: int | None) -> float:
        better = 0.1 if method == "ASI" and r < 32 else 0.0
        return r / 64 + better + (0.0 if fifth is None else 0.05 * (3 - fifth))

    table = known(recovered, lambda method, r: 0.5 - r / 80 - 0.15 * (method == "ASI" and r < 32))
    assert right(table) == ["yes"] * 5
    assert are_the_right_features_lost(table)[0].numbers == "rank 32 50 %, rank 8 12 %; 2 of 2 cases"
    once = table.assign(recovered=table.recovered.where((table.seed == 0) | (table.method != "ASI"), 0.0))
    assert right(once)[1] == "no", "in one seed alone"
    assert right(table.assign(live_recovered=0.4))[3] == "no"


def test_nothing_is_lost_or_the_other_way_round() -> None:
    same = known(lambda method, r, fifth: 0.5)
    assert right(same) == ["no", "no", "no", "yes", "not testable here"]
    assert right(known(lambda method, r, fifth: 1 / r + 0.01 * (fifth or 0)))[:3] == ["no", "no", "no"]
    assert right(same[same.r == 8])[0] == "not testable here"
    assert right(same[same.method == "random"])[1] == "not testable here"
