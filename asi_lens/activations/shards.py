"""The files of an activation store: shards of rows, a manifest that describes them, their moments.

    manifest.json           description and origin of the rows, and a checksum of every other file
    shard-00000.safetensors one tensor `rows [n_i d]`; the shards in order are the rows in order
    moments.safetensors     count, mean and scatter of all rows, float64; numbers of the tokens left out
    partial.safetensors     instead of the manifest while a harvest runs: the complete shards
    part-000/ ...           the shards of each process, if several processes harvest

`shard_writer` writes these files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.activations.moments import Moments
from asi_lens.base.errors import CacheError, DataError
from asi_lens.base.facts import facts_html
from asi_lens.base.files import sha256_of, write_text
from asi_lens.base.safetensors_io import read_tensors, save_tensors

FORMAT = 1
MANIFEST, PARTIAL, MOMENTS = "manifest.json", "partial.safetensors", "moments.safetensors"
DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes that rows can be stored in."""


@dataclass(frozen=True)
class Shard:
    """One file of rows."""

    file: str
    n: int
    """Rows."""
    bytes: int
    """Size of the file."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`, checked by `read`."""

    format: int
    n: int
    """Rows (tokens)."""
    d: int
    """Width of a row."""
    dtype: str
    """One of DTYPES."""
    mean: tuple[float, ...]
    """Mean row, float64."""
    mean_square_norm: float
    """Mean of ||row - mean||^2, float64: the trace of the covariance."""
    origin: dict[str, Any]
    """Model, site, layer and tokens of the rows."""
    shards: tuple[Shard, ...]
    moments_sha256: str

    def write(self, folder: Path) -> None:
        """Write `manifest.json` atomically."""
        write_text(folder / MANIFEST, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `manifest.json`; `open_shards` checks the shards.

        Raises FileNotFoundError if the folder holds no store, DataError for a harvest that is not finished,
        CacheError for a manifest that is damaged or of another format version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            if unfinished(folder):
                raise DataError(
                    f"the store in {folder} is not finished ({progress(folder)} rows so far): run the "
                    "harvest again; it resumes there"
                )
            raise FileNotFoundError(f"{folder} is not an activation store: it has no {MANIFEST}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise CacheError(
                    f"{path} has format {values['format']!r}, this version reads {FORMAT}; harvest anew"
                )
            expected, found = {field.name for field in fields(cls)}, set(values)
            if expected != found:
                raise ValueError(f"unexpected or missing keys: {', '.join(sorted(expected ^ found))}")
            shards = tuple(Shard(**shard) for shard in values["shards"])
            manifest = cls(**{**values, "mean": tuple(values["mean"]), "shards": shards})
            if manifest.dtype not in DTYPES:
                raise ValueError(f"dtype {manifest.dtype!r} is none of {', '.join(DTYPES)}")
            if manifest.n != sum(shard.n for shard in shards) or manifest.d != len(manifest.mean):
                raise ValueError("its numbers of rows do not add up")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"{path} cannot be read ({error}); harvest the store anew") from error
        return manifest


def is_store(folder: Path) -> bool:
    """Return whether `folder` holds a store, finished or not."""
    return (folder / MANIFEST).is_file() or bool(unfinished(folder))


def open_shards(folder: Path, manifest: Manifest) -> list[Float[Tensor, "n_i d"]]:
    """Return memory-mapped views of all shards, in order. Rows are read from disk when they are used.

    Raises CacheError for a shard that is missing, of another size than written, or of another shape or dtype
    than the manifest states.
    """
    rows = []
    for shard in manifest.shards:
        path = folder / shard.file
        check_size(path, shard)
        tensor = read_tensors(path, CacheError, f"delete {folder} and harvest anew", ["rows"])[0]["rows"]
        if tuple(tensor.shape) != (shard.n, manifest.d) or tensor.dtype != getattr(torch, manifest.dtype):
            raise CacheError(
                f"{path} holds {tensor.dtype} of shape {tuple(tensor.shape)}, but {MANIFEST} says "
                f"{manifest.dtype} of shape {(shard.n, manifest.d)}; delete {folder} and harvest anew"
            )
        rows.append(tensor)
    return rows


def verify_checksums(folder: Path, manifest: Manifest) -> None:
    """Read every file and compare it with its checksum. Raises CacheError naming the first that differs."""
    sums = {shard.file: shard.sha256 for shard in manifest.shards} | {MOMENTS: manifest.moments_sha256}
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise CacheError(f"{path} is missing; delete {folder} and harvest anew")
        if sha256_of(path) != expected:
            raise CacheError(f"{path} was changed since it was written; delete {folder} and harvest anew")


def read_moments(folder: Path) -> Moments:
    """Return the moments of all rows. Raises CacheError for a file that is missing or damaged."""
    state, _ = load(folder / MOMENTS)
    return Moments.from_state(state)


def read_left_out(folder: Path) -> Int[Tensor, " m"]:
    """Return the numbers of the tokens that were left out, ascending. Raises as `read_moments`."""
    state, _ = load(folder / MOMENTS)
    return state.get("left_out", torch.empty(0, dtype=torch.int64, device="cpu"))


def unfinished(folder: Path) -> list[Path]:
    """Return the folders in which an unfinished harvest, by one process or several, has complete shards."""
    return sorted(path.parent for path in (*folder.glob(PARTIAL), *folder.glob(f"part-*/{PARTIAL}")))


def progress(folder: Path) -> int:
    """Return the number of rows in complete shards of an unfinished harvest."""
    return sum(int(json.loads(load(part / PARTIAL)[1]["state"])["n"]) for part in unfinished(folder))


def part_folder(folder: Path, rank: int) -> Path:
    """Return the folder to which process `rank` of several writes its shards."""
    return folder / f"part-{rank:03d}"


def describe(origin: Mapping[str, Any]) -> str:
    """Describe rows in words: site, layer, model and corpus."""
    words = {key: origin.get(key, "?") for key in ("site", "layer", "model", "corpus")}
    return "{site} of layer {layer} of {model} on {corpus}".format(**words)


def html(n: int, d: int, dtype: torch.dtype, folder: Path | None, origin: Mapping[str, Any]) -> str:
    """Return a table of a store's facts for a notebook."""
    facts = {
        **{key: origin.get(key) for key in ("model", "corpus", "site", "layer", "context")},
        "rows x width": f"{n:,} x {d:,}",
        "dtype": str(dtype).removeprefix("torch."),
        "size": f"{n * d * dtype.itemsize / 2**20:,.1f} MiB",
        "massive rows left out": origin.get("left_out") or None,
        "folder": folder or "in memory",
    }
    return facts_html("ActivationStore", facts)


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Name every key of `asked` whose value differs in `there`, in words; empty if all agree."""
    differ = [key for key in asked if there.get(key) != asked[key]]
    return "; ".join(f"{key} {there.get(key)!r}, not {asked[key]!r}" for key in differ)


def check_size(path: Path, shard: Shard) -> None:
    """Raise CacheError unless the shard exists and has the size that was written."""
    if not path.is_file():
        raise CacheError(f"{path} is missing; delete {path.parent} and harvest anew")
    found = path.stat().st_size
    if found != shard.bytes:
        raise CacheError(
            f"{path} has {found} bytes, but {shard.bytes} were written; delete {path.parent} and harvest anew"
        )


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file of the store other than a shard, atomically."""
    save_tensors(path, tensors, {"asi_lens_store": str(FORMAT), **metadata})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a file written by `save`. Raises CacheError if missing or damaged."""
    return read_tensors(path, CacheError, f"delete {path.parent} and harvest anew")


def take(rows: Float[Tensor, "n d"], index: Int[Tensor, " batch"], out: Float[Tensor, "batch d"]) -> None:
    """Copy rows. On a CPU numpy copies them: torch's threads would take cores from other work."""
    if rows.device.type != "cpu" or not rows.is_contiguous():
        torch.index_select(rows, 0, index.to(rows.device), out=out)
        return
    source, target = (part.view(torch.uint8).numpy() for part in (rows, out))
    np.take(source, index.numpy(), axis=0, out=target, mode="clip")
