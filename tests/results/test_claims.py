"""The claims table, and how claims are judged."""

from __future__ import annotations

import csv
import dataclasses
import multiprocessing
from pathlib import Path

import jaxtyping
import pandas as pd
import pytest

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.results import claims
from asi_lens.results.claims import ClaimRow, drop_claims, read_claims, write_claim

# Under test jaxtyping sees a wrong word before the row does (test_tables has rows that it does not see).
REFUSED = (UnknownNameError, jaxtyping.TypeCheckError)
CLAIM = ClaimRow(
    "C1", "statement", "0.6", "0.5", "0.4 to 0.6", "65,536 tokens", "supported", "01_rank_curves"
)


def test_a_claim_has_a_number_and_one_of_three_verdicts() -> None:
    with pytest.raises(OptionError, match="C1, C2"):
        dataclasses.replace(CLAIM, claim="claim 1")
    with pytest.raises(REFUSED, match="not testable here"):
        dataclasses.replace(CLAIM, verdict="maybe")
    assert claims.verdict(True, "quick") == "supported"
    assert claims.verdict(False, "full") == "not supported"
    assert claims.verdict(True, "smoke") == "not testable here"
    assert claims.verdict(None, "full") == "not testable here"


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
    found = claims.final_numbers(pd.DataFrame(rows), 20)
    assert found.columns.tolist() == [
        "dead_in_training",
        "silent_held_out",
        "fvu",
        "l0",
        *losses,
    ]
    assert found.loc["b", 0].tolist() == [0.2, 0.3, 0.5, 4, 0.1, 0.01, 0.2]
    words = "b 20.00% dead, 30.0% silent held out, FVU 0.5000, KL 0.2000, delta loss 0.1000 "
    assert claims.told("b", found.loc["b", 0]) == words + "(standard error 0.0100)"


@pytest.mark.parametrize(("delta", "higher"), [(0.05, False), (0.12, False), (0.13, False), (0.15, True)])
def test_a_loss_is_higher_that_is_beyond_two_standard_errors(delta: float, higher: bool) -> None:
    ours, theirs = (
        pd.DataFrame({"cross_entropy_delta": [one, 0.5], "cross_entropy_delta_error": [error, error]})
        for one, error in ((delta, 0.015), (0.1, 0.008))
    )
    assert claims.loss_is_higher(ours, theirs).tolist() == [higher, False]


def test_a_claim_of_parts_needs_every_seed_either_way() -> None:
    holds, mixed, fails = [True, True], [True, False], [False, False]
    assert claims.in_every_seed(pd.DataFrame({"a": holds, "b": holds})) is True
    assert claims.in_every_seed(pd.DataFrame({"a": holds, "b": mixed})) is None
    assert claims.in_every_seed(pd.DataFrame({"a": mixed, "b": fails})) is False


def test_claims_replace_their_own_row_and_are_sorted_by_number(tmp_path: Path) -> None:
    for claim, notebook in (
        ("C10", "07_lorsa"),
        ("C2", "01_rank_curves"),
        ("C1", "01_rank_curves"),
        ("C2", "00_a"),
    ):
        write_claim(tmp_path, dataclasses.replace(CLAIM, claim=claim, notebook=notebook))
    write_claim(tmp_path, dataclasses.replace(CLAIM, claim="C2", our_value="0.9"))
    rows = read_claims(tmp_path)
    assert [(r.claim, r.notebook) for r in rows] == [
        ("C1", "01_rank_curves"),
        ("C2", "00_a"),
        ("C2", "01_rank_curves"),
        ("C10", "07_lorsa"),
    ]
    assert rows[2].our_value == "0.9"
    with (tmp_path / "claims.csv").open() as file:
        assert [line["claim"] for line in csv.DictReader(file)] == ["C1", "C2", "C2", "C10"]


def test_claims_of_a_notebook_can_be_dropped(tmp_path: Path) -> None:
    other = dataclasses.replace(CLAIM, claim="C3", notebook="02_downstream_loss")
    write_claim(tmp_path, CLAIM)
    write_claim(tmp_path, other)
    assert drop_claims(tmp_path, "01_rank_curves") == [CLAIM]
    assert read_claims(tmp_path) == [other]
    assert drop_claims(tmp_path, "01_rank_curves") == []
    assert drop_claims(tmp_path, "02_downstream_loss") == [other]
    assert not (tmp_path / "claims.csv").exists()


def test_a_damaged_claims_table_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "claims.csv").write_text("claim,statement\nC1,x\n")
    with pytest.raises(DataError, match="missing columns"):
        write_claim(tmp_path, CLAIM)
    assert (tmp_path / "claims.csv").read_text() == "claim,statement\nC1,x\n"


def _claim(folder: Path, number: int) -> None:
    write_claim(folder, dataclasses.replace(CLAIM, claim=f"C{number}"))


def test_two_processes_do_not_lose_each_others_claims(tmp_path: Path) -> None:
    context = multiprocessing.get_context(
        "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    )
    workers = [context.Process(target=_claim, args=(tmp_path, n)) for n in range(1, 9)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [row.claim for row in read_claims(tmp_path)] == [f"C{n}" for n in range(1, 9)]
