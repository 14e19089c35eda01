"""Read safetensors files, with errors that name the file, and write them atomically or piece by piece.

The format: the header's length (8 bytes, little-endian), a JSON header with dtype, shape and offsets of each
tensor, then the tensors' bytes (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asi_lens.base.errors import AsiLensError
from asi_lens.base.files import write_whole

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtypes that can be written, and their names in the format."""
_PIECE_BYTES = 16 * 2**20


@contextmanager
def opened(path: Path, error: type[AsiLensError], repair: str = "") -> Iterator[Any]:
    """Yield the open file (`safe_open`). Its tensors are mapped from disk and read only when they are used.

    Raises `error` with the file's name, the reason and `repair` (how the user repairs the file) if the file
    is missing, damaged or truncated, if it lacks a requested tensor, or if its header is not the JSON that
    the caller expects.
    """

    def told(reason: Exception) -> AsiLensError:
        return error(f"{path} cannot be read ({reason})" + (f"; {repair}" if repair else ""))

    try:
        file = safe_open(path, "pt")
    except (SafetensorError, OSError) as reason:
        raise told(reason) from reason
    try:
        with file:
            yield file
    except (SafetensorError, json.JSONDecodeError) as reason:
        raise told(reason) from reason


def read_tensors(
    path: Path,
    error: type[AsiLensError],
    repair: str = "",
    names: Sequence[str] = (),
    about: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file (all, or the given `names`), mapped from disk, and the file's metadata.

    Raises `error` as `opened` does, and also if an entry of `about` is not in the metadata.
    """
    with opened(path, error, repair) as file:
        found = dict(file.metadata() or {})
        for key, expected in (about or {}).items():
            if found.get(key) != expected:
                there = f"its {key} is {found.get(key)!r}, not {expected!r}"
                raise error(f"{path} is from another version or holds something else ({there}); {repair}")
        return {name: file.get_tensor(name) for name in names or file.keys()}, found


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file atomically, a piece of a tensor at a time: tensors on a GPU are never all on the CPU.

    Raises OSError naming the file if it cannot be written.
    """
    # Wide numbers come first, as in files of the safetensors package, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    with write_whole(path) as temporary:
        write_tensors(temporary, {name: tensors[name] for name in order}, metadata)


def header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return all bytes before the tensors' bytes, which follow in this order, row-major and without gaps."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, row-major; a contiguous CPU tensor is not copied."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def pieces(tensor: Tensor) -> Iterable[Tensor]:
    """Return a tensor's rows as views of about 16 MiB each."""
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    row_bytes = max(1, rows[:1].numel() * rows.dtype.itemsize)
    return rows.split(max(1, _PIECE_BYTES // row_bytes))


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; transposed and strided tensors are made contiguous one piece at a time."""
    with path.open("wb") as file:
        table = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        file.write(header(table, metadata))
        for tensor in tensors.values():
            for piece in pieces(tensor):
                file.write(raw_bytes(piece))
