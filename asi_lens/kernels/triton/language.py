"""Triton, if it is installed. The modules of the kernels also import without it; `card` then says so.

Device code is marked `@jit` and `@no_type_check`: its arguments are pointers and blocks, which neither mypy
nor the tests' type checker knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without an NVIDIA card needs no Triton
    triton = tl = None

__all__ = ["interpreted", "jit", "next_power_of_2", "tl", "triton"]


def jit(*, do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a kernel on its first launch; without Triton it changes nothing.

    `do_not_specialize` names integers that change often: a kernel is compiled once for all their values.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=list(do_not_specialize))


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1 at import)."""
    return triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n`, for n of at least 1."""
    return 1 << (n - 1).bit_length()
