"""Tidy CSV files of typed rows.

A row checks its values with pydantic when it is created. A NaN, an infinity, or text in a number's column is
therefore an error at the line that created the row, not in a figure weeks later.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from asi_lens.base.errors import AsiLensError, DataError, OptionError, unknown_name
from asi_lens.base.files import write_whole

if TYPE_CHECKING:
    import pandas as pd

_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Row:
    """Base class of rows: checks values against the annotations, converts numpy scalars to Python's.

    Raises OptionError for a value of the wrong type, UnknownNameError for a word outside its Literal, and
    DataError for a NaN or an infinity. A NaN in a field that may be None becomes None; an infinity does not.
    """

    def __post_init__(self) -> None:
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in vars(self).items()}
        nan = {name for name, value in plain.items() if isinstance(value, float) and math.isnan(value)}
        none = dict.fromkeys(nan.intersection(self._optional()))
        for name, value in self._checked(plain | none).items():
            object.__setattr__(self, name, value)

    @classmethod
    def _checked(cls, values: Mapping[str, Any], strict: bool = True) -> dict[str, Any]:
        """Return the values of a row after checking them; texts are read as numbers unless `strict`."""
        try:
            return vars(cls._cells().model_validate(values, strict=strict))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        where, value = f"{cls.__name__}.{first['loc'][0]}", first["input"]
        if first["type"] == "literal_error":
            raise unknown_name(where, value, re.findall(r"'(.*?)'", first["ctx"]["expected"]))
        if first["type"] == "finite_number":
            raise DataError(f"{where} is {value}; only finite numbers can be written")
        raise OptionError(f"{where}={value!r} is not allowed; {first['msg'][0].lower()}{first['msg'][1:]}")

    @classmethod
    @functools.cache
    def _cells(cls) -> type[BaseModel]:
        """Return a pydantic model with a field for each column."""
        hints = typing.get_type_hints(cls)
        fields: dict[str, Any] = {name: (hints[name], ...) for name in columns(cls)}
        return create_model(cls.__name__, __config__=_STRICT, **fields)

    @classmethod
    @functools.cache
    def _optional(cls) -> list[str]:
        """Return the names of the columns that may be empty."""
        fields = cls._cells().model_fields
        return [name for name, field in fields.items() if type(None) in typing.get_args(field.annotation)]


R = TypeVar("R", bound=Row)


def columns(row_type: type[Row]) -> list[str]:
    """Return the column names of a table, in order."""
    return [field.name for field in dataclasses.fields(row_type)]


def write_rows(path: Path | str, rows: Iterable[Row]) -> Path:
    """Write rows of one type to `path` as CSV, atomically and with 9 digits per float; return the path.

    Raises DataError for no rows, or for rows of two types.
    """
    rows = list(rows)
    if not rows:
        raise DataError(f"{path} needs at least one row; none was given")
    row_type = type(rows[0])
    for row in rows:
        if type(row) is not row_type:
            raise DataError(f"{path} holds rows of {row_type.__name__}; one is of {type(row).__name__}")
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
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            _check_header(row_type, list(reader.fieldnames or []))
            return [_read_row(row_type, record) for record in reader]
        except (csv.Error, UnicodeDecodeError, AsiLensError) as error:
            where = f", line {reader.line_num}" if reader.line_num > 1 else ""
            raise DataError(f"{path}{where}: {error}") from error


def _check_header(row_type: type[Row], header: list[str]) -> None:
    known = columns(row_type)
    wrong = {
        "missing": [name for name in known if name not in header],
        "unknown": [name for name in header if name not in known],
        "repeated": sorted({name for name in header if header.count(name) > 1}),
    }
    told = "; ".join(f"{what} columns {', '.join(names)}" for what, names in wrong.items() if names)
    if told:
        raise DataError(f"not a table of {row_type.__name__}: {told}")


def _read_row(row_type: type[R], record: Mapping[str, str]) -> R:
    if None in record or None in record.values():
        raise DataError(f"the line has {'more' if None in record else 'fewer'} cells than columns")
    none = {name: None for name in row_type._optional() if record[name] == ""}
    return row_type(**row_type._checked({**record, **none}, strict=False))


def frame(rows: Sequence[Row]) -> pd.DataFrame:
    """Return the rows as a DataFrame for the figures (a missing value is NaN or None)."""
    import pandas as pd

    if not rows:
        raise DataError("a table needs at least one row; none was given")
    return pd.DataFrame([dataclasses.asdict(row) for row in rows], columns=columns(type(rows[0])))


def _to_text(value: Any) -> str:
    if value is None:
        return ""
    return format(value, ".9g") if isinstance(value, float) else str(value)
