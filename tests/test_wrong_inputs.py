"""Every public function and method, each parameter handed something wrong: an error of ours, or a result."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from right_inputs import DOORS, World, made

import asi_lens as al
from asi_lens.base.errors import AsiLensError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("unchecked_shapes")]


class Broken:
    """An object of which nothing can be shown."""

    def __repr__(self) -> str:
        raise ValueError("no repr")


WRONG: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "no text": lambda: "",
    "text": lambda: "x",
    "half a pair": lambda: "\ud83d",
    "zero byte": lambda: "a\0b",
    "long text": lambda: "x" * 5000,
    "bytes": lambda: b"x",
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "-1": lambda: -1,
    "-huge": lambda: -(10**30),
    "huge": lambda: 10**30,
    "0": lambda: 0,
    "0.5": lambda: 0.5,
    "True": lambda: True,
    "[]": list,
    "[None]": lambda: [None],
    "mixed list": lambda: ["x", 1],
    "{}": dict,
    "dict": lambda: {"x": object()},
    "()": tuple,
    "set": lambda: {1},
    "object()": object,
    "type": lambda: object,
    "no rows": lambda: torch.zeros(0, 4),
    "deep tensor": lambda: torch.zeros(2, 1, 2, 1),
    "whole tensor": lambda: torch.zeros(3, dtype=torch.int64),
    "scalar tensor": lambda: torch.tensor(math.nan),
    "complex tensor": lambda: torch.zeros(2, 2, dtype=torch.complex64),
    "rows of nan": lambda: torch.full((3, 16), math.nan),
    "numpy int": lambda: np.int64(-1),
    "numpy nan": lambda: np.float32("nan"),
    "array": lambda: np.arange(3),
    "array of objects": lambda: np.array([object(), None], dtype=object),
    "path": lambda: Path("/nowhere/x"),
    "module": lambda: math,
    "nn.Module": lambda: torch.nn.Linear(2, 2),
    "function": lambda: lambda *args, **options: None,
    "iterator": lambda: iter([object()]),
    "range": lambda: range(3),
    "frame": lambda: pd.DataFrame({"x": [1]}),
    "broken": Broken,
}
"""Names of wrong values, and functions that make them."""
RESULTS = (al.Split, al.Verification)
"""Classes that functions return and no user makes."""
NOT_RIGHT = ("fetch", ".place", ".hooks", "live")
"""Doors that would download, need a dictionary that says its place, or a notebook."""
FUNCTIONS = ("moments", "on_log", "read", "share")
"""Parameters that are functions."""


@pytest.fixture(scope="module")
def world(tiny_llama: Any, tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("wrong")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASI_LENS_CACHE", str(root / "cache"))
        patch.setenv("ASI_LENS_PROJECT", str(root))
        patch.delenv("ASI_LENS_FIGURES", raising=False)
        patch.chdir(root)
        yield World(tiny_llama, tiny_folder("llama"), root)


def handed(name: str, world: World, parameter: str, value: Any) -> None:
    """Call a door with one argument replaced. Fails for an error that is not ours."""
    call, arguments = made(name, world)
    arguments[parameter] = value
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            result = call(**arguments)
            if isinstance(result, Iterator):
                next(result, None)
    except (AsiLensError, OSError):
        return


def test_every_public_function_and_method_is_tried() -> None:
    found = set()
    for name in al._PUBLIC:
        door = getattr(al, name)
        if inspect.isclass(door) and door not in RESULTS:
            found.add(name)
            found |= {
                f"{name}.{key}"
                for base in door.__mro__
                if base.__module__.startswith("asi_lens")
                for key, member in vars(base).items()
                if not key.startswith("_") and callable(getattr(member, "__func__", member))
            }
        elif inspect.isfunction(door):
            found.add(name)
    assert found - set(DOORS) == set()
    assert set(DOORS) - found == set()


@pytest.mark.parametrize("name", [name for name in DOORS if not name.endswith(NOT_RIGHT)])
def test_right_arguments_are_taken(name: str, world: World) -> None:
    call, arguments = made(name, world)
    assert set(arguments) <= set(inspect.signature(call).parameters)
    with contextlib.redirect_stderr(io.StringIO()):
        result = call(**arguments)
        if isinstance(result, Iterator):
            next(result, None)


@pytest.mark.parametrize("name", DOORS)
def test_a_wrong_argument_is_an_error_of_ours_or_taken(name: str, world: World) -> None:
    raw = []
    for parameter in parameters(name, world):
        for what, value in WRONG.items():
            if parameter in FUNCTIONS and callable(value()):
                continue  # the errors of a function that a user wrote are the user's
            try:
                handed(name, world, parameter, value())
            except Exception as error:
                raw.append(f"{parameter}={what}: {type(error).__name__}: {str(error)[:300]}")
    assert not raw, "\n" + "\n".join(raw)


def parameters(name: str, world: World) -> list[str]:
    call, _ = made(name, world)
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [key for key, one in inspect.signature(call).parameters.items() if one.kind not in kinds]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=4),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("name", DOORS)
@settings(max_examples=25, derandomize=True, database=None)
@given(data=st.data())
def test_any_value_is_an_error_of_ours_or_taken(name: str, world: World, data: st.DataObject) -> None:
    names = parameters(name, world)
    if names:
        handed(name, world, data.draw(st.sampled_from(names)), data.draw(VALUES))
