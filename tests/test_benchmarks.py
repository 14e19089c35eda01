"""The benchmarks' results file and the tables that are made of it."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("run")
    yield module
    sys.modules.pop("run", None)


def test_tables_are_those_of_the_results(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(run.README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(run, "README", copy)
    if run.RESULTS.exists():
        run.write_tables(json.loads(run.RESULTS.read_text(encoding="utf-8")))
    assert copy.read_text(encoding="utf-8") == (BENCHMARKS / "README.md").read_text(encoding="utf-8")


def test_every_benchmark_has_a_place_a_table_and_a_script(run: Any) -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert run.COMMANDS.keys() == run.TABLES.keys()
    assert set(re.findall(r"<!-- (\w+) -->", text)) == run.COMMANDS.keys()
    scripts = {command[0] for command in run.COMMANDS.values()}
    # Run by hand: they need a GPU or its results, or trainers of other projects.
    apart = {"run.py", "ways.py", "gpu.py", "headline.py", "other_trainers.py"}
    assert scripts == {path.name for path in BENCHMARKS.glob("*.py")} - apart


def test_results_are_recorded_beside_others(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results.json"
    readme.write_text("<!-- scaling -->\nold\n<!-- /scaling -->\n<!-- growth -->\n<!-- /growth -->\nrest\n")
    monkeypatch.setattr(run, "README", readme)
    monkeypatch.setattr(run, "RESULTS", results)
    printed = 'words\n{"mesh": "1x2", "bytes": 12345}\n{"mesh": "2x2", "bytes": 1}\n'
    run.record("scaling", run.objects(printed))
    points = [
        {"varied": "d_sae", "d_sae": size, "seconds": size / 1000, "peak_mib": size}
        for size in (1000, 20_000)
    ]
    exponents = {"d_sae": {"seconds": 1.0, "peak_mib": 0.98}}
    run.record("growth", [{"exponents": exponents, "points": points}])
    assert "| 1x2 | 12,345 |\n| 2x2 | 1 |" in readme.read_text()
    row = "| d_sae | 1,000, 20,000 | 1.000, 20.000 | 1.0 | 1,000, 20,000 | 0.98 |"
    assert row in readme.read_text()
    assert "old" not in readme.read_text()
    found = json.loads(results.read_text())
    assert sorted(found) == ["growth", "scaling"]
    assert found["scaling"]["results"][0] == {"mesh": "1x2", "bytes": 12345}
    assert found["scaling"]["machine"]["cores"] >= 1
