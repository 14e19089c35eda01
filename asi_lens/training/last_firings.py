"""The last firing of every feature at each logged row of a training, and other numbers of every feature, kept
in the run's folder.

Every row is a file of its own. A run that was stopped repeats the steps after its checkpoint, and so writes
the files of those steps again, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from asi_lens.base.errors import CacheError
from asi_lens.base.safetensors_io import read_tensors, save_tensors
from asi_lens.training.learner import StepOutput

FOLDER = "last_firings"
_FIRED = "last_fired"


class LastFirings:
    """Writes the ledger's `last_fired` of trainers whenever a row is logged: `on_log` of `train_together`.

    `measure` returns more tensors of a trainer by name, to be written beside it.
    """

    def __init__(self, measure: Callable[[Any], Mapping[str, Tensor]] | None = None) -> None:
        self._folders: dict[Any, Path] = {}
        self._measure = measure

    def begin(self, trainer: Any, folder: Path, start: Mapping[str, Tensor]) -> None:
        """Keep firings of `trainer` in a run's `folder`, and `start`: tensors from before the first step."""
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        save_tensors(folder / FOLDER / "start.safetensors", start, {})
        self._folders[trainer] = folder

    def __call__(self, trainer: Any, output: StepOutput) -> None:
        """Write the last firings after a step. Raises OSError naming the file if it cannot be written."""
        more = {} if self._measure is None else self._measure(trainer)
        tensors = {_FIRED: trainer.ledger.last_fired, **more}
        save_tensors(_file(self._folders[trainer], output.tokens), tensors, {})


def read_start(folder: Path) -> dict[str, Tensor]:
    """Return the tensors from before the first step. Raises CacheError if they cannot be read."""
    return read_tensors(folder / FOLDER / "start.safetensors", CacheError, f"delete {folder}")[0]


def read_last_firings(folder: Path, tokens: Sequence[int]) -> Int[Tensor, "rows d_sae"]:
    """Return, at each of `tokens`, the tokens seen at each feature's last firing; 0 for never.

    `tokens` are those of logged rows. Raises CacheError for rows that were not kept.
    """
    return read_kept(folder, tokens, [_FIRED])[_FIRED]


def read_kept(folder: Path, tokens: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
    """Return tensors by name [rows d_sae] that were kept at each of `tokens`, those of logged rows.

    Raises CacheError for rows or names that were not kept.
    """
    repair = f"delete {folder} to train again"
    rows = [read_tensors(_file(folder, n), CacheError, repair, list(names))[0] for n in tokens]
    return {name: torch.stack([row[name] for row in rows]) for name in names}


def _file(folder: Path, tokens: int) -> Path:
    return folder / FOLDER / f"{tokens}.safetensors"
