"""Free memory of a device and of the machine."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

_ROOT = Path("/")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that tensors on `device` may still take, None for a CPU.

    Memory that PyTorch holds but has no tensor in counts as free.
    """
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def host_bytes() -> int | None:
    """Return the bytes of main memory that this process may still take; None where Linux does not tell.

    Limits of control groups count (containers, batch jobs). Copies of files, which give way, are free.
    """
    try:
        [free] = re.findall(r"MemAvailable:\s+(\d+) kB", (_ROOT / "proc/meminfo").read_text())
        groups = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return None
    found = [1024 * int(free)]
    for kind, path in (line.split(":", 2)[1:] for line in groups):
        if kind not in ("", "memory"):
            continue
        limit, used = ("limit_in_bytes", "usage_in_bytes") if kind else ("max", "current")
        top = _ROOT / "sys/fs/cgroup" / kind
        own = top / path.lstrip("/")
        for folder in [own, *(one for one in own.parents if top in (one, *one.parents))]:
            with suppress(OSError, ValueError):  # no limit, or out of a container's sight
                files = re.findall(r"inactive_file (\d+)", (folder / "memory.stat").read_text())
                most = int((folder / f"memory.{limit}").read_text())
                taken = int((folder / f"memory.{used}").read_text())
                found.append(most - taken + max(map(int, files), default=0))
    return min(found)
