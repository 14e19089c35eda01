"""Tidy CSV files of typed rows.

A row checks its values when it is created. A NaN, an infinity, or text in a number's column is therefore an
error at the line that created the row, not in a figure weeks later.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from asi_lens.base.errors import DataError, OptionError, UnknownNameError, unknown_name
from asi_lens.base.files import write_whole

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Row:
    """Base class of rows: checks values against the annotations, converts numpy scalars to Python's.

    Raises OptionError for a value of the wrong type or outside its Literal, and DataError for a NaN or an
    infinity. A NaN in a field that may be None becomes None; an infinity does not.
    """

    def __post_init__(self) -> None:
        for name, kind in _fields(type(self)).items():
            object.__setattr__(self, name, kind.check(type(self), name, getattr(self, name)))


R = TypeVar("R", bound=Row)


def columns(row_type: type[Row]) -> list[str]:
    """Return the column names of a table, in order."""
    return list(_fields(row_type))


def write_rows(path: Path | str, rows: Iterable[Row]) -> Path:
    """Write rows of one type to `path` as CSV, atomically and with 9 digits per float; return the path.

    Raises DataError for no rows, or for rows of two types.
    """
    rows = list(rows)
    if not rows:
        raise DataError(f"no rows to write to {path}")
    row_type = type(rows[0])
    for row in rows:
        if type(row) is not row_type:
            raise DataError(f"{path}: {type(row).__name__} among rows of {row_type.__name__}")
    path = Path(path)
    with write_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns(row_type))
        writer.writerows([_to_text(value) for value in dataclasses.astuple(row)] for row in rows)
    return path


def read_rows(path: Path | str, row_type: type[R]) -> list[R]:
    """Return the rows of a file that `write_rows` wrote.

    Raises DataError for unknown or missing columns, and, naming file, line and column, for a cell that does
    not fit its column.
    """
    path = Path(path)
    kinds = _fields(row_type)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_header(path, row_type, list(reader.fieldnames or []))
            return [_read_row(path, reader.line_num, row_type, kinds, record) for record in reader]
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _check_header(path: Path, row_type: type[Row], header: list[str]) -> None:
    known = columns(row_type)
    missing = [name for name in known if name not in header]
    unknown = [name for name in header if name not in known]
    repeated = sorted({name for name in header if header.count(name) > 1})
    wrong = {"missing": missing, "unknown": unknown, "repeated": repeated}
    if any(wrong.values()):
        told = "; ".join(f"{what} columns {', '.join(names)}" for what, names in wrong.items() if names)
        raise DataError(f"{path} is no table of {row_type.__name__}: {told}")


def _read_row(path: Path, line: int, row_type: type[R], kinds: dict[str, _Kind], record: dict) -> R:
    if None in record or None in record.values():
        raise DataError(f"{path}, line {line}: {'more' if None in record else 'fewer'} cells than columns")
    values = {}
    for name, kind in kinds.items():
        try:
            values[name] = kind.parse(record[name])
        except ValueError as error:
            where = f"{path}, line {line}, column {name}"
            raise DataError(f"{where}: {record[name]!r} is no {kind.label}") from error
    try:
        return row_type(**values)
    except (OptionError, DataError, UnknownNameError) as error:
        raise DataError(f"{path}, line {line}: {error}") from error


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the rows as a DataFrame for the figures (a missing value is NaN or None)."""
    import pandas as pd

    if not rows:
        raise DataError("no rows to make a table of")
    return pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=columns(type(rows[0])))


@dataclass(frozen=True)
class _Kind:
    """Allowed values of one column."""

    base: type
    optional: bool
    choices: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        name = {int: "whole number", float: "number", str: "text"}[self.base]
        return f"{name} (or empty)" if self.optional else name

    def check(self, row_type: type, name: str, value: Any) -> Any:
        where = f"{row_type.__name__}.{name}"
        if value is None and self.optional:
            return None
        if self.base is str and isinstance(value, str):
            if self.choices and value not in self.choices:
                raise unknown_name(where, value, self.choices)
            return str(value)
        if not isinstance(value, bool) and self.base is not str and isinstance(value, numbers.Real):
            number = float(value)
            if self.optional and math.isnan(number):
                return None
            if not math.isfinite(number):
                raise DataError(f"{where} is {number}; only finite numbers can be written")
            if self.base is float:
                return number
            if isinstance(value, numbers.Integral):
                return int(value)
        raise OptionError(f"{where}={value!r} ({type(value).__name__}) must be a {self.label}")

    def parse(self, text: str) -> Any:
        if text == "" and self.optional:
            return None
        return self.base(text)


_known: dict[type[Row], dict[str, _Kind]] = {}


def _fields(row_type: type[Row]) -> dict[str, _Kind]:
    if row_type not in _known:
        hints = typing.get_type_hints(row_type)
        names = [field.name for field in dataclasses.fields(row_type)]
        _known[row_type] = {name: _kind(hints[name]) for name in names}
    return _known[row_type]


def _kind(hint: Any) -> _Kind:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return dataclasses.replace(_kind(inner[0]), optional=True)
    if typing.get_origin(hint) is Literal:
        return _Kind(str, optional=False, choices=typing.get_args(hint))
    return _Kind(hint, optional=False)


def _to_text(value: Any) -> str:
    if value is None:
        return ""
    return format(value, ".9g") if isinstance(value, float) else str(value)
