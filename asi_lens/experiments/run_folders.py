"""Folders of cached runs: their names, their locks, and their mark of being finished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from asi_lens.base.errors import CacheError
from asi_lens.base.files import file_name, locked, write_text
from asi_lens.base.paths import cached
from asi_lens.training.checkpoint import CHECKPOINT_FILE

FINISHED_FILE = "finished.json"
_EARLIER_FILE = "run.json"


def run_folder(words: Iterable[object], key: str) -> Path:
    """Return the cache folder of a run. `key` covers all it depends on; `words` make the name readable."""
    return cached("runs", file_name(*words, key=key), FINISHED_FILE)


@contextmanager
def alone(folders: Iterable[Path]) -> Iterator[None]:
    """Lock the folders of runs. Another process that needs one of them waits, then finds it finished."""
    with ExitStack() as stack:
        # Locks are taken in sorted order, so that two processes never wait for each other.
        for folder in sorted(set(folders)):
            stack.enter_context(locked(folder))
        yield


def finish(folder: Path, about: Mapping[str, Any]) -> None:
    """Mark a run as finished, after all its other files are written. `about` holds JSON values."""
    write_text(folder / FINISHED_FILE, json.dumps(about, indent=1))
    # The checkpoint holds the optimizer state (three times the size of the weights), which a finished run no
    # longer needs.
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def is_finished(folder: Path, needed: Iterable[str]) -> bool:
    """Return whether a run is marked as finished. Raises CacheError if it is, but `needed` files are missing.

    The mark of earlier versions, `run.json`, is renamed.
    """
    earlier = folder / _EARLIER_FILE
    if earlier.exists() and not (folder / FINISHED_FILE).exists():
        earlier.rename(folder / FINISHED_FILE)
    if not (folder / FINISHED_FILE).exists():
        return False
    for name in needed:
        if not (folder / name).exists():
            raise CacheError(
                f"{folder / FINISHED_FILE} marks a finished run, but {folder / name} is missing; "
                f"delete {folder}"
            )
    return True


def about_run(folder: Path) -> dict[str, Any]:
    """Return the description of a finished run (JSON values)."""
    return json.loads((folder / FINISHED_FILE).read_text(encoding="utf-8"))
