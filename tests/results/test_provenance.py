"""run.json: what it records, and what it keeps out."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from asi_lens.base.errors import CacheError, DataError
from asi_lens.results import provenance


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path / "project"))
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def read(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def test_a_notebooks_entry_tells_how_its_numbers_were_made(project: Path, tmp_path: Path) -> None:
    parameters = {
        "model": str(project / "models" / "x"),
        "seed": 3,
        "output_folder": "/somewhere",
        "ranks": (1, 2),
    }
    provenance.record_run(tmp_path, "01_a", parameters=parameters, sources={"news-en": "abc"})
    entry = read(tmp_path)["notebooks"]["01_a"]
    assert entry["parameters"] == {"model": "models/x", "seed": 3, "ranks": [1, 2]}
    assert entry["seeds"] == [3]
    assert entry["sources"] == {"news-en": "abc"}
    assert entry["versions"]["torch"]
    assert entry["machine"]["cores"] >= 1
    assert entry["machine"]["torch_cpu_capability"]
    assert entry["git"] is None
    assert str(tmp_path) not in (tmp_path / "run.json").read_text()


def test_sources_are_kept_when_only_parameters_are_recorded_again(project: Path, tmp_path: Path) -> None:
    provenance.record_run(tmp_path, "01_a", parameters={"seed": 0}, sources={"news-en": "abc"})
    provenance.record_run(tmp_path, "01_a", parameters={"seed": 1})
    entry = read(tmp_path)["notebooks"]["01_a"]
    assert entry["sources"] == {"news-en": "abc"}
    assert entry["seeds"] == [1]


def test_the_longest_time_under_the_same_parameters_is_kept(project: Path, tmp_path: Path) -> None:
    provenance.record_run(tmp_path, "01_a", parameters={"seed": 0}, sources={})
    provenance.record_wall_time(tmp_path, "01_a", 600.0)
    provenance.record_wall_time(tmp_path, "01_a", 5.0)
    entry = read(tmp_path)["notebooks"]["01_a"]
    assert (entry["wall_time_s"], entry["longest_wall_time_s"]) == (5, 600)
    provenance.record_run(tmp_path, "01_a", parameters={"seed": 1}, sources={})
    provenance.record_wall_time(tmp_path, "01_a", 7.0)
    assert read(tmp_path)["notebooks"]["01_a"]["longest_wall_time_s"] == 7


def test_figures_are_recorded_and_forgotten(project: Path, tmp_path: Path) -> None:
    told = {"title": "t", "subtitle": "s", "caption": "c", "png": False, "reason": "no Chrome"}
    provenance.record_figure(tmp_path, "01_a", **told)
    assert read(tmp_path)["figures"] == {"01_a": told}
    provenance.forget_figure(tmp_path, "01_a")
    assert read(tmp_path)["figures"] == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99, "notebooks": {}, "figures": {}}'])
def test_a_damaged_record_is_told_and_left_alone(project: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CacheError, match="delete it"):
        provenance.record_wall_time(tmp_path, "01_a", 1.0)
    assert (tmp_path / "run.json").read_text() == text


def test_only_json_values_are_recorded(project: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        provenance.record_run(tmp_path, "01_a", parameters={"x": float("nan")})
    assert not (tmp_path / "run.json").exists()


def git(folder: Path, *arguments: str) -> None:
    author = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *author, *arguments], check=True, capture_output=True)


def test_git_state_names_the_commit_and_changed_sources_but_not_figures(project: Path) -> None:
    assert provenance.git_state() is None
    git(project, "init", "-q")
    assert provenance.git_state() is None, "a checkout without a commit has none to name"
    (project / "figures").mkdir()
    for name in ("code.py", "README.md", "figures/a.csv"):
        (project / name).write_text("1\n")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "first", "--no-verify")
    state = provenance.git_state()
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["dirty"] is False
    (project / "README.md").write_text("2\n")
    (project / "figures/a.csv").write_text("2\n")
    assert provenance.git_state() == state
    (project / "code.py").write_text("2\n")
    assert provenance.git_state() == {**state, "dirty": True}
