"""Text as a stream of documents: packaged corpora, files, folders, `datasets` objects, lists, hub names.

A document is one row of a table (`.csv`, `.jsonl`, `.parquet`, `datasets`), one string of a list, or one
whole file (`.txt`, `.md`, `.py`). Files are not cut at blank lines, so a text keeps its length. A folder
gives its readable files, sorted by path. Documents without text are skipped.

`readers` reads files and lists folders. `datasets.load_dataset` is not used: its errors do not name the line
of the file, and it does not return the rows before a damaged line.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from asi_lens.base.cache import MANIFEST
from asi_lens.base.errors import DataError, OptionError, require, require_known, shown, unknown_name
from asi_lens.base.files import cache_key, existing, plain_name, sha256_of
from asi_lens.inputs.hub import SHUFFLE_BUFFER, column_of, hub_commit, hub_rows
from asi_lens.inputs.readers import READERS, decoded, listing, only_text
from asi_lens.inputs.sources import SOURCES, corpus_names, fetch, say
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
            _bytes_of(row, number, self.name)
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
    if isinstance(source, str) and existing(source) is None and _is_hub_name(source):
        return _from_hub(source, column, split, name)
    require(name is None, "name", name, "left out: only hub datasets have configurations")
    require(split == "train", "split", split, "'train': nothing else is split here")
    if isinstance(source, str) and source in corpus_names():
        return (_mixture if source in MIXTURES else _packaged)(source, column)
    if isinstance(source, str | Path):
        return _from_path(source, column)
    if isinstance(source, list | tuple):
        only_text(column, "a list of strings")
        return _from_list(source)
    raise OptionError(
        f"source of type {type(source).__name__} is not allowed; source must be a corpus name "
        f"({', '.join(corpus_names())}), a path, a hub name 'owner/name', a `datasets` object or a list of "
        "strings"
    )


def _is_hub_name(source: str) -> bool:
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", source) is not None
    return plain and not source.startswith(".") and Path(source).suffix.lower() not in READERS


def _packaged(name: str, column: str) -> Corpus:
    source = SOURCES[name]

    def rows() -> Iterator[Any]:
        folder = fetch(name)
        if source.layout == "csv":
            for path in sorted(folder.glob("*.csv")):
                yield from READERS[".csv"](path, column)
        elif source.layout == "lines":
            for path in sorted(folder.glob("*.txt")):
                # Not splitlines(), which also cuts at separators inside a line.
                yield from decoded(path).replace("\r\n", "\n").split("\n")
        elif source.layout == "json":
            seen: set[bytes] = set()
            for path in sorted(p for p in folder.rglob("*.json*") if p.name != MANIFEST):
                found = distinct(texts_of(path, source), seen)
                yield from ["\n\n".join(found)] if source.joined else found
        else:
            files = (decoded(path) for _, path in listing(folder)[0])
            yield from distinct(files, set()) if source.distinct else files

    if source.layout != "csv":
        only_text(column, name)
    return Corpus(name, f"{name}-{source.key}", rows)


def _mixture(name: str, column: str) -> Corpus:
    only_text(column, name)
    shares = MIXTURES[name]
    parts = {part: _packaged(part, column) for part in shares}
    key = cache_key(parts=[[part.fingerprint, shares[name]] for name, part in parts.items()])

    def rows() -> Iterator[Any]:
        return interleaved({name: part.documents() for name, part in parts.items()}, shares)

    return Corpus(name, f"{name}-{key}", rows)


def _from_path(source: str | Path, column: str) -> Corpus:
    path = existing(source)
    if path is None:
        if isinstance(source, str) and "/" not in source and not Path(source).suffix:
            raise unknown_name("corpus", shown(source), corpus_names())
        raise DataError(f"no file or folder {_cut(source)} (packaged corpora: {', '.join(corpus_names())})")
    name = plain_name(path)
    if path.is_dir():
        require(name != "", "source", str(source), "a folder of texts, not the whole file system")
        files, left_out = listing(path)
        if not files:
            raise DataError(
                f"no readable text in the folder {path}; readable are {', '.join(READERS)}"
                + (f" (left out: {left_out})" if left_out else "")
            )
        if left_out:
            say(f"{path}: {len(files)} files are read as text; left out: {left_out}")
    else:
        if path.suffix.lower() not in READERS:
            raise unknown_name("kind of text file", path.suffix or path.name, READERS)
        files = [(path.name, path)]

    def rows() -> Iterator[Any]:
        for _, file in files:
            yield from READERS[file.suffix.lower()](file, column)

    return Corpus(name, cache_key(files=[[shown, sha256_of(file)] for shown, file in files]), rows)


def _from_list(texts: list[Any] | tuple[Any, ...]) -> Corpus:
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        data = _bytes_of(text, number, "the list")
        digest.update(len(data).to_bytes(8, "little") + data)
    return Corpus(f"list of {len(texts)} texts", digest.hexdigest(), lambda: texts)


def _bytes_of(text: Any, number: int, name: str) -> bytes:
    """Return a document in UTF-8. Raises DataError for another type, and for half of a surrogate pair."""
    if not isinstance(text, str):
        raise DataError(f"document {number} of {name} is {type(text).__name__}, not text")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"document {number} of {name} is not valid text: character {error.start:,} is "
            f"{text[error.start]!r}, half of a surrogate pair"
        ) from error


def _cut(source: object) -> str:
    return shown(str(source)).strip("'")


def _from_datasets(source: Any, column: str, split: str, name: str | None) -> Corpus:
    require(name is None, "name", name, "left out for a dataset that is loaded already")
    if isinstance(source, dict):  # DatasetDict and IterableDatasetDict
        require_known([split], source, "split")
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
