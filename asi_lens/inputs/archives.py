"""Files taken out of archives: wheels, zips, sdists and Debian packages; nothing leads out of the folder.

tarfile's `data` filter strips absolute paths instead of refusing them, so that names are checked here.
"""

from __future__ import annotations

import fnmatch
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BytesIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import cast

from asi_lens.base.errors import FetchError

_BLOCK = 1 << 18
_AR = b"!<arch>\n"


def safe_name(name: str, archive: str) -> PurePosixPath:
    """Return the path of an archive member. Raises FetchError for an absolute path or one with `..`."""
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    parts = {*path.parts, *windows.parts}
    if not name or path.is_absolute() or windows.drive or windows.root or ".." in parts:
        raise FetchError(
            f"{archive} contains the path {name!r}, which leads out of the folder; nothing was unpacked"
        )
    return path


@contextmanager
def opened_archive(path: Path) -> Iterator[tuple[list[str], Callable[[str], BufferedIOBase]]]:
    """Yield the names of the plain files in a wheel, zip, tar.gz or .deb, and a function that opens one.

    All names are checked before any file can be opened. Opening a link or device raises FetchError.
    """
    try:
        if path.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(path) as archive:
                names = [info.filename for info in archive.infolist() if not info.is_dir()]
                for name in names:
                    safe_name(name, path.name)
                yield names, lambda name: _zip_member(archive, name, path.name)
        else:
            inner = data_of_deb(path) if path.suffix == ".deb" else None
            with tarfile.open(path, "r:*", fileobj=inner) as tar:
                members = {m.name: m for m in tar.getmembers() if not m.isdir()}
                for name in members:
                    safe_name(name, path.name)
                yield list(members), lambda name: _tar_member(tar, members[name], path.name)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise FetchError(f"{path} is not a readable archive: {error}") from error


def _zip_member(archive: zipfile.ZipFile, name: str, shown: str) -> BufferedIOBase:
    mode = archive.getinfo(name).external_attr >> 16
    if mode & 0o170000 == 0o120000:
        raise FetchError(f"{shown}: {name!r} is a link, not a file; nothing was unpacked")
    return cast(BufferedIOBase, archive.open(name))


def _tar_member(tar: tarfile.TarFile, member: tarfile.TarInfo, shown: str) -> BufferedIOBase:
    opened = tar.extractfile(member) if member.isreg() else None
    if opened is None:
        raise FetchError(f"{shown}: {member.name!r} is a link or device, not a file; nothing was unpacked")
    return cast(BufferedIOBase, opened)


def unpack(archive: Path, pattern: str, target: str | None, folder: Path) -> list[Path]:
    """Copy the members that match `pattern` into `folder`; return the paths of the written files.

    `pattern` is a path or glob; `outer.zip!inner.csv` names a file in a zip inside the archive. With
    `target`, the matches are appended to that file in sorted order; without `target`, each match keeps its
    path. Raises FetchError if nothing matches or a path leads out of the folder.
    """
    pattern, _, inner = pattern.partition("!")
    written: list[Path] = []
    with opened_archive(archive) as (names, open_member):
        chosen = sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))
        if not chosen:
            raise FetchError(f"{archive.name} has no member {pattern!r}")
        for name in chosen:
            if inner:
                # zipfile needs a seekable file, so the inner zip is written to disk first.
                nested = folder / ".nested.zip"
                with open_member(name) as source, nested.open("wb") as out:
                    shutil.copyfileobj(source, out, _BLOCK)
                written += unpack(nested, inner, target, folder)
                nested.unlink()
                continue
            path = folder / safe_name(target or name, archive.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_member(name) as source, path.open("ab") as out:
                shutil.copyfileobj(source, out, _BLOCK)
            written.append(path)
    return written


def data_of_deb(path: Path) -> BytesIO:
    """Return the archive `data.tar.*` inside a Debian package, which is an `ar` archive of three members.

    Raises FetchError for a file that is not a Debian package or is cut off.
    """
    data = path.read_bytes()
    place = len(_AR)
    if not data.startswith(_AR):
        raise FetchError(f"{path} is not a Debian package")
    while place + 60 <= len(data):  # a header of 60 bytes: name, 16; size, 10 from 48 on
        name = data[place : place + 16].decode("ascii", "replace").strip().removesuffix("/")
        digits = data[place + 48 : place + 58].decode("ascii", "replace").strip()
        if not digits.isdecimal():
            break
        place, size = place + 60, int(digits)
        if name.startswith("data.tar") and place + size <= len(data):
            return BytesIO(data[place : place + size])
        place += size + size % 2
    raise FetchError(f"{path} is a Debian package without its data, or is cut off")
