"""Pictures, clips and sequences one after another: from a package, files, a folder or a list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.base.files import existing, plain_name
from asi_lens.inputs.media import items_of, media_names
from asi_lens.inputs.sources import SOURCES

# Kind -> ends of the names of its files.
_SUFFIXES = {
    "pictures": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"),
    "speech": (".wav",),
    "sequences": (".txt", ".fasta", ".fa", ".faa"),
}


class Items(NamedTuple):
    """Data of one kind."""

    name: str
    """For tables and figures."""
    items: Iterable[Any]
    """Files and objects that `pictures`, `speech` or `sequences` open."""


class Made(NamedTuple):
    """One item as a model takes it."""

    arrays: dict[str, Tensor]
    """Transformers' arguments, without an axis for items; the first axis of ids is their position."""
    kept: Tensor
    """Bool [position]: positions that are rows."""


def open_items(data: Any, kind: str) -> Items:
    """Return the items of a packaged data set, a file, a folder (sorted by path) or an iterable.

    Raises UnknownNameError for a name that is neither packaged nor a path, DataError for a folder without
    files of this kind and for packaged data of another kind, OptionError for anything else.
    """
    if isinstance(data, str) and data in media_names():
        if SOURCES[data].kind != kind:
            raise DataError(f"the packaged {data!r} holds {SOURCES[data].kind}; the model takes {kind}")
        return Items(data, items_of(data))
    if isinstance(data, str | Path):
        path = existing(data)
        if path is None:
            known = ", ".join(name for name in media_names() if SOURCES[name].kind == kind)
            raise UnknownNameError(f"{str(data)!r} is not a file or a folder of {kind} (packaged: {known})")
        return Items(plain_name(path), _files(path, kind))
    # An array without axes calls itself iterable.
    if isinstance(data, Iterable) and not isinstance(data, bytes | dict) and getattr(data, "ndim", None) != 0:
        return Items(f"given {kind}", data)
    given = type(data).__name__
    raise OptionError(f"data={given} is not allowed; data must be a file, a folder or a list of {kind}")


def _files(path: Path, kind: str) -> Iterator[Path]:
    if path.is_file():
        return iter([path])
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in _SUFFIXES[kind]
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise DataError(f"{path} holds no {kind}: no file that ends in {', '.join(_SUFFIXES[kind])}")
    return iter(found)


def label(kind: str, number: int, item: Any) -> str:
    """Return an item's name for errors."""
    named = item[0] if isinstance(item, tuple) and item else item
    return f"{kind} {number}" + (f" ({named})" if isinstance(named, Path) else "")
