"""Compiles the kernels for Hopper, also without a card, and prints what they use: one JSON object a kernel.

    python tests/compiled_kernels.py D N K BATCH

The launch code itself runs, on empty CPU tensors. A stand-in for the driver says that the card is a Hopper,
and a launch stops after compiling; so types, alignment and specialization are those of a real launch.
"""

from __future__ import annotations

import glob
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.triton.decode import decode
from asi_lens.kernels.triton.encode import encode
from asi_lens.kernels.triton.picks import sort_picks
from asi_lens.kernels.triton.plan import Plan
from asi_lens.kernels.triton.update import Adam, Moments, update

INSTRUCTIONS = ("HGMMA", "HMMA", "LDL", "STL", "SHFL", "RED", "ATOM", "ATOMG")


class Hopper:
    """A driver for launches that only compile."""

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def used(kernel: Any) -> dict[str, int]:
    """Registers a thread, stack, shared memory, and counts of instructions."""
    [tool] = glob.glob(os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump*"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        resources, code = (
            subprocess.run([tool, flag, str(path)], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    out = {"warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
    out |= {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", resources)}
    return out | {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}


def main(d: int, n: int, k: int, batch: int) -> None:
    driver.set_active(Hopper())
    launch = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps({"kernel": self.__name__, **used(kernel)}), flush=True)
        return kernel

    jit.JITFunction.run = compile_only
    # Never written: large weights take no memory here.
    x, w, low = torch.randn(batch, d), torch.empty(n, d), torch.empty(n, d, dtype=torch.bfloat16)
    bias = torch.empty(n)
    encode(x.bfloat16(), low, bias, Plan.of(d, n, k))
    indices = torch.randint(n, (batch, k), dtype=torch.int32)
    code = SparseCode(indices, torch.rand(batch, k))
    missed = decode(code, w, x, 0.5)
    rows, numbers = Moments(w, w, w), Moments(bias, bias, bias)
    # Both dense and sparse, with and without decay that was missed.
    for dense, updated in ((True, None), (False, torch.zeros(n, dtype=torch.int64))):
        picks = sort_picks(code, n, dense=dense)
        adam = Adam(2, 1e-3, 0.9, 0.999, 1e-8)
        update(picks, missed.residual, x, rows, rows, numbers, low, adam, updated)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
