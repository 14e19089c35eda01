"""Weights and wiring of an ONNX file, without the package `onnx`.

An ONNX file is one protobuf message. Protobuf's wire format is a list of (field number, wire type, value);
the field numbers used here are those of `onnx.proto` (unchanged since IR version 3). Nothing in a file is
executed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asi_lens.base.errors import DataError

_DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 10: np.float16, 11: np.float64}
"""TensorProto.DataType of the tensors that are read."""


@dataclass(frozen=True)
class Node:
    """One operation of the graph."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OnnxFile:
    """A file's stored tensors by name, and its operations in the order of execution."""

    tensors: dict[str, np.ndarray]
    nodes: tuple[Node, ...]


def read_onnx(path: Path) -> OnnxFile:
    """Return the initializers and nodes of an ONNX file. Tensors are copies in the file's dtype and shape.

    Raises DataError for a file that is not ONNX, is cut off, or keeps its tensors in other files or in a
    dtype other than float16, float32, float64, int32 and int64.
    """
    try:
        return _read_graph(memoryview(path.read_bytes()), path)
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a whole ONNX file: {error}") from error


def _read_graph(data: memoryview, path: Path) -> OnnxFile:
    tensors: dict[str, np.ndarray] = {}
    nodes: list[Node] = []
    graphs = [value for number, value in _fields(data) if number == 7 and isinstance(value, memoryview)]
    if len(graphs) != 1:
        raise DataError(f"{path} is not an ONNX file: it has {len(graphs)} graphs")
    for number, value in _fields(graphs[0]):
        if number == 1 and isinstance(value, memoryview):
            nodes.append(_node(value))
        elif number == 5 and isinstance(value, memoryview):
            name, tensor = _tensor(value, path)
            tensors[name] = tensor
    return OnnxFile(tensors, tuple(nodes))


def _node(data: memoryview) -> Node:
    parts: dict[int, list[str]] = {1: [], 2: [], 4: []}
    for number, value in _fields(data):
        if number in parts and isinstance(value, memoryview):
            parts[number].append(bytes(value).decode())
    return Node("".join(parts[4]), tuple(parts[1]), tuple(parts[2]))


def _tensor(data: memoryview, path: Path) -> tuple[str, np.ndarray]:
    shape: list[int] = []
    name, kind, raw = "", 0, b""
    for number, value in _fields(data):
        if number == 1:
            shape += [value] if isinstance(value, int) else _varints(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, memoryview):
            name = bytes(value).decode()
        elif number in (4, 5, 7, 9, 10) and isinstance(value, memoryview):
            # float, int32, int64 and double data may stand in typed fields; exporters write raw_data (9)
            if number in (5, 7):
                raise DataError(f"{path}: the tensor {name!r} is not stored as raw data")
            raw = bytes(value)
        elif number == 13:
            raise DataError(f"{path}: tensors in other files are not read")
    if kind not in _DTYPES:
        raise DataError(f"{path}: the tensor {name!r} has the ONNX data type {kind}, which is not read")
    return name, np.frombuffer(raw, _DTYPES[kind]).reshape(shape)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of a message: an int for a varint, else a view of the bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        wire = tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if place + size > len(data):
            raise ValueError(f"it ends inside a field of {size:,} bytes")
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {place}")


def _varints(data: memoryview) -> list[int]:
    values: list[int] = []
    place = 0
    while place < len(data):
        value, place = _varint(data, place)
        values.append(value)
    return values
