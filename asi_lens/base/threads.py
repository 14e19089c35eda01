"""Sharing of one machine's cores between processes, such as the notebooks of `make figures JOBS=2`.

A forward pass is dominated by large matrix products, so several processes can share the cores if idle threads
sleep. Training steps are short: threads would mostly wait, so each process gets its own share of the cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

_JOBS = "ASI_LENS_JOBS"


def cores() -> int | None:
    """Return the number of cores that this process may use, or None if it is not known."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def share_cores(jobs: int) -> None:
    """Set environment variables for child processes, `jobs` of which run at the same time."""
    os.environ[_JOBS] = str(jobs)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's OpenMP (PyTorch on Linux)
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's OpenMP (PyTorch elsewhere)


@contextmanager
def _at_most(n: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, n))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def short_steps() -> AbstractContextManager[None]:
    """Limit PyTorch inside the context to this process's share of the cores (number of threads)."""
    return _at_most(max(1, (cores() or 1) // int(os.environ.get(_JOBS, "1"))))


def one_thread() -> AbstractContextManager[None]:
    """Let PyTorch compute on one thread inside the context.

    Small steps are not worth sharing: threads that wait for each other make them slower, and several times
    slower when other programs run on the machine. A long sum shared by other threads has other last bits.
    """
    return _at_most(1)
