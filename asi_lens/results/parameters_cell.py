"""The cell of a notebook that defines its parameters: names, literal defaults, kinds of values."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from asi_lens.base.doors import fitted, kind_of
from asi_lens.base.errors import OptionError, require_known, shown
from asi_lens.base.paths import notebooks_dir

# Annotations of parameters whose default does not show its kind, such as an empty list.
_ANNOTATIONS: dict[str, Any] = {"list[int]": list[int], "list[float]": list[float], "list[str]": list[str]}


def notebook_names() -> list[str]:
    """Return the names of all notebooks, in the order of their numbers."""
    return sorted(path.stem for path in notebooks_dir().glob("[0-9]*.ipynb"))


def notebook_path(notebook: str) -> Path:
    """Return the path of a notebook's source. Raises UnknownNameError."""
    require_known([notebook], notebook_names(), "notebook")
    return notebooks_dir() / f"{notebook}.ipynb"


def notebook_defaults(notebook: str) -> dict[str, Any]:
    """Return a notebook's parameters and their defaults, from its cell tagged `parameters`.

    Raises UnknownNameError for an unknown notebook, and OptionError for a line that is not `name = literal`.
    """
    return {key: default for key, (default, _) in _read(notebook).items()}


def checked_parameters(notebook: str, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return values of a notebook's parameters, each of the kind of its default.

    Whole numbers of any library become `int`, arrays become lists, and a whole number is allowed where the
    default is a float. `where` names the source of the values in errors.

    Raises UnknownNameError for a name that is not a parameter, and OptionError (parameter, value and kind)
    for a value of another kind.
    """
    known = _read(notebook)
    out = {}
    require_known(values, known, f"parameter of {notebook}{f' (in {where})' if where else ''}")
    for key, value in values.items():
        default, hint = known[key]
        try:
            out[key] = fitted(key, value, kind_of(hint))
        except OptionError as error:
            raise OptionError(
                f"{where or notebook}: {error}, as its default {shown(default)}{_advice(key, value, default)}"
            ) from error
    return out


def _read(notebook: str) -> dict[str, tuple[Any, Any]]:
    """Return (default, type) of each parameter of a notebook."""
    # papermill.inspect_notebook would do the same, but its import takes 0.2 s in every kernel.
    cells = json.loads(notebook_path(notebook).read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    out = {}
    named: ast.expr | None
    for line in ast.parse("".join(tagged[0]["source"]) if tagged else "").body:
        match line:
            case ast.Assign([ast.Name(key)], value):
                named = None
            case ast.AnnAssign(ast.Name(key), named, ast.expr() as value):
                pass
            case _:
                raise OptionError(f"{notebook}: `{ast.unparse(line)}` does not set a parameter")
        try:
            default = ast.literal_eval(value)
        except ValueError as error:
            told = ast.unparse(value)
            raise OptionError(f"{notebook}: the default of {key} is not a literal: {told}") from error
        out[key] = default, _ANNOTATIONS.get(ast.unparse(named) if named else "", _type_of([default]))
    return out


def _type_of(defaults: list[Any]) -> Any:
    """Return the type that all of `defaults` have, as an annotation."""
    hints: list[Any] = []
    for default in defaults:
        if isinstance(default, list | tuple):
            hints.append(list[_type_of(list(default))])  # type: ignore[misc]
        elif isinstance(default, dict):
            hints.append(Mapping[str, _type_of(list(default.values()))])  # type: ignore[misc]
        else:
            hints.append(Any if default is None else type(default))
    return Any if not hints or Any in hints else reduce(or_, hints)


def _advice(key: str, value: Any, default: Any) -> str:
    """Return how to write a value, for the usual slips of YAML and of papermill's `-p`."""
    import yaml

    if isinstance(default, str):
        return (
            f'; in YAML, put a text in quotes: {key}: "{value}"'
            if isinstance(value, bool | int | float)
            else ""
        )
    if isinstance(value, float) and value.is_integer() and isinstance(default, int):
        return f"; write {int(value):_}"
    if not isinstance(value, str):
        return ""
    try:
        number = float(value.replace("_", ""))
        right = (
            f"{int(number):_}" if isinstance(default, int) and number.is_integer() else _with_point(number)
        )
        return f"; YAML and papermill read {value} as text: write {right}"
    except (ValueError, OverflowError):
        pass
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:
        read = value
    if not isinstance(read, str):
        return f"; papermill's -p reads it as text: use -y '{key}: {value}'"
    return f"; write a list: [{value}]" if isinstance(default, list) else ""


def _with_point(number: float) -> str:
    """Return a number as YAML reads it: 8.0e-4, which 8e-4 is not."""
    digits, exponent, power = repr(number).partition("e")
    return f"{digits}{'' if '.' in digits or not exponent else '.0'}{exponent}{power}"
