"""Commands that people type: the Makefile's targets, and what the README and CI say of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "asi_lens"
TARGETS = ("setup", "figures", "test", "test-tl4", "test-triton", "lint", "lab", "bench", "clean")


def make(*arguments: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    inherited = ("MAKE", "MODEL", "PROFILE", "NOTEBOOKS", "ARGS", "VENV", "PYTHON", "MFLAGS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(inherited)}
    done = subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_help_lists_targets_and_variables() -> None:
    shown = make("help")
    described = dict(re.findall(r"^  ([a-z0-9-]+) +(\S.*)$", shown, re.MULTILINE))
    assert set(TARGETS) <= set(described)
    assert all(variable in shown for variable in ("MODEL=", "PROFILE=", "NOTEBOOKS="))


def test_make_without_a_target_only_helps() -> None:
    assert make() == make("help")


def test_make_figures_passes_the_choices_on() -> None:
    told = make("-n", "figures", "MODEL=a/b", "PROFILE=smoke", "NOTEBOOKS=01_rank_curves,03_wo_ablation")
    assert "asi_lens.reproduce" in told
    assert '--model "a/b" --profile "smoke" --notebooks "01_rank_curves,03_wo_ablation"' in told
    assert '--notebooks "paper"' in make("-n", "figures")
    assert '--notebooks "beyond"' in make("-n", "figures", "GROUP=beyond")


def test_setup_is_done_once_and_again_when_the_lock_changes(tmp_path: Path) -> None:
    fresh = make("-n", "figures", f"VENV={tmp_path / 'venv'}")
    assert "-r requirements.lock" in fresh
    assert "ipykernel install" in fresh
    (tmp_path / "venv").mkdir()
    newer = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "requirements.lock")) + 10
    newer = max(newer, (PACKAGE / "results" / "chrome.py").stat().st_mtime + 10)
    for stamp in (".asi_lens-setup", ".asi_lens-chrome"):
        path = tmp_path / "venv" / stamp
        path.touch()
        os.utime(path, (newer, newer))
    again = make("-n", "figures", f"VENV={tmp_path / 'venv'}")
    assert "pip install" not in again
    assert "asi_lens.results.chrome" not in again
    os.utime(tmp_path / "venv" / ".asi_lens-setup", (0, 0))
    assert "pip install" in make("-n", "figures", f"VENV={tmp_path / 'venv'}")


def test_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", "\n".join(re.findall(r"`[^`]+`", readme))))
    described = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"figures", "test"} <= named
    assert named <= described


def test_ci_runs_what_the_readme_tells_people_to_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    steps = " ".join(re.findall(r"^step make (.+)$", script.read_text(), re.MULTILINE)).split()
    assert {"lint", "test", "test-tl4", "test-peers", "test-triton", "docs", "PROFILE=smoke"} <= set(steps)
