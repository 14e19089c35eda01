"""The sidecar: one JSON file that a notebook writes beside its tables and figures.

The sidecar records how the numbers were made (parameters, seeds, sources, versions, commit, machine), the
names of the written files, the figures' captions and the verdicts. Each notebook writes only its own sidecar,
so a run replaces only its own files. `join` writes `claims.csv` and `run.json` from all sidecars of a folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asi_lens.base.errors import CacheError, DataError
from asi_lens.base.files import write_text
from asi_lens.results.claims import CLAIMS_FILE, claim_order, rows_of
from asi_lens.results.tables import write_rows

FORMAT = 1
RUN_FILE = "run.json"
_KEYS = {"notebook", "parameters", "seeds", "sources", "figures", "tables", "verdicts"}


def sidecar_path(folder: Path | str, notebook: str) -> Path:
    """Return `<folder>/<notebook>.json`."""
    return Path(folder) / f"{notebook}.json"


def write_sidecar(folder: Path | str, content: Mapping[str, Any]) -> Path:
    """Write the sidecar of `content["notebook"]`; return its path. Raises DataError for non-JSON values."""
    path = sidecar_path(folder, content["notebook"])
    _write(path, {"format": FORMAT, **content})
    return path


def read_sidecar(folder: Path | str, notebook: str) -> dict[str, Any] | None:
    """Return the sidecar of a notebook; None if there is no sidecar.

    Raises CacheError for a file that is damaged or of another format: delete it and run the notebook again.
    """
    path = sidecar_path(folder, notebook)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] == FORMAT and found.keys() >= _KEYS and found["notebook"] == notebook:
            return found
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise CacheError(f"{path} is damaged or from another version; delete it and run {notebook} again")


def read_sidecars(folder: Path | str) -> dict[str, dict[str, Any]]:
    """Return all sidecars of a folder by notebook, in the notebooks' order. Raises as `read_sidecar`."""
    names = sorted(path.stem for path in Path(folder).glob("[0-9]*_*.json"))
    return {name: found for name in names if (found := read_sidecar(folder, name)) is not None}


def files_of(sidecar: Mapping[str, Any]) -> list[str]:
    """Return the sorted names of the tables, pages and images of a sidecar, without the sidecar itself."""
    names = [f"{stem}.csv" for stem in sidecar["tables"]]
    for stem, figure in sidecar["figures"].items():
        names += [f"{stem}.html", *([f"{stem}.png"] if figure["png"] else [])]
    return sorted(names)


def figures_in(sidecars: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return all figures of some sidecars by stem: title, subtitle, caption, and whether there is a PNG."""
    return {stem: one for sidecar in sidecars.values() for stem, one in sidecar["figures"].items()}


def figures_of(folder: Path | str) -> dict[str, dict[str, Any]]:
    """Return all figures of a folder by stem; see `figures_in`."""
    return figures_in(read_sidecars(folder))


def longest_time(sidecar: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """Return the longest seconds of a notebook with the same parameters, in a sidecar and an earlier sidecar.

    A run from warm caches takes seconds; the longest time is the cost of the numbers.
    """
    key = "longest_wall_time_s"
    mine: float = sidecar[key if key in sidecar else "wall_time_s"]
    same = sidecar["timed_key"] == before.get("timed_key")
    return max(mine, before.get(key, 0.0)) if same else mine


def join(folder: Path | str) -> None:
    """Write `claims.csv` and `run.json` from all sidecars; without verdicts, `claims.csv` is removed."""
    folder = Path(folder)
    found = read_sidecars(folder)
    rows = [row for name, one in found.items() for row in rows_of(one["verdicts"], name)]
    if rows:
        rows.sort(key=claim_order)
        write_rows(folder / CLAIMS_FILE, rows)
    else:
        (folder / CLAIMS_FILE).unlink(missing_ok=True)
    about = {name: {k: v for k, v in one.items() if k != "verdicts"} for name, one in found.items()}
    _write(folder / RUN_FILE, {"format": FORMAT, "notebooks": about})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} can hold only JSON values ({error})") from error
    write_text(path, text + "\n")
