"""A model of half precision in float32 for a while, for numbers that compare two passes of it.

An edit of an activation moves every later rounding, too. In bfloat16 the next-token distributions of
SmolLM2-135M then lie 0.0013 nats apart (KL) however small the edit is, a sixth of what a good dictionary of
one layer costs; in float32 an edit of 0.4 % of the activation gives the 7e-7 nats that it is worth.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asi_lens.base.errors import UnsupportedModelError
from asi_lens.base.memory import free_bytes, host_bytes
from asi_lens.base.products import exact_products
from asi_lens.inputs import structure

_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_PACKED = (torch.uint8, torch.int8, torch.int32)
_GIB = 2**30


def loss_dtype(dtype: str) -> str:
    """Return the dtype, by name, in which a model of `dtype` computes inside `in_float32`."""
    return "float32" if dtype in _HALF else dtype


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Context in which a model of half precision computes in float32; other models are left as they are.

    Its weights keep their values, which float32 holds exactly, and are put back afterwards, the same tensors
    as before. They take three times their memory meanwhile. Products are exact (`exact_products`).

    Raises UnsupportedModelError for weights that are quantised or on no device, since they compute in half
    precision all the same, and for a device with too little free memory.
    """
    halves = [(one, one.data) for one in _halves(model)]
    cfg: Any = getattr(model, "cfg", None)
    dtype = getattr(cfg, "dtype", None)
    rounds = dtype in _HALF.values()  # TransformerLens's own layer norms, which give this dtype
    try:
        with torch.inference_mode(False):
            for one, data in halves:
                one.data = data.float()
        if rounds:
            cfg.dtype = torch.float32
        with exact_products():
            yield
    finally:
        for one, data in halves:
            one.data = data
        if rounds:
            cfg.dtype = dtype


def fits_float32(model: nn.Module) -> bool:
    """Return whether `in_float32` takes a model, by its weights and by the memory that is free now."""
    try:
        _halves(model)
    except UnsupportedModelError:
        return False
    return True


def _halves(model: nn.Module) -> list[Tensor]:
    """Return a model's tensors of half precision. Raises as `in_float32` does."""
    tensors = list(_tensors(model))
    _require_plain(model, tensors)
    halves = [one for one in tensors if one.dtype in _HALF.values()]
    _require_room(halves)
    return halves


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter, buffer and tensor kept as an attribute of a model once."""
    seen: set[int] = set()
    for module in structure.all_modules(model):
        kept = (value for _, value in structure.attributes(module))
        for one in (*module._parameters.values(), *module._buffers.values(), *kept):
            if isinstance(one, Tensor) and id(one) not in seen:
                seen.add(id(one))
                yield one


def _require_plain(model: nn.Module, tensors: list[Tensor]) -> None:
    config = getattr(getattr(model, "original_model", None), "config", None)
    packed = [one for one in tensors if one.ndim > 1 and one.is_floating_point() and one.itemsize == 1]
    if getattr(config, "quantization_config", None):
        packed += [one for one in tensors if one.ndim > 1 and one.dtype in _PACKED]
    if packed or any(one.is_meta for one in tensors):
        why = f"quantised ({packed[0].dtype})" if packed else "not on a device (offloaded)"
        raise UnsupportedModelError(
            f"weights of the model are {why}, so it cannot compute in float32, and the rounding of half "
            "precision is as large as what a dictionary costs. Load it without quantisation (or call its "
            "`dequantize()`), or evaluate without losses of the language model"
        )


def _require_room(halves: list[Tensor]) -> None:
    needed: dict[torch.device, int] = {}
    for one in halves:
        needed[one.device] = needed.get(one.device, 0) + 4 * one.numel()
    for device, size in needed.items():
        free = free_bytes(device)
        free = host_bytes() if free is None else free
        if free is not None and size > free:
            raise UnsupportedModelError(
                "losses of the language model and copies of its attention are computed in float32, and its "
                f"weights need another {size / _GIB:.2f} GiB of {device}; {free / _GIB:.2f} are free. Move "
                "the model to a device with more, or evaluate without losses"
            )
