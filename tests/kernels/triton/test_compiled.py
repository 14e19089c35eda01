"""The kernels compiled for Hopper, without a card: tensor cores, registers, no spills, no atomics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parents[2]
SHARED, REGISTERS = 227 * 1024, 65_536  # of a multiprocessor, for one block
KERNELS = [
    "encode_kernel",
    "select_kernel",
    "settle_kernel",
    "decode_kernel",
    *["piece_kernel", "decoder_kernel", "encoder_kernel"] * 2,
]


def compiled(*sizes: int) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), *sys.path])
    command = [sys.executable, str(TESTS / "compiled_kernels.py"), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("sizes", [(576, 131_072, 32, 8), (4096, 16_384, 50, 8)], ids=str)
def test_kernels_fit_a_hopper_and_use_its_tensor_cores(sizes: tuple[int, ...]) -> None:
    found = compiled(*sizes)
    assert [kernel["kernel"] for kernel in found] == KERNELS
    for kernel in found:
        # Two registers of `select` lie in memory, which is faster on an H200 than twice the warps.
        if kernel["kernel"] == "select_kernel":
            assert kernel["stack"] <= 8, kernel
        else:
            assert (kernel["stack"], kernel["LDL"], kernel["STL"]) == (0, 0, 0), f"spills: {kernel}"
        assert kernel["shared"] <= SHARED, kernel
        # Registers are given out in eights.
        assert -(-kernel["reg"] // 8) * 8 * 32 * kernel["warps"] <= REGISTERS, kernel
        assert (kernel["RED"], kernel["ATOM"], kernel["ATOMG"]) == (0, 0, 0), f"atomic: {kernel}"
    assert found[0]["HGMMA"] > 0
    assert found[0]["HMMA"] == 0
