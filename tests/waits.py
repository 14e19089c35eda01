"""Counts where a host would wait for an accelerator, on a CPU.

`accelerated` makes the package treat the CPU as an accelerator. `Waits` counts the operators whose result has
a size that depends on data, reads of numbers, and copies of Python numbers to the device.
"""

from __future__ import annotations

import collections
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asi_lens.kernels import devices

_BY_DATA = (
    *("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_consecutive"),
    *("unique_dim", "equal", "is_nonzero", "argwhere"),
)
# With a tensor of repeats, the length of the result depends on data.
_OVERLOADS = ("repeat_interleave.Tensor",)


def accelerated(monkeypatch: pytest.MonkeyPatch, scratch_bytes: int = 2**20) -> None:
    """Let code run as on an accelerator that has this much scratch memory."""
    monkeypatch.setattr(devices, "is_host", lambda device: False)
    monkeypatch.setattr(devices, "scratch_bytes", lambda device: scratch_bytes)


class Waits(TorchDispatchMode):
    """Context that counts waits by name in `found`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()
        to_list, make = Tensor.tolist, torch.tensor

        def tolist(tensor: Tensor) -> Any:
            self.found["tolist"] += 1
            return to_list(tensor)

        def tensor(*args: Any, **options: Any) -> Tensor:
            caller = sys._getframe(1).f_globals["__name__"]
            self.found["tensor"] += caller.startswith("asi_lens.")  # checks of types make tensors, too
            return make(*args, **options)

        monkeypatch.setattr(Tensor, "tolist", tolist)
        monkeypatch.setattr(torch, "tensor", tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and call an operator."""
        name = func.overloadpacket.__name__
        if name in _BY_DATA or str(func).removeprefix("aten.") in _OVERLOADS:
            self.found[name] += 1
        elif name in ("index", "index_put", "index_put_", "_unsafe_index"):
            flags = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            self.found["index by booleans"] += bool(flags)
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """Number of waits."""
        return sum(self.found.values())
