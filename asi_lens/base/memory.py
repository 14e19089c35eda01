"""Free memory of a device."""

from __future__ import annotations

import torch


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that tensors on `device` may still take, None for a CPU.

    Memory that PyTorch holds but has no tensor in counts as free.
    """
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
