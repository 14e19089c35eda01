"""Batches of a training: drawn from a copy on the GPU where it fits, else read ahead and copied there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from asi_lens.base.memory import free_bytes

Index = TypeVar("Index")
Batch = TypeVar("Batch")


def read_ahead(read: Callable[[Index], Batch], indices: Iterable[Index]) -> Iterator[Batch]:
    """Yield `read(index)` for each index, in order. While one batch is in use, a thread reads the next batch.

    An error of `read` is raised where its batch is due.
    """
    with ThreadPoolExecutor(1) as reader:
        ahead: Future[Batch] | None = None
        for index in indices:
            now, ahead = ahead, reader.submit(read, index)
            if now is not None:
                yield now.result()
        if ahead is not None:
            yield ahead.result()


def pinned(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Return a tensor that can be copied to `device` without a wait.

    That is a copy in pinned memory if a tensor on the CPU is for a GPU; else it is the tensor itself.
    """
    to_gpu = device is not None and device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory() if to_gpu else tensor


def moved(tensor: Tensor, device: torch.device | None) -> Tensor:
    """Return a tensor on `device`; None leaves it where it is. A copy from pinned memory does not wait."""
    return tensor if device is None else tensor.to(device, non_blocking=tensor.is_pinned())


def room(device: torch.device | None) -> int:
    """Return the bytes that rows may take on a device: half of what is free on a GPU, none elsewhere."""
    return 0 if device is None else (free_bytes(device) or 0) // 2


def copied(parts: Sequence[Tensor], device: torch.device | None) -> Tensor | None:
    """Return all parts as one tensor on a GPU, if there is room, else None.

    A batch is drawn there in microseconds; to read 4,096 rows of 576 numbers here and copy them takes longer
    than a step with 16,384 features.
    """
    here = room(device)
    if device is None or not here:
        return None
    if len(parts) == 1 and parts[0].device == device:
        return parts[0]
    if sum(part.nbytes for part in parts) > here:
        return None
    whole = parts[0].new_empty((sum(map(len, parts)), *parts[0].shape[1:]), device=device)
    at = 0
    for part in parts:
        whole[at : at + len(part)].copy_(part)
        at += len(part)
    return whole
