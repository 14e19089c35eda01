"""Every claim has its function, and gives on published tables the verdict that stands beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from asi_lens.base.errors import DataError
from asi_lens.results import verdicts
from asi_lens.results.judging import Verdict

FIGURES = Path(__file__).resolve().parents[2] / "figures"
PUBLISHED = [
    pytest.param(path.parent, *row, id=f"{path.parent.name}-{row[0]}-{row[1]}")
    for path in sorted(FIGURES.rglob("claims.csv"))
    for row in pd.read_csv(path)[["claim", "notebook", "verdict"]].itertuples(index=False)
]
TARGET = 0.9  # of the loss: `recovered_target` of notebook 02, the same in every profile


def window(table: pd.DataFrame) -> int:
    """The one that `dead_window` named: the longest of the training rows."""
    return int(table.dead_window_tokens[table.split == "train"].max())


def judge(claim: str, notebook: str, read: Callable[[str], pd.DataFrame]) -> Verdict | None:
    table = read(notebook)
    if claim == "C1":
        return verdicts.c1(table, table.model[0], table.corpus[0])  # the main text is measured first
    if claim == "C3":
        return verdicts.c3(table, TARGET)
    if claim == "C4":
        return verdicts.c4(table, read("01_rank_curves"))
    if claim == "C5":
        return verdicts.c5(table, read("03_head_overlap"))
    if claim == "C7" and notebook == "06_dictionary_size":
        return verdicts.c7_by_size(table)
    if claim == "C7" and notebook == "07_layers_and_sites":
        return verdicts.c7_spliced(read("07_paired"))
    if claim == "C7":
        try:
            return verdicts.c7(table, window(table), read("04_paired"))
        except FileNotFoundError:  # published before losses were paired
            return verdicts.c7(table, window(table))
    function = getattr(verdicts, claim.lower())
    return function(table, window(table)) if claim in ("C9", "C10") else function(table)


@pytest.mark.parametrize(("folder", "claim", "notebook", "expected"), PUBLISHED)
def test_published_tables_give_the_published_verdict(
    folder: Path, claim: str, notebook: str, expected: str
) -> None:
    if not (folder / f"{notebook}.csv").exists():
        pytest.skip(f"{notebook}.csv is not there")
    try:
        verdict = judge(claim, notebook, lambda name: pd.read_csv(folder / f"{name}.csv"))
    except DataError as error:
        if "has no column" not in str(error):
            raise
        pytest.skip(f"{notebook}.csv was published before its columns: {error}")
    assert verdict is not None
    assert verdict.claim == claim
    assert verdict.verdict(folder.name) == expected
    assert 1 <= len(verdict.numbers) <= 4
    assert len({number.name for number in verdict.numbers}) == len(verdict.numbers)


def test_every_claim_has_its_function_and_says_where_the_paper_makes_it() -> None:
    functions = {name for name in vars(verdicts) if re.fullmatch(r"c\d+(_by_size|_spliced)?", name)}
    assert functions == {*(f"c{n}" for n in range(1, 13)), "c7_by_size", "c7_spliced"}
    for name in functions:
        assert re.search(r"paper|abstract|figure", getattr(verdicts, name).__doc__), name
