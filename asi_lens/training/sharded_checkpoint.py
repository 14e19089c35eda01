"""Checkpoints of a run over several ranks, by torch.distributed.checkpoint: every rank writes its own rows.

    checkpoint-000001000000/   named by tokens; renamed to this when complete, then older ones are deleted
      shard-*.safetensors      one per rank, with the place of its rows in the header
      about.json               the run, as in the header of `checkpoint`'s single file, and numbers of rows

A run continues from either kind on any mesh: rows are divided anew when shards are read. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from asi_lens.base import safetensors_io
from asi_lens.base.errors import CacheError
from asi_lens.base.files import read_json, write_text
from asi_lens.base.ranks import RankError
from asi_lens.training.checkpoint import (
    CHECKPOINT_FILE,
    FORMAT,
    read_checkpoint,
    require_format,
    write_checkpoint,
)
from asi_lens.training.mesh import Mesh

ABOUT = "about.json"
_WEIGHTS = "sae."
# Rows copied at a time.
_ROWS = 4096
_FOLDER, _UNFINISHED = "checkpoint-", ".checkpoint.unfinished"
# Tensors of `Trainer.state` with one row per feature.
_BY_FEATURE = (
    *("sae.encoder", "sae.b_enc", "sae.W_dec", "ledger.last_fired", "ledger.counts", "optimizer.updated"),
    *(f"optimizer.{name}.{moment}" for name in ("W_enc", "b_enc", "W_dec") for moment in "mv"),
)


def write(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], mesh: Mesh) -> None:
    """Replace the folder's checkpoint, as `checkpoint.write_checkpoint` does.

    Raises OSError or RankError if it cannot be written; the previous checkpoint then stays.
    """
    if mesh.config.size == 1:
        write_checkpoint(folder, tensors, about)
        _remove(_folders(folder))
        return
    import torch.distributed.checkpoint as dcp

    unfinished = folder / _UNFINISHED
    final = folder / f"{_FOLDER}{about['tokens']:015d}"

    def begin() -> None:
        if mesh.leads:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)

    def finish() -> None:
        if not mesh.leads:
            return
        rows = {name: tensor.shape[0] for name, tensor in state.items()}
        scalars = [name for name, tensor in tensors.items() if tensor.ndim == 0]
        text = json.dumps({"format": FORMAT, **about, "rows": rows, "scalars": scalars}, allow_nan=False)
        write_text(unfinished / ABOUT, text)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _sync(folder)
        _remove([folder / CHECKPOINT_FILE, *(path for path in _folders(folder) if path != final)])

    mesh.ranks.together("the folder of a checkpoint", begin)
    # The format cannot name a place in a tensor without dimensions, so scalars get one dimension.
    state = {
        name: mesh.shared_out(tensor) if name in _BY_FEATURE else tensor.reshape(tensor.shape or 1)
        for name, tensor in tensors.items()
        if tensor.numel()
    }
    with _naming("writing a checkpoint; the last one stays", mesh):
        writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        dcp.save(state, storage_writer=writer)
    mesh.ranks.together("writing a checkpoint", finish)


@contextmanager
def _naming(what: str, mesh: Mesh) -> Iterator[None]:
    """Context that turns errors of torch.distributed.checkpoint into RankErrors naming the failed ranks."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with mesh.ranks.talking():
            yield
    except CheckpointException as error:
        said = [f"rank {rank}: {type(one[0]).__name__}: {one[0]}" for rank, one in error.failures.items()]
        raise RankError(f"{what}: failed on {'; '.join(said)}") from error


@contextmanager
def read(folder: Path, mesh: Mesh) -> Iterator[tuple[dict[str, Any], Callable[[str], Tensor]] | None]:
    """Yield the folder's newest checkpoint as (about, a function that reads one tensor), or None.

    From a tensor with one row per feature the function reads this rank's rows. Raises CacheError as
    `checkpoint.read_checkpoint` does.
    """
    with read_checkpoint(folder) as single:
        sharded = [(_about(path), path) for path in _folders(folder)]
        newest = max(sharded, key=lambda found: found[0]["tokens"], default=None)
        if newest is None or (single is not None and single[0]["tokens"] >= newest[0]["tokens"]):
            if single is None:
                yield None
                return
            about, whole = single

            def share(name: str) -> Tensor:
                tensor = whole(name)
                if name not in _BY_FEATURE:
                    return tensor
                first, last = mesh.features(len(tensor))
                return tensor[first:last]

            yield about, share
            return
        about, path = newest
        yield about, _Shards(path, about, mesh)


class _Shards:
    """Tensors of a sharded checkpoint by name; each is read when it is asked for."""

    def __init__(self, path: Path, about: Mapping[str, Any], mesh: Mesh):
        import torch.distributed.checkpoint as dcp

        self.path, self.about, self.mesh = path, about, mesh
        try:
            found = dcp.HuggingFaceStorageReader(str(path)).read_metadata()
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CacheError(f"{path} cannot be read ({error}); delete it and train again") from error
        self.tensors: dict[str, Any] = dict(found.state_dict_metadata)
        # First row and file of each piece.
        self.pieces: dict[str, list[tuple[int, str]]] = {}
        for index, where in (found.storage_data or {}).items():
            self.pieces.setdefault(index.fqn, []).append((index.offset[0], where.relative_path))
        for name, rows in about["rows"].items():
            if name not in self.tensors or self.tensors[name].size[0] != rows:
                raise CacheError(f"{path} lacks rows of {name}; delete it and train again")

    def __call__(self, name: str) -> Tensor:
        import torch.distributed.checkpoint as dcp

        if name not in self.about["rows"]:
            return torch.empty(0, dtype=torch.float32, device="cpu")
        sizes, dtype = list(self.tensors[name].size), self.tensors[name].properties.dtype
        first, last = self.mesh.features(sizes[0]) if name in _BY_FEATURE else (0, sizes[0])
        out = torch.empty(last - first, *sizes[1:], dtype=dtype, device=self.mesh.device)
        into = self.mesh.shared_out(out) if name in _BY_FEATURE else out
        with _naming(f"reading {self.path}", self.mesh):
            reader = dcp.HuggingFaceStorageReader(str(self.path))
            dcp.load({name: into}, storage_reader=reader, no_dist=self.mesh.config.size == 1)
        return out.reshape(()) if name in self.about["scalars"] else out

    def join(self, path: Path) -> None:
        """Write the dictionary's own tensors to one file, a piece of a rank's rows at a time."""
        names = [name for name in self.tensors if name.startswith(_WEIGHTS)]
        table = {name: (self.tensors[name].properties.dtype, list(self.tensors[name].size)) for name in names}
        with path.open("wb") as out:
            out.write(safetensors_io.header(table))
            for name in names:
                for _, file_name in sorted(self.pieces[name]):
                    with safe_open(file_name, "pt") as file:
                        rows = file.get_slice(name)
                        n = rows.get_shape()[0]
                        for start in range(0, n, _ROWS):
                            out.write(safetensors_io.raw_bytes(rows[start : min(start + _ROWS, n)]))


@contextmanager
def mapped_weights(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Yield the newest checkpoint's description and its weights by name (`encoder`, `W_dec` ...).

    The weights are mapped from disk. Weights of a sharded checkpoint are first copied, a piece at a time,
    into a temporary file, which is deleted at the end.

    Raises FileNotFoundError if there is no checkpoint, CacheError if it cannot be read.
    """
    with read(folder, Mesh()) as found:
        if found is None:
            raise FileNotFoundError(f"{folder} has no checkpoint")
        about, tensors = found
        path, joined = folder / CHECKPOINT_FILE, folder / ".weights.unfinished"
        scalars = about.get("scalars", [])
        try:
            if isinstance(tensors, _Shards):
                tensors.join(path := joined)
            with safe_open(path, "pt") as file:
                names = [n for n in file.keys() if n.startswith((_WEIGHTS, "activation."))]  # noqa: SIM118
                weights = {name: file.get_tensor(name) for name in names}
                yield (
                    about,
                    {
                        name.removeprefix(_WEIGHTS): tensor.reshape(()) if name in scalars else tensor
                        for name, tensor in weights.items()
                    },
                )
        finally:
            joined.unlink(missing_ok=True)


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_FOLDER}*") if path.is_dir())


def _about(path: Path) -> dict[str, Any]:
    about = read_json(path / ABOUT, CacheError, f"delete {path} and train again")
    require_format(path, about)
    return dict(about)


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Flush the folder to disk, so that a rename persists."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
