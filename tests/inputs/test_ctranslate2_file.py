"""ctranslate2_file.py: variables and aliases of a small file that is written here, and broken files."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from asi_lens.base.errors import DataError
from asi_lens.inputs.ctranslate2_file import read_ctranslate2


def text(name: str) -> bytes:
    return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"


def variable(name: str, values: np.ndarray, kind: int) -> bytes:
    shape = struct.pack(f"<B{values.ndim}I", values.ndim, *values.shape)
    return text(name) + shape + struct.pack("<BI", kind, values.nbytes) + values.tobytes()


GIVEN = {
    "a/weight": (np.arange(6, dtype=np.float16).reshape(2, 3), 4),
    "a/bias": (np.array([1.5, -2.0], np.float32), 0),
    "heads": (np.array(8, np.int16), 2),
}


def written(version: int = 6, spec: str = "TestSpec", kind: int | None = None) -> bytes:
    parts = [struct.pack("<I", version), text(spec), struct.pack("<II", 3, len(GIVEN))]
    parts += [variable(name, values, own if kind is None else kind) for name, (values, own) in GIVEN.items()]
    return b"".join([*parts, struct.pack("<I", 1), text("tied"), text("a/weight")])


def test_variables_and_aliases(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(written())
    found = read_ctranslate2(path, "TestSpec")
    assert list(found) == [*GIVEN, "tied"]
    for name, (values, _) in GIVEN.items():
        np.testing.assert_array_equal(found[name], values, strict=True)
    assert found["tied"] is found["a/weight"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (written(version=5), "begins with 5"),
        (written(spec="OtherSpec"), "a model of 'OtherSpec', not of 'TestSpec'"),
        (written() + b"more", "4 bytes after its end"),
        (written(kind=5), "damaged"),  # bfloat16
        (b"", "damaged or cut off"),
        *((written()[:cut], "damaged or cut off") for cut in (3, 10, 30, 60, len(written()) - 1)),
    ],
)
def test_other_and_broken_files(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(data)
    with pytest.raises(DataError, match=told):
        read_ctranslate2(path, "TestSpec")
