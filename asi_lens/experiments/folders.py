"""Folders of finished trainings in the cache: what makes one finished, and what it says of itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from asi_lens.base.errors import CacheError
from asi_lens.base.files import locked, write_whole
from asi_lens.base.paths import cache_dir
from asi_lens.training.checkpoint import CHECKPOINT_FILE

_ABOUT = "run.json"


def run_folder(words: Iterable[object], key: str) -> Path:
    """The folder of a run under a key of all that it depends on; `words` are for those who look there."""
    return cache_dir("runs") / re.sub(r"[^\w.-]+", "-", "-".join([*map(str, words), key]))


@contextmanager
def alone(folders: Iterable[Path]) -> Iterator[None]:
    """Hold the folders of runs; a process that wants one of them too waits, and then finds it finished."""
    with ExitStack() as stack:
        # In one order, so that two processes never wait for each other.
        for folder in sorted(set(folders)):
            stack.enter_context(locked(folder))
        yield


def finish(folder: Path, about: Mapping[str, Any]) -> None:
    """Mark a run as finished: everything else is in its folder by now. `about` are JSON values."""
    with write_whole(folder / _ABOUT) as temporary:
        temporary.write_text(json.dumps(about, indent=1), encoding="utf-8")
    # Moments of the optimizer: three times the weights, for nothing once they are trained.
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def is_finished(folder: Path, needed: Iterable[str]) -> bool:
    """Whether it is marked so. Raises CacheError if it is, but files that it needs are missing."""
    if not (folder / _ABOUT).exists():
        return False
    for name in needed:
        if not (folder / name).exists():
            raise CacheError(
                f"{folder / _ABOUT} tells of a finished run, but {folder / name} is missing; delete {folder}"
            )
    return True


def about_run(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    return json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
