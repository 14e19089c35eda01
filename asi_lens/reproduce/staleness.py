"""Detection of outdated notebooks, by digests of a notebook's dependencies and of its output files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from asi_lens.base.errors import CacheError
from asi_lens.base.files import cache_key, existing, locked, sha256_of, write_text
from asi_lens.results import provenance
from asi_lens.results.parameters_cell import notebook_path
from asi_lens.results.sidecar import files_of, read_sidecar, sidecar_path

STATE_FILE = ".state.json"
TIMES = ("wall_time_s", "longest_wall_time_s", "timed_key")
"""Keys that the runner adds to a sidecar."""


def key_of(name: str, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest for each possible cause of a change in the notebook's output."""
    # Notebooks do not use `reproduce`, so a change to it does not make a notebook outdated.
    room = Path(__file__).resolve().parent
    sources = {
        path.relative_to(room.parent).as_posix(): sha256_of(path)
        for path in sorted(room.parent.rglob("*"))
        if path.suffix in (".py", ".html", ".j2") and room not in path.parents
    }
    told = {key: value for key, value in parameters.items() if key != "output_folder"}
    inputs = dict(_stated(told))
    return {
        "the notebook": cache_key(code=_code(notebook_path(name))),
        "its parameters": cache_key(**told),
        "the package": cache_key(**sources),
        "installed versions": cache_key(**provenance.versions()),
        **({"its inputs": cache_key(**inputs)} if inputs else {}),
    }


def _stated(value: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the path, and size and time, of every file that a parameter names by its path or its folder's.

    Notebooks run in a folder of their own, so only a whole path is one; any other text is a name.
    """
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _stated(one)
    elif isinstance(value, str) and (path := existing(value)) and path.is_absolute():
        for file in [path, *path.rglob("*")]:
            if file.is_file():
                yield str(file), (file.stat().st_size, file.stat().st_mtime_ns)


def out_of_date(folder: Path, name: str, key: Mapping[str, str]) -> str:
    """Return why the notebook has to run; "" if it is up to date."""
    entry = _state(folder).get(name)
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), dict):
        return "not run yet"
    changed = [cause for cause, digest in key.items() if entry["key"].get(cause) != digest]
    if changed:
        return f"changed: {', '.join(changed)}"
    return changed_since(folder, name)


def changed_since(folder: Path, name: str) -> str:
    """Return which file is not as the notebook's last complete run left it; "" for none, or without a record.

    A run that was stopped leaves new tables beside the captions and verdicts of the run before it.
    """
    entry = _state(folder).get(name)
    for file, digest in entry["files"].items() if isinstance(entry, dict) else ():
        if not (folder / file).is_file():
            return f"{file} is gone"
        if _digest(folder / file) != digest:
            return f"{file} was changed"
    return ""


def left_by(folder: Path, name: str) -> list[Path]:
    """Return the files that the notebook's last complete run wrote into the folder, sidecar included."""
    try:
        found = read_sidecar(folder, name)
    except CacheError:
        return [sidecar_path(folder, name)]
    if found is None:
        return []
    return [path for file in files_of(found) if (path := folder / file).is_file()] + [
        sidecar_path(folder, name)
    ]


def record(folder: Path, name: str, key: Mapping[str, str]) -> None:
    """Record that the notebook has just run under `key`, with digests of its output files."""
    with locked(folder / STATE_FILE):
        state = _state(folder)
        state[name] = {
            "key": key,
            "files": {path.name: _digest(path) for path in left_by(folder, name) if path.suffix != ".png"},
        }
        write_text(folder / STATE_FILE, json.dumps(state, indent=1))


def _digest(path: Path) -> str:
    """Return the digest of a file; of a sidecar, without the keys that the runner adds (times, images)."""
    if path.suffix != ".json":
        return sha256_of(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        figures = {stem: one | {"png": None, "reason": None} for stem, one in found["figures"].items()}
    except (ValueError, KeyError, AttributeError, TypeError):
        return "damaged"
    return cache_key(
        **{key: value for key, value in found.items() if key not in TIMES} | {"figures": figures}
    )


def _code(notebook: Path) -> list[str]:
    """Return the code cells only, since prose, outputs and editors' metadata do not change results."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # A damaged record is ignored: the notebooks run again, from their caches.
        return {}
    return state if isinstance(state, dict) else {}
