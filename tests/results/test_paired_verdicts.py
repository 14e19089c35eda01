"""C7's loss by paired differences on made-up tables."""

from __future__ import annotations

import dataclasses
import math

import pytest
from made_up_claims import ASI, RANDOM, WINDOW, holds, paired, runs, told

from asi_lens.results.dictionary_verdicts import c7
from asi_lens.results.paired_verdicts import c7_spliced


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([(-0.1, -0.1)] * 3, True),
        ([(-0.1, -0.1), (-0.1, -0.015), (-0.1, -0.1)], "partly"),
        ([(-0.1, 0.0)] * 3, "partly"),
        ([(-0.1, -0.1), (0.0, -0.1), (-0.1, -0.1)], None),
        ([(0.1, -0.1)] * 3, False),
        ([(-0.015, -0.1)] * 3, None),  # within the error
        ([(0.1, -0.1), (0.1, -0.1), (0.015, -0.1)], None),
    ],
)
def test_kl_decides_and_the_loss_completes(differences: list[tuple[float, float]], expected: object) -> None:
    assert holds(c7_spliced(paired(differences))) == expected


def test_what_is_missing_is_not_judged() -> None:
    table = paired([(-0.1, -0.1)] * 2)
    assert c7_spliced(table[table.method != "ASI"]) is None
    assert holds(c7_spliced(table.assign(kl_error=math.nan))) is None
    assert told(c7_spliced(table)) == {
        "KL, ASI minus random (paired, ± 0.01)": "-0.1 (-0.1 to -0.1)",
        "loss, ASI minus random (paired, ± 0.01)": "-0.1 (-0.1 to -0.1)",
    }


def test_c7_takes_the_paired_differences_where_there_are_any() -> None:
    # Alone, a KL that is 0.001 lower is lower; on the same text it may be within the error.
    table = runs({"random": [RANDOM] * 3, "ASI": [ASI] * 3})
    assert holds(c7(table, WINDOW)) is True
    assert holds(c7(table, WINDOW, paired([(-0.1, 0.015)] * 3))) is True, "a loss within two errors"
    assert holds(c7(table, WINDOW, paired([(-0.1, 0.1)] * 3))) == "partly"
    assert holds(c7(table, WINDOW, paired([(-0.015, -0.1)] * 3))) == "partly"
    # A loss that its own error cannot tell from the other is told by the pair.
    noisy = dataclasses.replace(ASI, delta=RANDOM.delta + 0.02)
    table = runs({"random": [RANDOM] * 3, "ASI": [noisy] * 3})
    assert holds(c7(table, WINDOW)) is True
    assert holds(c7(table, WINDOW, paired([(-0.1, 0.02)] * 3, error=0.001))) == "partly"
    assert holds(c7(table, WINDOW, paired([(-0.1, -0.1)] * 2))) is None, "a seed without a pair"
    assert list(told(c7(table, WINDOW, paired([(-0.1, -0.1)] * 3))))[:2] == [
        "random, silent held out",
        "ASI, silent held out",
    ]
