"""Batches of a training, read ahead of their use and copied to a GPU without a wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

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
