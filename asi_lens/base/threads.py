"""Several processes at work on one machine's cores, as the notebooks of `make figures JOBS=2`.

Products of a model's pass are large: threads of several processes share the cores well, if those that wait
for others sleep. Steps of training are short: there they would wait for each other most of the time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_JOBS = "ASI_LENS_JOBS"


def cores() -> int | None:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def share_cores(jobs: int) -> None:
    """Tell processes started from here that there are `jobs` of them at a time."""
    os.environ[_JOBS] = str(jobs)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's OpenMP, which PyTorch has on Linux
    os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's, which it has elsewhere


@contextmanager
def short_steps() -> Iterator[None]:
    """PyTorch has no more threads inside than this process' share of the cores."""
    import torch

    before = torch.get_num_threads()
    share = max(1, (cores() or 1) // int(os.environ.get(_JOBS, "1")))
    torch.set_num_threads(min(before, share))
    try:
        yield
    finally:
        torch.set_num_threads(before)
