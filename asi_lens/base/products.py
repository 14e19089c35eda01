"""Products of matrices without the short cuts of the hardware."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """Context in which tensors are computed in their own dtype, also inside `torch.autocast`."""
    with ExitStack() as off:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                off.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Context for statistics: float32 products run in float32, whatever the user has switched on.

    TF32 and bfloat16 products (`torch.set_float32_matmul_precision`), reductions of bfloat16 products in
    bfloat16, and autocast are off inside, and as before afterwards.
    """
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    # PyTorch before 2.9 has one switch for all backends.
    mkldnn: Any = torch.backends.mkldnn
    places: list[Any] = [matmul, mkldnn.matmul] if hasattr(matmul, "fp32_precision") else []
    before = [place.fp32_precision for place in places]
    legacy = None if places else torch.get_float32_matmul_precision()
    try:
        matmul.allow_bf16_reduced_precision_reduction = False
        for place in places:
            place.fp32_precision = "ieee"
        if legacy is not None:
            torch.set_float32_matmul_precision("highest")
        with without_autocast():
            yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = reduced
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
