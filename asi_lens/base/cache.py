"""The cache: small results as JSON, under a key of everything that they depend on, and whole folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from asi_lens.base.errors import CacheError
from asi_lens.base.files import cache_key, locked, read_json, sha256_of, write_text, write_whole_folder
from asi_lens.base.paths import cached

MANIFEST = "manifest.json"


def cached_json(kind: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """Return the result cached under `key` in the folder `kind`; compute and cache a missing result.

    See `cached_jsons`.
    """
    return cached_jsons(kind, [key], lambda _: [compute()])[0]


def cached_jsons(
    kind: str, keys: Sequence[Mapping[str, Any]], compute: Callable[[list[int]], Sequence[Any]]
) -> list[Any]:
    """Return the results cached under `keys` in the cache folder `kind`, one result per key.

    One call of `compute` makes all missing results, which are then cached. Its argument is the list of the
    missing keys' positions in `keys`; it returns one result per position.

    Keys and results must be JSON values. If two processes ask at the same time, only one computes. Raises
    CacheError, naming the file to delete, for a cache file that cannot be read. Results that the bundle has
    (`paths.cached`) are read from there.
    """
    paths = [cached(kind, f"{cache_key(**key)}.json") for key in keys]
    with ExitStack() as held:
        # Every process locks in the same order: no deadlock. Nothing is locked in a complete cache, which may
        # be read-only.
        for path in sorted({path for path in paths if not path.exists()}):
            held.enter_context(locked(path))
        missing = [paths.index(path) for path in dict.fromkeys(paths) if not path.exists()]
        if missing:
            for position, result in list(zip(missing, compute(missing), strict=True)):
                text = json.dumps({"key": dict(keys[position]), "result": result}, indent=1)
                write_text(paths[position], text)
        return [_read(path) for path in paths]


def _read(path: Path) -> Any:
    found = read_json(path, CacheError, "delete it and run again")
    if not isinstance(found, dict) or "result" not in found:
        raise CacheError(f"{path} cannot be read (it has no result); delete it and run again")
    return found["result"]


def cached_folder(
    folder: Path, about: Mapping[str, Any], fill: Callable[[Path], Mapping[str, Any]], repair: str
) -> dict[str, Any]:
    """Return the manifest of `folder`; the first call fills the folder, atomically and in one process.

    The manifest (`manifest.json` in the folder) holds `about`, the values that `fill` returned, and under
    `files` the size and SHA-256 of each file. Later calls compare `about` and the files' sizes with the
    manifest; they do not compare the files' contents.

    Args:
        about: JSON values that describe the folder's contents and their format.
        fill: writes the files into an empty folder (its argument) and returns values for the manifest.
        repair: how the user repairs a damaged folder; the last sentence of every error.

    Raises CacheError for a folder that was changed or is from another version, and OSError naming a folder
    that cannot be written. Errors of `fill` pass through.
    """
    if not folder.exists():  # checked before the lock, as a complete cache may be read-only
        with locked(folder):
            if not folder.exists():
                with write_whole_folder(folder) as temporary:
                    values = {**about, **fill(temporary), "files": _stamps(temporary)}
                    (temporary / MANIFEST).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return _checked(folder, about, repair)


def _checked(folder: Path, about: Mapping[str, Any], repair: str) -> dict[str, Any]:
    """Return the manifest after comparing `about` and the files' sizes with it.

    Raises CacheError, which states the SHA-256 of each file with another size.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(n): (int(f["size"]), str(f["sha256"])) for n, f in manifest["files"].items()}
        same = all(manifest.get(key) == value for key, value in about.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(f"{folder / MANIFEST} is missing or cannot be read ({error}). {repair}") from error
    if not same:
        raise CacheError(f"{folder} was written by another version of asi_lens. {repair}")
    wrong = []
    for name, (size, digest) in files.items():
        path = folder / name
        now = path.stat().st_size if path.is_file() else None
        if now != size:
            state = "missing" if now is None else f"{now:,} bytes, sha256 {sha256_of(path)}"
            wrong.append(f"{name}: {state}; expected {size:,} bytes, sha256 {digest}")
    if wrong:
        raise CacheError("\n  ".join((f"files of {folder.name} in the cache were changed:", *wrong, repair)))
    return manifest


def _stamps(folder: Path) -> dict[str, dict[str, int | str]]:
    """Return size and SHA-256 of every file below `folder`, by relative path."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for name, path in sorted(files.items())
    }
