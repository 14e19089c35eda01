"""Files of text, each as a stream of documents, and the files of a folder that are text.

A table (`.csv`, `.jsonl`, `.parquet`) gives a document for each row; another file (`.txt`, `.md`, `.py`) is
one document. A reader yields rows as they are stored; `documents.Corpus` refuses rows that are not text.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asi_lens.base.errors import DataError, OptionError, require_known, unknown_name

_TABLES = (".csv", ".jsonl", ".parquet")
# Beside or above tables, these files describe the data: a dataset card, its license.
_ABOUT = ("readme", "license", "licence", "notice", "citation", "changelog", "contributing", "dataset_card")
# The header of a card of the hub.
_KEYS = rb"license|configs|dataset_info|task_categories|pretty_name|tags"
_CARD = re.compile(rb"---\r?\n(?:(?!---)[^\n]*\n)*?(?:" + _KEYS + rb"):")
# Folders of tools and of installed packages.
_TOOLS = ("__pycache__", "node_modules", "site-packages", "venv", "env.bak", "venv.bak")
_FIELD = 2**31 - 1
"""Most characters of a field of a CSV; Python's own limit is 131,072."""


def only_text(column: str, what: str) -> None:
    if column != "text":
        raise OptionError(f"column={column!r} is not allowed: {what} has no columns; leave column at 'text'")


def decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _undecodable(path) from error


def _undecodable(path: Path) -> DataError:
    """Return the error for a file that is not UTF-8, with the position of the first bad byte."""
    decoder, read = codecs.getincrementaldecoder("utf-8")("strict"), 0
    with path.open("rb") as file:
        while True:
            block = file.read(1 << 20)
            read += len(block)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = read - len(error.object) + error.start
                return DataError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset:,} "
                    f"({error.reason}); convert it first, e.g. iconv -f <its encoding> -t UTF-8"
                )
            if not block:
                return DataError(f"{path} is not UTF-8")


def _whole(path: Path, column: str) -> Iterator[Any]:
    only_text(column, path.name)
    yield decoded(path)


def _csv(path: Path, column: str) -> Iterator[Any]:
    """Yield the fields of a column. Raises DataError, naming the line, where a row does not fit the header.

    A delimiter at the end of a line makes one more field, which is empty; such fields are left out. pandas is
    not used: for rows longer than the header it takes the first column as an index and shifts the others.
    """
    csv.field_size_limit(_FIELD)
    position: int | None = None
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            for row in lines:
                if position is None:
                    if row:
                        position, width = _place(path, row, column), len(row)
                    continue
                if any(field.strip() for field in row[width:]):
                    raise DataError(
                        f"{path}, line {lines.line_num}: {len(row)} fields, but the header has {width}; "
                        "a text that holds the delimiter must be in quotes"
                    )
                if position < len(row):
                    yield row[position]
                elif any(field.strip() for field in row):
                    raise DataError(
                        f"{path}, line {lines.line_num}: {len(row)} fields, none for the column {column!r}; "
                        "a text of several lines must be in quotes"
                    )
    except UnicodeDecodeError as error:
        raise _undecodable(path) from error
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: not a readable CSV ({error})") from error
    if position is None:
        raise DataError(f"{path} is not a readable CSV: it has no header")


def _place(path: Path, header: list[str], column: str) -> int:
    """Return the position of a column in the header."""
    if header.count(column) > 1:
        raise DataError(f"{path} has {header.count(column)} columns named {column!r}")
    if column not in header:
        raise unknown_name("column", column, [name for name in header if name])
    return header.index(column)


def _jsonl(path: Path, column: str) -> Iterator[Any]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: {type(row).__name__}, not an object")
                require_known([column], row, f"column (line {number} of {path.name})")
                yield row[column]
    except UnicodeDecodeError as error:
        raise _undecodable(path) from error


def _parquet(path: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            require_known([column], file.schema_arrow.names, "column")
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".txt": _whole,
    ".md": _whole,
    ".py": _whole,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


def listing(folder: Path) -> tuple[list[tuple[str, Path]], str]:
    """Return the files of a folder that are read as text, and in words what is left out ("" for nothing).

    Files are (path in the folder, file), in the same order on every system. Left out are hidden files and
    folders, folders of tools and installed packages (a virtual environment has a `pyvenv.cfg`), files of
    other kinds, and, where the folder holds tables, what only describes or loads them: dataset cards,
    licenses, a script named as its folder.
    """
    found: list[tuple[str, Path]] = []
    left = Counter[str]()
    for where, folders, names in os.walk(folder):
        here = Path(where)
        for name in list(folders):
            if name.startswith(".") or name in _TOOLS or (here / name / "pyvenv.cfg").is_file():
                folders.remove(name)
                left[f"the folder {(here / name).relative_to(folder).as_posix()}"] += 1
        for name in names:
            path = here / name
            if name.startswith("."):
                left["hidden files"] += 1
            elif path.suffix.lower() not in READERS or not path.is_file():
                left[f"files of kind {path.suffix or name}"] += 1
            else:
                found.append((path.relative_to(folder).as_posix(), path))
    tables = [path for _, path in found if path.suffix.lower() in _TABLES]
    about = {shown for shown, path in found if _describes(path, tables)}
    left.update(f"{shown}, which describes tables" for shown in about)
    told = [what if n == 1 and "files" not in what else f"{n} {what}" for what, n in sorted(left.items())]
    more = f" and {len(told) - 8} more" if len(told) > 8 else ""
    return sorted(one for one in found if one[0] not in about), "; ".join(told[:8]) + more


def _describes(path: Path, tables: list[Path]) -> bool:
    """Whether a file describes or loads the tables in or below its folder, or is a card of the hub."""
    if path.suffix.lower() in _TABLES:
        return False
    if path.suffix.lower() == ".md":
        with path.open("rb") as file:
            if _CARD.match(file.read(1 << 16)):
                return True
    named = path.stem.lower().split(".")[0] in _ABOUT
    script = path.suffix == ".py" and path.stem == path.parent.name
    return (named or script) and any(path.parent in table.parents for table in tables)
