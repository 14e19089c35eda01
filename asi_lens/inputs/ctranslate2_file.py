"""Weights of a CTranslate2 `model.bin`, without the package `ctranslate2`.

The format is that of `ctranslate2.specs.model_spec` (binary version 6): header, variables (name, shape,
dtype, bytes), then aliases. Numbers are little-endian. Nothing in a file is executed.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from asi_lens.base.errors import DataError

_VERSION = 6
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def read_ctranslate2(path: Path, spec: str) -> dict[str, np.ndarray]:
    """Return the variables of a CTranslate2 file by name, aliases included, in the file's dtypes and shapes.

    Args:
        spec: name of the model's specification, such as "WhisperSpec".

    Raises DataError for a file that is not CTranslate2's, is of another version or specification, is cut
    off, has bytes left over, or holds a dtype that is not read (bfloat16).
    """
    data = path.read_bytes()
    reader = _Reader(data)
    try:
        version = reader.number("I")
        if version != _VERSION:
            raise DataError(
                f"{path} is not a CTranslate2 file of version {_VERSION} (it begins with {version})"
            )
        found = reader.text()
        if found != spec:
            raise DataError(f"{path} is a model of {found!r}, not of {spec!r}")
        reader.number("I")  # revision of the specification
        variables = dict(reader.variable() for _ in range(reader.number("I")))
        for _ in range(reader.number("I")):
            alias, name = reader.text(), reader.text()
            variables[alias] = variables[name]
    except (struct.error, KeyError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged or cut off at byte {reader.place:,}: {error}") from error
    if reader.place != len(data):
        raise DataError(f"{path} has {len(data) - reader.place:,} bytes after its end")
    return variables


class _Reader:
    def __init__(self, data: bytes):
        self.data = data
        self.place = 0

    def number(self, kind: str) -> int:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return int(value)

    def text(self) -> str:
        size = self.number("H")
        raw = self.data[self.place : self.place + size]
        if len(raw) != size or not raw.endswith(b"\0"):
            raise ValueError("a name does not end")
        self.place += size
        return raw[:-1].decode()

    def variable(self) -> tuple[str, np.ndarray]:
        name = self.text()
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype = np.dtype(_DTYPES[self.number("B")])
        size = self.number("I")
        values = np.frombuffer(self.data, dtype, size // dtype.itemsize, self.place).reshape(shape)
        self.place += size
        return name, values
