"""A Lorsa on disk and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_lorsas import started

from asi_lens.base.errors import DataError, OptionError
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.lorsa import Lorsa

pytestmark = pytest.mark.model_facing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_comes_back_as_it_was(tiny_llama: Any, pairs: SequencePairs, tmp_path: Path, dtype: Any) -> None:
    lorsa = started(tiny_llama, pairs, dtype=dtype)
    path = tmp_path / "deep" / "lorsa.safetensors"
    path.parent.mkdir()
    lorsa.save(path)
    found = Lorsa.load(path)
    assert found.config == lorsa.config
    assert found.initialization == lorsa.initialization
    assert torch.equal(found(pairs.inputs), lorsa(pairs.inputs))


def test_files_that_are_something_else_are_refused(
    tiny_llama: Any, pairs: SequencePairs, tmp_path: Path
) -> None:
    path = tmp_path / "lorsa.safetensors"
    with pytest.raises(FileNotFoundError, match="lorsa"):
        Lorsa.load(path)
    with pytest.raises(OptionError, match=r"must be a `\.safetensors` file"):
        Lorsa.load(tmp_path / "lorsa.pt")
    started(tiny_llama, pairs).save(path)
    tensors = load_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        Lorsa.load(path)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(DataError, match="has format 9"):
        Lorsa.load(path)
    save_file(tensors, path)
    with pytest.raises(DataError, match="is not a file of a Lorsa"):
        Lorsa.load(path)
    path.write_bytes(whole.replace(b'"W_O"', b'"W_X"'))
    with pytest.raises(DataError, match="other tensors"):
        Lorsa.load(path)
