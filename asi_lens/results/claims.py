"""The claims table: what the paper says, what came out here, and how it is judged.

Its rows are written and read by `tables`; the tables that claims are judged by are in `results`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from asi_lens.base.errors import OptionError
from asi_lens.base.files import locked
from asi_lens.results.rows import LOSSES
from asi_lens.results.tables import Row, read_rows, write_rows

Verdict = Literal["supported", "not supported", "not testable here"]

CLAIMS_FILE = "claims.csv"


@dataclass(frozen=True)
class ClaimRow(Row):
    """One claim of the paper against what came out here (`claims.csv`)."""

    claim: str
    """`C1`, `C2`, ..."""
    statement: str
    paper_value: str
    our_value: str
    spread: str
    """Over seeds, layers or corpora; says which."""
    budget: str
    """Model, text, tokens ... behind our value."""
    verdict: Verdict
    notebook: str
    """Name of the notebook that tested it, as `01_rank_curves`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"C[1-9]\d*", self.claim):
            raise OptionError(f"claim={self.claim!r} is not allowed; claim must be C1, C2, ...")


def verdict(holds: bool | None, profile: str) -> Verdict:
    """The verdict on a claim that was put to the test.

    There is none where seeds disagree (`holds` is None), and a `smoke` run is too small to give one.
    """
    if profile == "smoke" or holds is None:
        return "not testable here"
    return "supported" if holds else "not supported"


def in_every_seed(better: pd.DataFrame) -> bool | None:
    """Whether a claim of several parts holds: a row per seed, a column per part.

    True if every part holds in every seed, False if one fails in every seed; None if it depends on the seed.
    """
    if bool(better.all(axis=None)):
        return True
    return False if bool((~better).all(axis=0).any()) else None


def final_numbers(table: pd.DataFrame, dead_window: int) -> pd.DataFrame:
    """The end of every run of a table of `DeadFeatureRow`s, by method and seed.

    Columns: `dead_in_training` (over the last `dead_window` tokens), and on held-out text `silent_held_out`,
    `fvu`, `l0`, `cross_entropy_delta`, `cross_entropy_delta_error`, `kl`.
    """
    who = ["method", "seed"]
    train = table[(table.split == "train") & (table.dead_window_tokens == dead_window)]
    last = train[train.tokens == train.groupby(who).tokens.transform("max")].set_index(who)
    held = table[table.split == "held_out"].set_index(who)
    numbers = held[["dead_fraction", "fvu", "l0", *LOSSES]]
    numbers = numbers.rename(columns={"dead_fraction": "silent_held_out"})
    numbers.insert(0, "dead_in_training", last.dead_fraction)
    return numbers


def told(name: str, numbers: pd.Series) -> str:
    """A row of `final_numbers` in words, for the claims table."""
    return (
        f"{name} {numbers.dead_in_training:.2%} dead, {numbers.silent_held_out:.1%} silent held out, "
        f"FVU {numbers.fvu:.4f}, KL {numbers.kl:.4f}, delta loss {numbers.cross_entropy_delta:.4f} "
        f"(standard error {numbers.cross_entropy_delta_error:.4f})"
    )


def loss_is_higher(numbers: pd.DataFrame, others: pd.DataFrame) -> pd.Series:
    """Whether the language model loses more, by more than two standard errors of the difference.

    Both are rows of `final_numbers` of the same runs' index. Dictionaries of all seeds are judged on the same
    text, so that seeds may agree about a difference which other text would not show: the error is over
    sequences of text. It is that of independent samples, an upper bound where losses rise and fall together.
    """
    delta, error = (
        [table[column] for table in (numbers, others)]
        for column in ("cross_entropy_delta", "cross_entropy_delta_error")
    )
    return delta[0] - delta[1] > 2 * (error[0] ** 2 + error[1] ** 2) ** 0.5


def write_claim(folder: Path | str, row: ClaimRow) -> Path:
    """Put `row` into `folder/claims.csv`, in place of the one with its claim and notebook.

    The table stays sorted by the claim's number. Safe between processes.
    """
    path = Path(folder) / CLAIMS_FILE
    with locked(path.with_name(".claims")):
        others = [] if not path.exists() else read_rows(path, ClaimRow)
        kept = [old for old in others if (old.claim, old.notebook) != (row.claim, row.notebook)]
        rows = sorted([*kept, row], key=claim_order)
        return write_rows(path, rows)


def drop_claims(folder: Path | str, notebook: str) -> list[ClaimRow]:
    """Take the rows of a notebook out of `folder/claims.csv`; returns them."""
    path = Path(folder) / CLAIMS_FILE
    with locked(path.with_name(".claims")):
        rows = read_claims(folder)
        dropped = [row for row in rows if row.notebook == notebook]
        if len(dropped) == len(rows):
            path.unlink(missing_ok=True)
        elif dropped:
            write_rows(path, [row for row in rows if row.notebook != notebook])
    return dropped


def read_claims(folder: Path | str) -> list[ClaimRow]:
    """The claims table of a folder, sorted; empty if there is none."""
    path = Path(folder) / CLAIMS_FILE
    return sorted(read_rows(path, ClaimRow), key=claim_order) if path.exists() else []


def claim_order(row: ClaimRow) -> tuple[int, str]:
    """Sorting key: C2 before C10."""
    return int(row.claim[1:]), row.notebook
