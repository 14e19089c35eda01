"""Where the kernels' tests run: on a card, or, with TRITON_INTERPRET=1, in Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from asi_lens.kernels.triton import card, language
from asi_lens.kernels.triton.plan import Plan

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def _mend_interpreter() -> None:
    """Make `range` of a loaded number work (with NumPy 2.4, int() of an array of one number fails), and calls
    among kernels fast: each would patch the language again, which takes half of the time."""
    from triton.runtime import interpreter

    patch, patch_all, done = interpreter._patch_lang_tensor, interpreter._patch_lang, set()

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in done:
            done.add(id(self.fn.__globals__))
            patch_all(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patched
    interpreter.InterpretedFunction.__call__ = call


def need_kernels() -> None:
    """Skip the calling module where the kernels cannot run."""
    pytest.importorskip("triton")
    if not language.interpreted() and not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)
    try:
        card.require_card(DEVICE)
    except card.UnsupportedError as error:
        pytest.skip(str(error), allow_module_level=True)
    if language.interpreted():
        _mend_interpreter()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def small_plan(d: int, n: int, k: int, **changes: int) -> Plan:
    """A plan with blocks as small as the interpreter likes them; on a card, with the real ones."""
    small = {"rows": 16, "features": 64, "depth": 32, "group": 8, "settled": 8} | changes
    if DEVICE.type == "cuda":
        small |= {"rows": 128, "features": max(128, small["features"])}
    return Plan(d, n, k, **small)
