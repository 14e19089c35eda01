"""Typed rows: what they refuse, and that a table read back is the table that was written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.results.tables import Row, columns, frame, read_rows, write_rows


@dataclass(frozen=True)
class Sample(Row):
    name: str
    layer: int
    value: float
    kind: Literal["a", "b"]
    seed: int | None
    loss: float | None
    note: str | None


@dataclass(frozen=True)
class Other(Row):
    name: str


GOOD = Sample("x", 3, 0.5, "a", None, None, None)


def test_numpy_scalars_become_pythons_own() -> None:
    row = dataclasses.replace(GOOD, layer=np.int64(7), value=np.float32(0.25), seed=np.int32(1))
    assert (type(row.layer), type(row.value), type(row.seed)) == (int, float, int)
    assert (row.layer, row.value, row.seed) == (7, 0.25, 1)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("layer", 1.5, OptionError),
        ("layer", True, OptionError),
        ("layer", "3", OptionError),
        ("layer", None, OptionError),
        ("name", 3, OptionError),
        ("value", "0.5", OptionError),
        ("value", None, OptionError),
        ("value", float("nan"), DataError),
        ("value", float("-inf"), DataError),
        ("loss", float("inf"), DataError),
        ("kind", "c", UnknownNameError),
    ],
)
def test_a_row_refuses_what_its_column_does_not_hold(field: str, value: object, error: type) -> None:
    with pytest.raises(error, match=f"Sample.{field}"):
        dataclasses.replace(GOOD, **{field: value})


def test_nan_in_an_optional_column_is_an_absent_value(tmp_path: Path) -> None:
    row = dataclasses.replace(GOOD, loss=float("nan"))
    assert row.loss is None
    path = write_rows(tmp_path / "t.csv", [row])
    assert path.read_text().splitlines()[1] == "x,3,0.5,a,,,"
    assert read_rows(path, Sample) == [row]


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)


@given(
    st.lists(
        st.builds(
            Sample,
            name=texts | st.just('a,"b"\nc'),
            layer=st.integers(-(2**40), 2**40),
            value=numbers,
            kind=st.sampled_from(["a", "b"]),
            seed=st.none() | st.integers(0, 2**31),
            loss=st.none() | numbers,
            note=st.none() | texts,
        ),
        min_size=1,
        max_size=8,
    )
)
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Sample]
) -> None:
    path = write_rows(tmp_path_factory.mktemp("tables") / "t.csv", rows)
    found = read_rows(path, Sample)
    assert [dataclasses.replace(r, value=0.0, loss=None) for r in found] == [
        dataclasses.replace(r, value=0.0, loss=None) for r in rows
    ]
    for old, new in zip(rows, found, strict=True):
        # Nine digits keep a float32 exactly.
        assert np.float32(new.value) == np.float32(old.value)
        assert (new.loss is None) == (old.loss is None)


def test_a_table_has_one_type_of_row_and_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one row"):
        write_rows(tmp_path / "t.csv", [])
    with pytest.raises(DataError, match="holds rows of Sample; one is of Other"):
        write_rows(tmp_path / "t.csv", [GOOD, Other("x")])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_table(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.csv", [GOOD])
    before = path.read_text()
    with pytest.raises(DataError):
        write_rows(path, [GOOD, Other("x")])
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.replace("layer,", "", 1).replace("3,", "", 1), "missing columns layer"),
        (lambda t: t.replace("layer", "leyer", 1), "unknown columns leyer"),
        (lambda t: t.replace("note", "name", 1), "repeated columns name"),
        (
            lambda t: t.replace("x,3", "x,three", 1),
            r"t.csv, line 2: Sample.layer='three' is not allowed; input should be a valid integer",
        ),
        (lambda t: t.replace("0.5", "nan", 1), "line 2: Sample.value is nan"),
        (lambda t: t.replace(",a,", ",z,", 1), "unknown Sample.kind 'z'"),
        (lambda t: t[: t.index("0.5")], "line 2: the line has fewer cells"),
        (lambda t: t.rstrip("\n") + ",extra\n", "line 2: the line has more cells"),
        (lambda t: "", "missing columns"),
    ],
)
def test_a_damaged_table_says_where(tmp_path: Path, change: object, told: str) -> None:
    path = write_rows(tmp_path / "t.csv", [GOOD])
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(DataError, match=told):
        read_rows(path, Sample)


def test_a_frame_has_the_tables_columns() -> None:
    table = frame([GOOD, dataclasses.replace(GOOD, seed=4, loss=0.5)])
    assert list(table.columns) == columns(Sample)
    assert table.seed.isna().tolist() == [True, False]
    assert pd.api.types.is_float_dtype(table.loss)
    with pytest.raises(DataError):
        frame([])
