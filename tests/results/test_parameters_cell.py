"""Parameters of a notebook come from its own cell, literals only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.results.parameters_cell import (
    checked_parameters,
    notebook_defaults,
    notebook_names,
    notebook_path,
)


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


KINDS = """
lr = 8e-4
n_tokens = 65_536
centered = True
name = "auto"
ranks = [0.5, 1]
corpora = ["news-en", "code-python"]
more = []
sizes: list[int] = []
rates = {"ASI": [1e-4, 8e-4]}
"""


@pytest.fixture
def kinds(project: Path) -> str:
    runs.notebook(project / "notebooks" / "03_kinds.ipynb", parameters=runs.PARAMETERS + KINDS)
    return "03_kinds"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        (
            "lr",
            "8e-4",
            r"lr='8e-4' .* must be a number, as its default 0.0008; YAML .* as text: write 0.0008",
        ),
        ("lr", "1e-5", "write 1.0e-05"),
        ("lr", True, "must be a number"),
        ("lr", float("nan"), "must be a number"),
        ("lr", [8e-4], "must be a number"),
        ("n_tokens", "1e6", "must be a whole number.*write 1_000_000"),
        ("n_tokens", 1e6, "n_tokens=1000000.0 .*; write 1_000_000"),
        ("n_tokens", 0.5, "must be a whole number, as its default 65536$"),
        ("n_tokens", None, "n_tokens=None"),
        ("centered", 1, "must be True or False"),
        ("centered", "false", "must be True or False.*papermill's -p reads it as text: use -y"),
        ("name", False, 'must be text.*put a text in quotes: name: "False"'),  # YAML reads `no` so
        ("name", 3, 'in quotes: name: "3"'),
        (
            "ranks",
            "[0.1, 0.5]",
            r"a list, each item a number.*papermill's -p .* use -y 'ranks: \[0.1, 0.5\]'",
        ),
        ("ranks", 0.5, "a list, each item a number"),
        ("ranks", [0.5, "x"], "a list, each item a number"),
        ("corpora", "texts.txt", r"a list, each item text.*write a list: \[texts.txt\]"),
        ("corpora", ["news-en", 3], "a list, each item text"),
        ("more", "a", "must be a list"),
        ("sizes", [8, "a"], "a list, each item a whole number"),
        ("sizes", [True], "a list, each item a whole number"),
        ("rates", [1e-4], "a mapping from text to a list"),
        ("rates", {"ASI": 1e-4}, "a mapping from text to a list"),
    ],
)
def test_a_value_of_another_kind_is_told_with_its_parameter(
    kinds: str, key: str, value: Any, told: str
) -> None:
    with pytest.raises(OptionError, match=rf"quick.yaml, common: {key}=.*{told.removeprefix(f'{key}=')}"):
        checked_parameters(kinds, {key: value}, "quick.yaml, common")


def test_values_of_the_right_kind_pass(kinds: str) -> None:
    given = {
        "lr": 1,
        "n_tokens": np.int64(5),
        "ranks": np.array([0.25, 0.5]),
        "corpora": [],
        "more": [1],
        "sizes": (8, 16),
        "rates": {"random": [1]},
        "centered": np.bool_(False),
    }
    found = checked_parameters(kinds, given)
    assert found == {**given, "ranks": [0.25, 0.5], "sizes": (8, 16), "rates": {"random": [1.0]}}
    assert [type(found[key]) for key in ("lr", "n_tokens", "centered")] == [float, int, bool]
    with pytest.raises(
        UnknownNameError, match=r"parameter of 03_kinds \(in x\) 'rank'; did you mean 'ranks'"
    ):
        checked_parameters(kinds, {"rank": 1}, "x")


def test_a_name_that_is_no_file_name_is_no_notebook(project: Path) -> None:
    for name in ("x" * 5000, "../parameters/tiny", "\0"):
        with pytest.raises(UnknownNameError, match="unknown notebook"):
            notebook_path(name)


def test_a_line_that_sets_nothing(project: Path) -> None:
    runs.notebook(project / "notebooks" / "03_c.ipynb", parameters=runs.PARAMETERS + "print('abc')\n")
    with pytest.raises(OptionError, match=r"03_c: `print\('abc'\)` does not set a parameter"):
        notebook_defaults("03_c")


def test_types_may_be_stated(project: Path) -> None:
    runs.notebook(project / "notebooks" / "03_c.ipynb", parameters=runs.PARAMETERS + "x: float = -1.5\n")
    assert notebook_defaults("03_c")["x"] == -1.5
