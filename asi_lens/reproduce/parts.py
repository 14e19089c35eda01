"""Files as one stream in numbered parts, with a manifest of SHA-256 sums: written, checked, unpacked.

    bundle.json          the manifest
    part-000.tar.gz ...  the stream, cut at a size in bytes; all parts together are one tar.gz
    project.zip          the source of the project, on which Python can run

Only the standard library is used, so that a bundle can be unpacked where nothing is installed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from asi_lens.base.errors import CacheError, DataError
from asi_lens.base.files import sha256_of, write_text, write_whole_folder

MANIFEST, FORMAT = "bundle.json", 1
_BLOCK = 1 << 20
_UNPACKED = "unpacked.json"


def write_parts(folder: Path, files: Mapping[str, Path], part_bytes: int) -> dict[str, Any]:
    """Write files into parts of at most `part_bytes` bytes; returns the entries `parts` and `files` of a
    manifest.

    `files`: path on disk by path in the bundle. A file larger than a part continues in the next part.
    """
    stamps: dict[str, dict[str, Any]] = {}
    with _Parts(folder, part_bytes) as out, tarfile.open(fileobj=out, mode="w|gz", bufsize=_BLOCK) as tar:
        tar.dereference = True  # two names of one file are two files
        for name, path in sorted(files.items()):
            tar.add(path.resolve(), _safe(name), recursive=False)
            stamps[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    return {"parts": out.written, "files": stamps}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, last of all files: a folder without it is not a bundle."""
    write_text(folder / MANIFEST, json.dumps({"format": FORMAT, **manifest}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a bundle. Raises DataError for a folder that is not a bundle of this format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and isinstance(manifest["files"], dict)
        [(_safe(part["file"]), part["size"], part["sha256"]) for part in manifest["parts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is not a whole bundle: {MANIFEST} cannot be read ({error!r})") from error
    if not known:
        raise DataError(f"{folder / MANIFEST} has another format than {FORMAT}; make the bundle anew")
    return dict(manifest)


def check_parts(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise CacheError that names every part which is missing or was changed."""
    wrong = []
    for part in manifest["parts"]:
        path = folder / part["file"]
        if not path.is_file():
            wrong.append(f"{path.name} is missing")
        elif (size := path.stat().st_size) != part["size"]:
            wrong.append(f"{path.name} has {size:,} bytes, not {part['size']:,}")
        elif (digest := sha256_of(path)) != part["sha256"]:
            wrong.append(f"{path.name} has sha256 {digest}, not {part['sha256']}")
    if wrong:
        raise CacheError("\n  ".join((f"{folder} is not as it was made; copy these again:", *wrong)))


def unpack_parts(folder: Path, manifest: Mapping[str, Any], into: Path) -> None:
    """Write the files of checked parts into `into`, whole or not at all; done once for a bundle.

    Raises CacheError for a file that is missing or changed, or if `into` holds something else, and OSError
    naming a path that cannot be written.
    """
    told = {"files": manifest["files"], "parts": manifest["parts"]}
    if into.exists():
        done = into / _UNPACKED
        if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == told:
            return
        raise CacheError(f"{into} holds something else than this bundle; choose another folder or delete it")
    paths = [folder / part["file"] for part in manifest["parts"] if part["file"].startswith("part-")]
    with write_whole_folder(into) as temporary:
        left = dict(manifest["files"])
        try:
            with tarfile.open(fileobj=_Joined(paths), mode="r|gz", bufsize=_BLOCK) as tar:  # type: ignore[call-overload]
                for member in tar:
                    _unpack_one(tar, member, left.pop(member.name), temporary)
        except (KeyError, tarfile.TarError, EOFError) as error:
            raise CacheError(f"the parts in {folder} do not belong together ({error!r})") from error
        if left:
            raise CacheError(f"the parts in {folder} lack {', '.join(left)}")
        (temporary / _UNPACKED).write_text(json.dumps(told), encoding="utf-8")


def _unpack_one(tar: tarfile.TarFile, member: tarfile.TarInfo, stamp: Mapping[str, Any], into: Path) -> None:
    source = tar.extractfile(member) if member.isreg() else None
    if source is None:
        raise CacheError(f"{member.name} is not a plain file; nothing is unpacked")
    path, digest = into / _safe(member.name), hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        while block := source.read(_BLOCK):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != stamp["sha256"]:
        raise CacheError(f"{member.name} has another sha256 than the manifest says; nothing is unpacked")


def _safe(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts:
        raise DataError(f"{name!r} leads out of the bundle")
    return name


class _Parts(io.RawIOBase):
    """A file to write to that is cut into parts."""

    def __init__(self, folder: Path, part_bytes: int):
        self.folder, self.part_bytes = folder, part_bytes
        self.written: list[dict[str, Any]] = []
        self._part: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        """Write all bytes."""
        left = memoryview(data)
        while left:
            if self._part is None:
                self._part, self._digest, self._size = self._path().open("wb"), hashlib.sha256(), 0
            block = left[: self.part_bytes - self._size]
            self._part.write(block)
            self._digest.update(block)
            self._size += len(block)
            left = left[len(block) :]
            if self._size == self.part_bytes:
                self._end()
        return len(data)

    def close(self) -> None:
        """End the last part."""
        self._end()
        super().close()

    def _path(self) -> Path:
        return self.folder / f"part-{len(self.written):03}.tar.gz"

    def _end(self) -> None:
        if self._part is not None:
            self._part.close()
            stamp = {"file": self._path().name, "size": self._size, "sha256": self._digest.hexdigest()}
            self.written.append(stamp)
            self._part = None


class _Joined:
    """The parts as one file to read, with all that tarfile asks of a stream: blocks of any size."""

    def __init__(self, paths: list[Path]):
        self._blocks = _blocks(paths)

    def read(self, size: int) -> bytes:
        """Return the next block; empty at the end."""
        return next(self._blocks, b"")


def _blocks(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block


def files_below(folder: Path, prefix: str) -> dict[str, Path]:
    """Return the files of a folder by their path in a bundle: below `prefix`, without locks and caches."""
    if folder.is_file():
        return {prefix: folder}
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}": path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and "__pycache__" not in path.parts
    }


def stamp_of(path: Path) -> dict[str, Any]:
    """Return the manifest's entry of a file that is not in the stream."""
    return {"file": path.name, "size": os.path.getsize(path), "sha256": sha256_of(path)}
