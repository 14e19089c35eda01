"""Which precision of float32 products holds inside a method while the user has chosen a faster one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def inside(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, run: Callable[[], Any]) -> set[str]:
    """Return the precisions that held in the calls of `owner.method` by `run`, under "high"."""
    found, original, before = set(), getattr(owner, method), torch.get_float32_matmul_precision()

    def spy(*arguments: Any, **options: Any) -> Any:
        found.add(torch.backends.cuda.matmul.fp32_precision)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, method, spy)
    torch.set_float32_matmul_precision("high")
    try:
        run()
    finally:
        torch.set_float32_matmul_precision(before)
    return found
