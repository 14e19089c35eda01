"""Differences between a CPU and an accelerator: waits of the host, and sizes of scratch memory.

On an accelerator the host only queues work. It must wait wherever it needs a number or a size that depends on
data: `item`, `nonzero`, an index by booleans, `bincount`, a copy of a Python number. While it waits, the
queue runs empty. So code for accelerators gets all numbers of a step by few calls of `read`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of scratch memory on a CPU, and on an accelerator of unknown size.
_SCRATCH_BYTES = 160 * 2**20
# Share of a GPU's memory for scratch arrays: 1.25 GiB of 80.
_SCRATCH_SHARE = 64


def is_host(device: torch.device) -> bool:
    """Return whether the host computes there itself, so that reading a number costs no wait."""
    return device.type == "cpu"


def card(device: torch.device) -> str:
    """Return the type of a device and, for a GPU, the name of its card."""
    if device.type != "cuda":
        return device.type
    return f"{device.type} ({torch.cuda.get_device_name(device)})"


def read(numbers: Tensor) -> list[float] | list[int]:
    """Return the numbers of a small tensor [n] as Python numbers, with one wait for the device."""
    return numbers.tolist()


def scratch_bytes(device: torch.device) -> int:
    """Return the number of bytes that scratch arrays of a product should have on the device."""
    if device.type != "cuda":
        return _SCRATCH_BYTES
    return max(_SCRATCH_BYTES, torch.cuda.get_device_properties(device).total_memory // _SCRATCH_SHARE)
