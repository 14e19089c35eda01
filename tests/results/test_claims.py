"""The claims table: its rows are checked, sorted by number, and made of a notebook's verdicts."""

from __future__ import annotations

import dataclasses

import jaxtyping
import pytest

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.results.claims import ClaimRow, claim_order, rows_of

# Under test jaxtyping sees a wrong word before the row does (test_tables has rows that it does not see).
REFUSED = (UnknownNameError, jaxtyping.TypeCheckError)
CLAIM = ClaimRow(
    "C1", "statement", "0.6", "0.5", "0.4 to 0.6", "65,536 tokens", "supported", "01_rank_curves"
)


def test_a_claim_has_a_number_and_one_of_four_verdicts() -> None:
    with pytest.raises(OptionError, match="C1, C2"):
        dataclasses.replace(CLAIM, claim="claim 1")
    with pytest.raises(REFUSED, match="not testable here"):
        dataclasses.replace(CLAIM, verdict="maybe")
    assert dataclasses.replace(CLAIM, verdict="partly supported").verdict == "partly supported"


def test_claims_are_sorted_by_number() -> None:
    found = [dataclasses.replace(CLAIM, claim=claim) for claim in ("C10", "C2", "C1")]
    assert [row.claim for row in sorted(found, key=claim_order)] == ["C1", "C2", "C10"]


def test_numbers_without_a_spread_have_none() -> None:
    told = {"claim": "C3", "statement": "s", "paper_value": "p", "over": "layers", "budget": "b"}
    (row,) = rows_of([{**told, "verdict": "supported", "numbers": [{"name": "x", "value": 2.0}]}], "02_x")
    assert (row.our_value, row.spread, row.notebook) == ("x 2", "", "02_x")
