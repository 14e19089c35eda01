"""Where numbers come from: what is told, and what is kept out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from asi_lens.results import provenance


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path / "project"))
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def test_told_parameters_name_nothing_of_the_machine(project: Path) -> None:
    parameters = {
        "model": str(project / "models" / "x"),
        "seed": 3,
        "output_folder": "/somewhere",
        "ranks": (1, 2),
        "dictionaries": [str(project / "saes"), "owner/saes"],
    }
    told = provenance.told_parameters(parameters)
    assert told == {"model": "models/x", "seed": 3, "ranks": [1, 2], "dictionaries": ["saes", "owner/saes"]}


def test_versions_and_machine_are_known() -> None:
    assert provenance.versions()["torch"]
    machine = provenance.machine()
    assert machine["cores"] >= 1
    assert machine["torch_cpu_capability"]


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
