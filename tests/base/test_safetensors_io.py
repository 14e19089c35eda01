"""Safetensors files: written piece by piece or whole, read with errors that name the file."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asi_lens.base import safetensors_io
from asi_lens.base.errors import CacheError, DataError
from asi_lens.base.safetensors_io import DTYPES, opened, read_tensors, save_tensors, write_tensors


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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(6).view(2, 3).T, "b": torch.zeros(2)}, {"format": "1"})
    return path


def test_what_was_saved_is_read(file: Path) -> None:
    tensors, metadata = read_tensors(file, DataError)
    assert sorted(tensors) == ["a", "b"]
    assert torch.equal(tensors["a"], torch.arange(6).view(2, 3).T)
    assert metadata == {"format": "1"}
    tensors, _ = read_tensors(file, DataError, names=["b"], about={"format": "1"})
    assert list(tensors) == ["b"]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "no tensors", "folder"])
def test_a_file_that_cannot_be_read_is_named_with_its_repair(file: Path, damage: str) -> None:
    data = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "missing":
        file.write_bytes({"empty": b"", "cut off": data[:-1], "no tensors": b"x" * 100}[damage])
    with pytest.raises(CacheError, match=r"t\.safetensors cannot be read \(.+\); delete it$"):
        read_tensors(file, CacheError, "delete it")
    with pytest.raises(DataError, match=r"t\.safetensors cannot be read \(.+\)$"):
        read_tensors(file, DataError)


def test_a_tensor_that_is_not_there_and_a_header_that_is_no_json_are_told(file: Path) -> None:
    with pytest.raises(CacheError, match=r"t\.safetensors cannot be read \(.*\bc\b.*\)"):
        read_tensors(file, CacheError, names=["a", "c"])
    with pytest.raises(DataError, match=r"t\.safetensors cannot be read"), opened(file, DataError):
        json.loads("{")


def test_another_version_is_told(file: Path) -> None:
    with pytest.raises(
        CacheError, match=r"t\.safetensors is from another version .*its format is '1', not '2'.*; delete"
    ):
        read_tensors(file, CacheError, "delete it", about={"format": "2"})


def test_errors_of_whoever_uses_the_open_file_are_left_alone(file: Path) -> None:
    with pytest.raises(OSError, match=r"^another file$"), opened(file, CacheError):
        raise OSError("another file")


def test_saved_files_are_aligned_as_those_of_the_safetensors_package(tmp_path: Path) -> None:
    tensors = {
        "b.wide": torch.arange(6).double().view(2, 3),
        "a": torch.arange(12.0).view(3, 4).T,
        "c": torch.ones(3, dtype=torch.bool),
        "half": torch.ones(5, dtype=torch.bfloat16),
        "n": torch.tensor(7),
        "empty": torch.zeros(0, 2),
    }
    save_tensors(tmp_path / "ours.safetensors", tensors, {"about": '{"step": 3}'})
    found = load_file(tmp_path / "ours.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    # Sorted so, no tensor begins between two of its numbers.
    with (tmp_path / "ours.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header.pop("__metadata__") == {"about": '{"step": 3}'}
    assert all(header[name]["data_offsets"][0] % tensors[name].itemsize == 0 for name in tensors)


def test_a_tensor_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, whole = [], safetensors_io.raw_bytes
    monkeypatch.setattr(safetensors_io, "_PIECE_BYTES", 64)

    def counted(tensor: torch.Tensor) -> memoryview:
        sizes.append(tensor.numel() * tensor.itemsize)
        return whole(tensor)

    monkeypatch.setattr(safetensors_io, "raw_bytes", counted)
    save_tensors(tmp_path / "t.safetensors", {"a": torch.arange(100.0).view(25, 4)}, {})
    assert max(sizes) == 64
    assert torch.equal(load_file(tmp_path / "t.safetensors")["a"], torch.arange(100.0).view(25, 4))


def test_a_full_disk_keeps_what_was_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    before = file.read_bytes()
    monkeypatch.setattr(safetensors_io, "raw_bytes", full)
    with pytest.raises(OSError, match=r"cannot write .*t\.safetensors: .*No space left"):
        save_tensors(file, {"a": torch.ones(1)}, {})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]
