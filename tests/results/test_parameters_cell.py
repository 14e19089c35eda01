"""Parameters of a notebook come from its own cell, literals only."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.results.parameters_cell import notebook_defaults, notebook_names, notebook_path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    return runs.project(tmp_path)


def test_names_paths_and_defaults(project: Path) -> None:
    assert notebook_names() == ["01_alpha", "02_beta"]
    assert notebook_path("02_beta") == project / "notebooks" / "02_beta.ipynb"
    defaults = notebook_defaults("02_beta")
    assert defaults["ranks"] == [1, 2]
    assert list(defaults)[:4] == ["model", "profile", "output_folder", "seed"]


def test_a_notebook_that_is_not_there(project: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean '02_beta'"):
        notebook_defaults("02_bet")


def test_a_default_that_is_no_literal(project: Path) -> None:
    runs.notebook(project / "notebooks" / "03_c.ipynb", parameters=runs.PARAMETERS + "x = len('abc')\n")
    with pytest.raises(OptionError, match="default of x is not a literal: len"):
        notebook_defaults("03_c")


def test_a_line_that_sets_nothing(project: Path) -> None:
    runs.notebook(project / "notebooks" / "03_c.ipynb", parameters=runs.PARAMETERS + "print('abc')\n")
    with pytest.raises(OptionError, match=r"03_c: `print\('abc'\)` does not set a parameter"):
        notebook_defaults("03_c")


def test_types_may_be_stated(project: Path) -> None:
    runs.notebook(project / "notebooks" / "03_c.ipynb", parameters=runs.PARAMETERS + "x: float = -1.5\n")
    assert notebook_defaults("03_c")["x"] == -1.5
