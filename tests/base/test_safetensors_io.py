"""Safetensors files written piece by piece are what the safetensors library reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asi_lens.base import safetensors_io
from asi_lens.base.safetensors_io import DTYPES, write_tensors


@pytest.mark.parametrize("piece_bytes", [1, 100, 2**20])
def test_tensors_of_any_dtype_and_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(safetensors_io, "_PIECE_BYTES", piece_bytes)
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 10
    tensors = {str(dtype): values.to(dtype) for dtype in DTYPES}
    tensors |= {
        "transposed": values.T,
        "strided": values[::2, 1:3],
        "scalar": torch.tensor(3.5),
        "vector": values[0],
        "cube": torch.arange(24).view(2, 3, 4),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(values),
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    found = load_file(tmp_path / "t.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_the_bytes_are_those_of_the_tensor() -> None:
    tensor = torch.tensor([[1, 2], [3, 4]])
    assert bytes(safetensors_io.raw_bytes(tensor.T)) == torch.tensor([1, 3, 2, 4]).numpy().tobytes()
