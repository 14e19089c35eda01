"""A run compared with the published one: exact for the same arithmetic, else by stated tolerances."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from asi_lens.base.errors import DataError
from asi_lens.reproduce import compare as module
from asi_lens.reproduce.compare import EXACT, NEAR, compare, compare_tables, main
from asi_lens.results.sidecar import read_sidecars, write_sidecar

VERDICT = {"claim": "C7", "verdict": "supported"}


def table(shift: float = 0.0, seeds: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "method": name,
                "seed": seed,
                "tokens": tokens,
                "dead": 0.1 * seed + tokens + shift,
                "fvu": None,
            }
            for name in ("random", "ASI")
            for seed in range(seeds)
            for tokens in (1, 2)
        ]
    )


def leave(folder: Path, frame: pd.DataFrame, dtype: str = "float32", **changes: Any) -> Path:
    """A folder as a notebook leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "04_curves.csv", index=False)
    sidecar = {
        "notebook": "04_curves",
        "parameters": {"k": 32, "output_folder": str(folder)},
        "seeds": [0, 1, 2],
        "sources": {f"model ({dtype})": "f"},
        "figures": {},
        "tables": ["04_curves"],
        "verdicts": [VERDICT],
        "machine": {"cpu": "some", "cores": 2, "torch_cpu_capability": "AVX2"},
        "versions": {"torch": "2.13.0"},
        "git": {"commit": "0123456789abcdef"},
        "finished": "2026-01-02T03:04:05+00:00",
    }
    write_sidecar(folder, {**sidecar, **changes})
    return folder


def test_the_same_bytes_hold_and_a_last_digit_does_not() -> None:
    same = compare_tables("t", table(), table(), exact=True)
    assert same.holds
    assert (same.rule, same.numbers, same.agree) == (EXACT, 60, 60)
    changed = table()
    changed.loc[3, "dead"] += 1e-9
    off = compare_tables("t", changed, table(), exact=True)
    assert not off.holds
    assert off.apart == ("dead (92%)",)


@pytest.mark.parametrize(("shift", "holds"), [(0.19, True), (0.21, False), (-0.19, True), (-0.21, False)])
def test_means_may_differ_by_the_range_over_seeds(shift: float, holds: bool) -> None:
    found = compare_tables("t", table(shift), table(), exact=False)
    assert (found.rule, found.holds) == (NEAR, holds)


@pytest.mark.parametrize(("shift", "holds"), [(0.039, True), (0.041, False)])
def test_without_spread_a_number_may_differ_by_a_fiftieth(shift: float, holds: bool) -> None:
    assert compare_tables("t", table(shift, seeds=1), table(seeds=1), exact=False).holds == holds


def test_nine_of_ten_numbers_are_asked_for() -> None:
    old = pd.DataFrame({"layer": range(20), "rank": [10.0] * 20})
    new = old.copy()
    new.loc[[4, 7], "rank"] = 1.0
    assert compare_tables("t", new, old, exact=False).holds
    new.loc[9, "rank"] = 1.0
    found = compare_tables("t", new, old, exact=False)
    assert found.apart == ("rank (85%)",)


def test_a_number_that_is_there_in_one_run_alone_disagrees() -> None:
    new = table().assign(fvu=0.5)
    assert compare_tables("t", new, table(), exact=False).apart == ("fvu (0%)",)


def test_times_are_not_compared() -> None:
    new, old = (table().assign(train_seconds=seconds) for seconds in (1.0, 2.0))
    found = compare_tables("t", new, old, exact=True)
    assert (found.holds, found.numbers) == (True, 60)


def test_other_rows_columns_or_names_are_not_compared_by_place() -> None:
    assert "12 rows, published 8" in compare_tables("t", table(), table(seeds=2), exact=False).reason
    assert (
        "other columns: fvu" in compare_tables("t", table().drop(columns="fvu"), table(), exact=False).reason
    )
    renamed = table().replace({"method": {"ASI": "orthogonal"}})
    assert compare_tables("t", renamed, table(), exact=False).apart == ("method (50%)",)


def test_dtype_and_instructions_decide_which_tolerance(tmp_path: Path) -> None:
    old = leave(tmp_path / "old", table())
    rules = [
        compare(leave(tmp_path / "new", table(), **changes), old)[0].rule
        for changes in (
            {},
            {"dtype": "bfloat16"},
            {"machine": {"cpu": "some", "cores": 2, "torch_cpu_capability": "AVX512"}},
        )
    ]
    assert rules == [EXACT, NEAR, NEAR]


def test_another_setting_or_verdict_is_named(tmp_path: Path) -> None:
    old = leave(tmp_path / "old", table())
    other = leave(tmp_path / "a", table(), parameters={"k": 16, "more": 1})
    assert compare(other, old)[0].reason == "other parameters: k, more"
    judged = leave(tmp_path / "b", table(), verdicts=[{**VERDICT, "verdict": "not supported"}])
    assert compare(judged, old)[1].apart == ("C7: not supported, published supported",)
    assert compare(leave(tmp_path / "c", table(), tables=[]), old)[0].reason == "the run has no such table"
    with pytest.raises(DataError, match="no run of a notebook"):
        compare(tmp_path / "nothing", old)


def test_the_command_writes_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    monkeypatch.delenv("ASI_LENS_FIGURES", raising=False)
    fresh = leave(tmp_path / "figures" / "m" / "quick", table())
    leave(tmp_path / "figures" / "published" / "m" / "quick", table())
    assert main(["--model", "m"]) == 0
    assert "2 of 2 comparisons hold" in (fresh / module.REPORT).read_text()
    sidecar = read_sidecars(fresh)["04_curves"]
    (fresh / "04_curves.json").write_text(json.dumps({**sidecar, "parameters": {"k": 1}}))
    report = tmp_path / "report.md"
    assert main(["--model", "m", "--report", str(report)]) == 1
    assert "**differs**: other parameters: k" in report.read_text()
    assert "| 04_curves |" in capsys.readouterr().out
    (fresh / "04_curves.json").write_text(json.dumps({**sidecar, "git": None}))
    assert main(["--model", "m"]) == 0
    assert ", no git checkout, " in (fresh / module.REPORT).read_text()
    assert main(["--model", "other"]) == 1
    assert "stopped:" in capsys.readouterr().err
