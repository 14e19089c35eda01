"""onnx_file.py: tensors and wiring of small files that are written here byte by byte, and broken files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asi_lens.base.errors import DataError
from asi_lens.inputs.onnx_file import Node, read_onnx


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(name: str, values: np.ndarray, kind: int, packed: bool) -> bytes:
    if packed:
        shape = field(1, b"".join(varint(n) for n in values.shape))
    else:
        shape = b"".join(field(1, n) for n in values.shape)
    return shape + field(2, kind) + field(8, name.encode()) + field(9, values.tobytes())


def model(*parts: bytes) -> bytes:
    return field(1, 8) + field(2, b"a test") + field(7, b"".join(parts)) + field(8, field(2, 17))


def test_tensors_and_nodes(tmp_path: Path) -> None:
    given = {
        "w": (np.arange(600, dtype=np.float32).reshape(3, 200), 1),
        "half": (np.array([0.5, -2.0], np.float16), 10),
        "ids": (np.array([[-1], [2**40]], np.int64), 7),
        "none": (np.zeros((0, 4), np.float64), 11),
        "scalar": (np.array(7, np.int32), 6),
    }
    node = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(3, b"a name") + field(4, b"MatMul")
    parts = [
        field(5, tensor(name, values, kind, packed))
        for packed, (name, (values, kind)) in enumerate(given.items())
    ]
    path = tmp_path / "m.onnx"
    path.write_bytes(model(field(1, node), *parts))
    file = read_onnx(path)
    assert file.nodes == (Node("MatMul", ("x", "w"), ("y",)),)
    assert list(file.tensors) == list(given)
    for name, (values, _) in given.items():
        np.testing.assert_array_equal(file.tensors[name], values, strict=True)


@pytest.mark.parametrize(
    ("part", "told"),
    [
        (field(1, 2) + field(2, 16) + field(8, b"w") + field(9, b"1234"), "data type 16"),
        (field(1, 1) + field(2, 7) + field(8, b"w") + field(7, b"\1"), "not stored as raw data"),
        (field(1, 1) + field(2, 1) + field(8, b"w") + field(13, b"elsewhere"), "other files"),
        (field(1, 3) + field(2, 1) + field(8, b"w") + field(9, b"1234"), "not a whole ONNX file"),
    ],
)
def test_tensors_that_cannot_be_read(tmp_path: Path, part: bytes, told: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(model(field(5, part)))
    with pytest.raises(DataError, match=told):
        read_onnx(path)


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    whole = model(field(5, tensor("w", np.ones(50, np.float32), 1, False)))
    path = tmp_path / "m.onnx"
    for data in (whole[:100], b"", b"GGUF" * 20, b"\xff" * 40, field(1, 8)):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"m\.onnx"):
            read_onnx(path)
