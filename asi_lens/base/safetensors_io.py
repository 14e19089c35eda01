"""Safetensors files written piece by piece, without a copy of what is written.

The format: the header's length (8 bytes, little-endian), a JSON header with dtype, shape and place of each
tensor, then their bytes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Dtypes that can be written, with the format's names for them."""
_PIECE_BYTES = 16 * 2**20


def header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """Everything before the tensors' bytes, which follow in this order, row-major and without gaps."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row-major, copied only if they do not lie so on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def pieces(tensor: Tensor) -> Iterable[Tensor]:
    """Its rows in views of about 16 MiB."""
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    row_bytes = max(1, rows[:1].numel() * rows.dtype.itemsize)
    return rows.split(max(1, _PIECE_BYTES // row_bytes))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; transposed and strided tensors are straightened a piece at a time."""
    with path.open("wb") as file:
        file.write(header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}))
        for tensor in tensors.values():
            for piece in pieces(tensor):
                file.write(raw_bytes(piece))
