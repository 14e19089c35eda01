"""What is made once and kept: small results as JSON under a key of all they depend on, and whole folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from asi_lens.base.errors import CacheError
from asi_lens.base.files import cache_key, locked, sha256_of, write_whole, write_whole_folder
from asi_lens.base.paths import cache_dir

MANIFEST = "manifest.json"


def cached_json(kind: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """The result kept under `key` in the cache folder `kind`, or `compute()`, kept; see `cached_jsons`."""
    return cached_jsons(kind, [key], lambda _: [compute()])[0]


def cached_jsons(
    kind: str, keys: Sequence[Mapping[str, Any]], compute: Callable[[list[int]], Sequence[Any]]
) -> list[Any]:
    """The results kept under `keys` in the cache folder `kind`.

    Those that are not there are computed at once and kept: `compute` is given their positions in `keys`.

    Keys and results must be JSON values. Two processes that ask at once compute a result once. Raises
    CacheError for a file that cannot be read: it names the file to delete.
    """
    paths = [cache_dir(kind) / f"{cache_key(**key)}.json" for key in keys]
    with ExitStack() as held:
        for path in sorted(set(paths)):  # in one order everywhere, or two processes wait for each other
            held.enter_context(locked(path))
        missing = [paths.index(path) for path in dict.fromkeys(paths) if not path.exists()]
        if missing:
            for position, result in list(zip(missing, compute(missing), strict=True)):
                text = json.dumps({"key": dict(keys[position]), "result": result}, indent=1)
                with write_whole(paths[position]) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        return [_read(path) for path in paths]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["result"]
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{path} cannot be read ({error!r}); delete it and run again") from error


def cached_folder(
    folder: Path, about: Mapping[str, Any], fill: Callable[[Path], Mapping[str, Any]], repair: str
) -> dict[str, Any]:
    """Return the manifest of `folder`, which is filled on first use: whole or not at all, by one process.

    The manifest (`manifest.json` in the folder) holds `about`, what `fill` returned, and under `files` the
    size and SHA-256 of each. Later calls compare `about` and the sizes with it, not the contents.

    Args:
        about: JSON values that say what the folder holds, and in which format.
        fill: writes the files into the empty folder that it is given.
        repair: what the user does about a damaged folder, the end of every error's text.

    Raises CacheError for a folder that was changed or is from another version, OSError naming a folder that
    cannot be written, and what `fill` raises.
    """
    if not folder.exists():  # before the lock: a whole cache may lie in a read-only folder
        with locked(folder):
            if not folder.exists():
                with write_whole_folder(folder) as temporary:
                    values = {**about, **fill(temporary), "files": _stamps(temporary)}
                    (temporary / MANIFEST).write_text(json.dumps(values, indent=1), encoding="utf-8")
    return _checked(folder, about, repair)


def _checked(folder: Path, about: Mapping[str, Any], repair: str) -> dict[str, Any]:
    """The manifest, if it is about the same; sizes against it. Hashes of what differs go into the error."""
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
    """Size and SHA-256 of every file."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for name, path in sorted(files.items())
    }
