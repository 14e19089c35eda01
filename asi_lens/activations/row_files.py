"""Activations in files of other tools: `.npy`, `.safetensors`, folders of them, data sets cached by SAELens.

Rows are mapped from disk, not loaded. Tensors of three dimensions [sequence position d] are read as rows of
all positions; nothing is left out of them, so a first position that is an attention sink stays in.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import DataError
from asi_lens.base.safetensors_io import opened
from asi_lens.base.sites import ALL as SITES

_DATASET = "dataset_info.json"


def open_rows(path: Path) -> tuple[list[Float[Tensor, "_ d"]], dict[str, Any]]:
    """Return the rows in a file or folder, in order, and what the files say of their origin.

    The files of a folder are read in the order of their names, numbers in names by value.

    Raises FileNotFoundError for a path that does not exist, DataError, naming the file, for a file that is
    not of these formats or damaged, for files with several tensors of rows or none, and for tensors of
    different width, dtype or number of positions.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir() and (path / _DATASET).is_file():
        name, tensors = _dataset(path)
        named = [(path, tensor) for tensor in tensors]
        origin = {"file": path.name, **_site(name)}
    else:
        named = [(file, _READERS[file.suffix](file)) for file in _files(path)]
        origin = {"file": path.name}
    contexts = {tensor.shape[1] if tensor.ndim == 3 else None for _, tensor in named}
    kinds = {(tensor.shape[-1], tensor.dtype) for _, tensor in named}
    if len(kinds) > 1 or len(contexts) > 1:
        told = "; ".join(f"{file.name}: {_told(tensor)}" for file, tensor in named[:4])
        raise DataError(f"the files in {path} do not belong together ({told})")
    context = contexts.pop()
    if context is not None:
        origin |= {"context": context, "drop_first": 0}
    return [tensor.reshape(-1, tensor.shape[-1]) for _, tensor in named], origin


def _files(path: Path) -> list[Path]:
    """Return the files of rows in a folder, or the file itself. Raises DataError if there are none."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in _READERS]
    known = " or ".join(_READERS)
    if not files or files[0].suffix not in _READERS:
        what = "is not a file" if path.is_file() else "holds neither an activation store nor files"
        raise DataError(f"{path} {what} of rows; rows are in {known}, or in a data set cached by SAELens")
    if len({file.suffix for file in files}) > 1:
        raise DataError(f"{path} holds files of several formats ({known}); keep those of one")
    return sorted(
        files, key=lambda file: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", file.name)]
    )


def _read_npy(path: Path) -> Tensor:
    """Return the array in a `.npy` file, mapped copy-on-write (torch warns about read-only memory)."""
    try:
        return _floating(path, torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)))
    except (TypeError, ValueError, EOFError) as error:
        raise DataError(f"{path} is not a `.npy` file of plain numbers: {error}") from error


def _read_safetensors(path: Path) -> Tensor:
    with opened(path, DataError) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        rows = [name for name, shape in shapes.items() if len(shape) in (2, 3)]
        if len(rows) != 1:
            told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "nothing"
            raise DataError(f"{path} must hold one tensor of rows [n d] or [sequence position d], not {told}")
        return _floating(path, file.get_tensor(rows[0]))


def _dataset(path: Path) -> tuple[str, list[Tensor]]:
    """Return the name of the column of rows and its tensors [sequence position d], mapped from disk."""
    import datasets
    import pyarrow as pa

    try:
        found = datasets.load_from_disk(str(path))
        features = found.features
    except (AttributeError, LookupError, OSError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a data set that `datasets` can open: {error}") from error
    names = [name for name, feature in features.items() if isinstance(feature, datasets.Array2D)]
    if len(names) != 1:
        raise DataError(
            f"{path} must have one column of arrays [position d], as from SAELens, not {list(features)}"
        )
    if found._indices is not None:
        raise DataError(f"{path} is a shuffled view of a data set; write it with `flatten_indices()` first")
    context, d = features[names[0]].shape
    tensors = []
    for chunk in found.data.column(names[0]).chunks:
        flat = chunk.storage.flatten().flatten().to_numpy(zero_copy_only=True)
        tensors.append(_floating(path, _from_read_only(flat).view(-1, context, d)))
    if not sum(map(len, tensors)):
        raise DataError(f"{path} holds no rows")
    return names[0], tensors


def _from_read_only(values: np.ndarray) -> Tensor:
    """Return a tensor over read-only memory without torch's warning. Nothing writes to a store's rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(values)


def _floating(path: Path, tensor: Tensor) -> Tensor:
    """Return the tensor. Raises DataError unless it is rows of floating point numbers."""
    if tensor.ndim not in (2, 3) or 0 in tensor.shape or not tensor.is_floating_point():
        raise DataError(f"{path} holds {_told(tensor)}, not rows [n d] of floating point numbers")
    return tensor


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype)[6:]} of shape {tuple(tensor.shape)}"


def _site(hook_name: str) -> dict[str, Any]:
    """Return hook name, layer and site of a TransformerLens hook, as a store states them."""
    layer = re.match(r"blocks\.(\d+)\.", hook_name)
    if layer is None:
        return {"hook_name": hook_name}
    number = int(layer[1])
    sites = [name for name, site in SITES.items() if site.template.format(number) == hook_name]
    return {"hook_name": hook_name, "site": sites[0] if sites else hook_name, "layer": number}


_READERS: dict[str, Callable[[Path], Tensor]] = {".npy": _read_npy, ".safetensors": _read_safetensors}
