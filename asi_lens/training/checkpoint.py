"""The folder of a training run: one checkpoint, one trainer at a time.

A checkpoint is one safetensors file with its description as JSON in the header. It is written atomically:
the previous checkpoint stays until the new one is complete, also on a full disk. Nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from asi_lens.base.errors import AsiLensError, CacheError
from asi_lens.base.safetensors_io import opened, save_tensors
from asi_lens.kernels.devices import card

CHECKPOINT_FILE = "checkpoint.safetensors"
FORMAT = 1


class FolderInUseError(AsiLensError, RuntimeError):
    """Another trainer writes to the folder."""


class OtherConfigurationError(AsiLensError, ValueError):
    """The checkpoint belongs to a run with another configuration."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock `folder` for one trainer. Another trainer, in this process or not, gets a FolderInUseError.

    The lock ends with the process, also when the process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"another trainer is writing to {folder}; wait for it, stop it, or use another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Path:
    """Replace the folder's checkpoint; returns its path. `about` must hold JSON values.

    Raises OSError naming the file if it cannot be written; the previous checkpoint then stays.
    """
    path = folder / CHECKPOINT_FILE
    text = json.dumps({"format": FORMAT, **about}, allow_nan=False)
    save_tensors(path, tensors, {"asi_lens_checkpoint": text})
    return path


@contextmanager
def read_checkpoint(folder: Path) -> Iterator[tuple[dict[str, Any], Callable[[str], Tensor]] | None]:
    """Yield the folder's checkpoint as (about, a function that reads one tensor), or None if it has none.

    Raises CacheError for a file that is damaged, not a checkpoint, or of another format.
    """
    path = folder / CHECKPOINT_FILE
    if not path.exists():
        yield None
        return
    with opened(path, CacheError, "delete it and train again") as file:
        text = (file.metadata() or {}).get("asi_lens_checkpoint")
        about = json.loads(text) if text else {}
        require_format(path, about)
        yield about, file.get_tensor


def where_it_runs(device: torch.device) -> dict[str, str]:
    """Return the part of a run's description that names its device; empty for a CPU.

    Another device, or another card, adds in another order, so a run that moved there would not end with the
    same bits.
    """
    return {} if device.type == "cpu" else {"device": card(device)}


def require_format(path: Path, about: Mapping[str, Any]) -> None:
    """Raise CacheError unless this version reads the format of the checkpoint described by `about`."""
    if about.get("format") != FORMAT:
        raise CacheError(
            f"{path} has format {about.get('format')!r}, but this version reads {FORMAT}; delete it"
        )


def require_same(folder: Path, stored: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise OtherConfigurationError naming every field in which the two descriptions differ."""
    # Only descriptions of runs on other devices than a CPU name theirs; those of 1.0.0 lack newer options.
    absent = {"device": "cpu", "train.encoder_lr": 1.0, "initialization.overshoot": 1.0}
    old, new = (absent | _flat(about) for about in (stored, json.loads(json.dumps(here))))
    differing = [
        f"{key} ({old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} here)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]
    if differing:
        raise OtherConfigurationError(
            f"{folder / CHECKPOINT_FILE} belongs to another configuration: {', '.join(differing)}; "
            "use another folder, or delete the checkpoint to start over"
        )


_ABSENT = object()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
