"""The claims table: the paper's claims, our values, and the verdicts.

`tables` writes and reads the rows; `rows` has the tables that the verdicts are computed from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asi_lens.results.judging import Number, Outcome, require_claim
from asi_lens.results.tables import Row

CLAIMS_FILE = "claims.csv"


@dataclass(frozen=True)
class ClaimRow(Row):
    """One claim of the paper with our value and verdict (`claims.csv`)."""

    claim: str
    """`C1`, `C2`, ..."""
    statement: str
    paper_value: str
    our_value: str
    spread: str
    """Spread of our value, and over what: seeds, layers or corpora."""
    budget: str
    """Model, text, tokens ... that our value was measured with."""
    verdict: Outcome
    notebook: str
    """Name of the notebook that tested the claim, such as `01_rank_curves`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_claim(self.claim)


def rows_of(verdicts: Sequence[Mapping[str, Any]], notebook: str) -> list[ClaimRow]:
    """Return rows of the claims table for the verdicts in a notebook's sidecar."""
    rows = []
    for one in verdicts:
        numbers = [Number(**number) for number in one["numbers"]]
        spread = [f"{number.name} {number.range}" for number in numbers if number.range]
        values: dict[str, Any] = {
            **{key: one[key] for key in ("claim", "statement", "paper_value", "budget", "verdict")},
            "our_value": "; ".join(f"{number.name} {number.middle}" for number in numbers),
            "spread": f"over {one['over']}: {'; '.join(spread)}" if spread else "",
            "notebook": notebook,
        }
        rows.append(ClaimRow(**values))
    return rows


def claim_order(row: ClaimRow) -> tuple[int, str]:
    """Return a sorting key that puts C2 before C10."""
    return int(row.claim[1:]), row.notebook
