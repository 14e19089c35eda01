"""Atomic writes of files and folders, locks between processes, cache keys and digests."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from asi_lens.base.errors import AsiLensError, DataError

_NAME_BYTES = 140
"""Most bytes of a file name made of names that a user chose.

File systems allow 255; locks, temporary files and suffixes add to a name."""


def existing(name: Path | str) -> Path | None:
    """Return the path of a file or folder that exists, with `~` resolved; None for any other text.

    Texts that no file system takes as a path (too long, zero bytes) are not paths either, nor is "".
    """
    try:
        path = Path(name).expanduser()
        return path if str(name) and path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def plain_name(path: Path) -> str:
    """Return the name of a file or folder as valid text; "" for the root of the file system."""
    return path.resolve().name.encode("utf-8", "backslashreplace").decode()


def file_name(*words: object, key: str = "") -> str:
    """Return words that a user chose and a key as a name of one file, joined by dashes.

    Letters, digits, dots and dashes are kept, so that a path or a hub name makes no subfolder. Words that are
    too long for a file name are cut, and get a hash of their own, so that two long names stay different.
    """
    told = re.sub(r"[^\w.-]+", "-", "-".join(map(str, words)))
    data, room = told.encode("utf-8"), _NAME_BYTES - len(key)
    if len(data) > room:
        told = f"{data[: room - 9].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:8]}"
    return f"{told}-{key}" if key else told


@contextmanager
def write_whole(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on a clean exit, flush that file and rename it to `path`.

    On any error, Ctrl-C included, the temporary file is removed and an older file at `path` stays.
    An OSError (full disk, read-only folder) is raised again with the path that could not be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last: numpy, plotly and other writers choose the format by the suffix.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
    except OSError as error:
        raise _cannot_write(path, error) from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; see `write_whole`.

    Raises DataError for a text with half of a surrogate pair, which no file can hold.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - 20) : error.start + 1]
        raise DataError(f"{path}: {part!r} ends in half of a surrogate pair, which is not text") from error
    with write_whole(path) as temporary:
        temporary.write_bytes(data)


def read_json(path: Path | str, error: type[AsiLensError], repair: str) -> Any:
    """Return the JSON value in a file. Raises `error`: the path, the reason and `repair`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read ({reason}); {repair}") from reason


def read_yaml_mapping(path: Path | str) -> dict[str, Any]:
    """Return the keys and values of a YAML file; {} for an empty file. Raises DataError naming the file."""
    import yaml

    try:
        # The same rules, ten times as fast: the runner reads all files of parameters for each notebook.
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        values = yaml.load(Path(path).read_text(encoding="utf-8"), loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict | None):
        raise DataError(f"{path} must hold keys and values")
    return values or {}


@contextmanager
def write_whole_folder(folder: Path | str) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; on a clean exit, rename it to `folder`.

    An older folder at `folder` is replaced only after the new folder is complete.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise _cannot_write(folder, error) from error
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def locked(path: Path | str, busy: Exception | None = None) -> Iterator[None]:
    """Hold a lock between processes on `path` (a `.lock` file beside it).

    If another process holds the lock, wait for that process, or raise `busy` if `busy` is given. The lock
    ends with its process: a killed process does not leave a lock behind.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(path.name + ".lock"))
        lock.acquire(timeout=-1 if busy is None else 0)
    except Timeout:
        assert busy is not None
        raise busy from None
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()


def cache_key(**parts: Any) -> str:
    """Return 16 hex digits that change with any part (parts must be JSON values)."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_of(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes as hex digits; the file is read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_digest(package: str = "asi_lens") -> str:
    """Return 16 hex digits of a package's Python files, in a checkout or in a zip."""
    todo = [(package, resources.files(package))]
    found = {}
    while todo:
        name, entry = todo.pop()
        if entry.is_dir():
            todo += [(f"{name}/{inner.name}", inner) for inner in entry.iterdir()]
        elif name.endswith(".py"):
            found[name] = hashlib.sha256(entry.read_bytes()).hexdigest()
    text = "".join(f"{name} {found[name]}\n" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _cannot_write(path: Path, error: OSError) -> OSError:
    """Return the error with `path` in its text; an error about an unrelated file is returned as it is."""
    if not error.errno:
        return error
    if error.filename is not None:
        named = Path(os.fsdecode(error.filename))
        if path.parent not in named.parents and named not in path.parents:
            return error
    return type(error)(error.errno, f"cannot write {path}: {os.strerror(error.errno)}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
