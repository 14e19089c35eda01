"""Claims on dead features where nothing died, and where a difference says nothing: no verdict either way."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from made_up_claims import ASI, RANDOM, SEEDS, WINDOW, End, drift, gains, holds, paired, runs, sizes

from asi_lens.results import dictionary_verdicts as verdicts

ALIVE = dataclasses.replace(ASI, dead=0.0, silent=0.0)
NOTHING = dataclasses.replace(RANDOM, dead=0.0, silent=0.0)
AUX, SPARSE = End(0.1, 0.2), End(0.001, 0.002)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("part", ["dead", "silent"])
def test_where_nothing_dies_nothing_is_kept_alive(part: str, seeds: int) -> None:
    none = {part: 0.0}
    random = [dataclasses.replace(RANDOM, **none) if seed < seeds else RANDOM for seed in SEEDS]
    asi = [dataclasses.replace(ASI, **none)] * 3
    table = runs({"random": random, "ASI": asi})
    assert holds(verdicts.c7(table, WINDOW)) is None
    assert holds(verdicts.c7(table, WINDOW, paired([(-0.1, -0.1)] * 3))) is None
    assert holds(verdicts.c10(table, WINDOW)) is None
    # ASI that kills where nothing else dies is refuted; ASI that leaves nothing dead is not a tie.
    assert holds(verdicts.c7(runs({"random": [NOTHING] * 3, "ASI": [ASI] * 3}), WINDOW)) is False
    assert holds(verdicts.c7(runs({"random": [RANDOM] * 3, "ASI": [ALIVE] * 3}), WINDOW)) is True


@pytest.mark.parametrize(
    ("aux", "asi", "sparse", "expected"),
    [
        ([AUX] * 2, [ASI] * 2, [SPARSE] * 2, True),
        ([NOTHING] * 2, [NOTHING] * 2, [NOTHING] * 2, None),
        (
            [AUX] * 2,
            [ALIVE] * 2,
            [NOTHING] * 2,
            "partly",
        ),  # AuxK is worse; which Adam is better, nobody knows
        ([NOTHING] * 2, [NOTHING] * 2, [SPARSE] * 2, False),  # sparse Adam is worse
        ([SPARSE, SPARSE], [ASI, ASI], [SPARSE, AUX], False),  # AuxK is better in all, Adam in one
        ([AUX, SPARSE], [ASI, ASI], [AUX, AUX], False),  # the same with the two parts exchanged
        ([AUX, SPARSE], [ASI, ASI], [SPARSE, AUX], None),  # seeds disagree about both
    ],
)
def test_c9_is_refuted_by_either_order(aux: Any, asi: Any, sparse: Any, expected: object) -> None:
    table = runs({"random + AuxK": aux, "ASI": asi, "ASI + sparse Adam": sparse})
    assert holds(verdicts.c9(table, WINDOW)) == expected


@pytest.mark.parametrize(("dead", "silent", "expected"), [(0.1, 0.15, True), (0.11, 0.03, "partly")])
def test_c10_asks_for_half_of_the_dead_units(dead: float, silent: float, expected: object) -> None:
    some = dataclasses.replace(ASI, dead=dead, silent=silent)
    assert holds(verdicts.c10(runs({"random": [RANDOM] * 3, "ASI": [some] * 3}), WINDOW)) == expected


@pytest.mark.parametrize(
    ("random", "asi", "expected"),
    [
        ([0.07, 0.7, 0.9], [0.0, 0.3, 0.45], True),  # half at the largest
        ([0.07, 0.7, 0.9], [0.0, 0.4, 0.8], "partly"),  # fewer, but most are still silent
        ([0.0, 0.7, 0.9], [0.0, 0.3, 0.4], True),  # nothing is silent in the smallest dictionary
        ([0.0, 0.7, 0.9], [0.1, 0.3, 0.4], False),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], None),
    ],
)
def test_c7_by_size_asks_for_half_of_the_silent(random: Any, asi: Any, expected: object) -> None:
    tables = [{512 * 8**i: [share] for i, share in enumerate(shares)} for shares in (random, asi)]
    assert holds(verdicts.c7_by_size(sizes(*tables))) == expected


def test_c11_needs_silent_features_on_attention_outputs() -> None:
    harm: Any = {"mlp_out": ([0.0, 0.0], [0.01, 0.0]), "resid_post": ([0.0, 0.0], [0.01, 0.0])}
    assert holds(verdicts.c11(gains(**harm, attn_out=([0.0, 0.0], [0.0, 0.0])))) is None


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("gain", [0.0, -0.01])
def test_c12_needs_a_benefit_that_can_be_lost(gain: float, seeds: int) -> None:
    """ASI harms at a high l0, too: that is less than half of no benefit, but not a benefit lost."""
    table = drift()
    harmed = (table.method == "ASI, low l0") & (table.seed < seeds)
    assert holds(verdicts.c12(table)) is True
    assert (
        holds(verdicts.c12(table.assign(dead_fraction=table.dead_fraction.mask(harmed, 0.4 - gain)))) is None
    )
