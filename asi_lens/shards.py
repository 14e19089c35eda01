"""The files of an activation store: shards of rows, a manifest that describes them, their moments.

    manifest.json           what the rows are and where they come from, and a checksum of every other file
    shard-00000.safetensors one tensor `rows [n_i d]`; the shards in order are the rows in order
    moments.safetensors     count, mean and scatter of all rows, float64
    partial.safetensors     instead of the manifest while a harvest is under way: the shards that are whole
    part-000/ ...           of a harvest by several processes: the shards of each

A shard is written under a temporary name and renamed when it is whole, so a kill costs one shard at most.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asi_lens import tensor_files
from asi_lens.errors import CacheError, DataError, OptionError, require
from asi_lens.files import sha256_of, write_whole
from asi_lens.moments import Moments

FORMAT = 1
MANIFEST, PARTIAL, MOMENTS = "manifest.json", "partial.safetensors", "moments.safetensors"
DTYPES = ("bfloat16", "float16", "float32")
"""Dtypes that rows can be stored in."""
_UNFINISHED = ".unfinished"


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
    """What `manifest.json` holds."""

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
    """Model, site, layer, tokens: what the rows are."""
    shards: tuple[Shard, ...]
    moments_sha256: str

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, whole."""
        with write_whole(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check `manifest.json`; shards are looked at by `open_shards`.

        Raises FileNotFoundError where there is no store, DataError for a harvest that is not finished,
        CacheError for a manifest that is damaged or of another format version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            if unfinished(folder):
                raise DataError(
                    f"the store in {folder} is not finished ({progress(folder)} rows so far): run the "
                    "harvest again, it goes on from there"
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
                raise ValueError(f"dtype {manifest.dtype!r}")
            if manifest.n != sum(shard.n for shard in shards) or manifest.d != len(manifest.mean):
                raise ValueError("its counts do not belong together")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"{path} cannot be read ({error}); harvest the store anew") from error
        return manifest


def open_shards(folder: Path, manifest: Manifest) -> list[Float[Tensor, "n_i d"]]:
    """Memory-mapped views of every shard: nothing is read until rows are used.

    Raises CacheError for a shard that is missing, of another size than written, or not what it says.
    """
    rows = []
    for shard in manifest.shards:
        path = folder / shard.file
        _check_size(path, shard)
        try:
            with safe_open(path, "pt") as file:
                tensor = file.get_tensor("rows")
        except SafetensorError as error:
            raise CacheError(f"{path} is damaged ({error}); delete {folder} and harvest anew") from error
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
    """Moments of all rows. Raises CacheError for a file that is missing or damaged."""
    state, _ = _load(folder / MOMENTS)
    return Moments.from_state(state)


def unfinished(folder: Path) -> list[Path]:
    """The folders in which a harvest under way, of one process or several, has whole shards."""
    return sorted(path.parent for path in (*folder.glob(PARTIAL), *folder.glob(f"part-*/{PARTIAL}")))


def progress(folder: Path) -> int:
    """Rows in whole shards of a harvest under way."""
    return sum(int(json.loads(_load(part / PARTIAL)[1]["state"])["n"]) for part in unfinished(folder))


def part_folder(folder: Path, rank: int) -> Path:
    """Where process `rank` of several writes its shards."""
    return folder / f"part-{rank:03d}"


def join_parts(folder: Path, origin: Mapping[str, Any], n_parts: int) -> None:
    """Make the finished parts of a harvest by several processes one store, by its moments and manifest.

    The shards stay where they are. Raises DataError where a part is not whole, CacheError where its state is
    damaged.
    """
    parts = [part_folder(folder, rank) for rank in range(n_parts)]
    read = [_load(part / PARTIAL) for part in parts]
    states = [json.loads(metadata["state"]) for _, metadata in read]
    shards = []
    for part, state in zip(parts, states, strict=True):
        if state["n"] != state["n_total"]:
            raise DataError(f"the store in {part} has {state['n']} of {state['n_total']} rows")
        for values in state["shards"]:
            _check_size(part / values["file"], Shard(**values))
            shards.append(Shard(**{**values, "file": f"{part.name}/{values['file']}"}))
    moments = Moments.from_state(read[0][0])
    for tensors, _ in read[1:]:
        moments.merge(Moments.from_state(tensors))
    _write_manifest(folder, origin, states[0]["dtype"], moments, shards)
    for part in parts:
        (part / PARTIAL).unlink()


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """What `there` has other than `asked`, in words; empty where all that is asked agrees."""
    differ = [key for key in asked if there.get(key) != asked[key]]
    return "; ".join(f"{key} {there.get(key)!r}, not {asked[key]!r}" for key in differ)


class ShardWriter:
    """Appends rows to the shards of one store. One that finds whole shards goes on behind them.

    `n` rows are written (in whole shards after a restart). Raises OptionError where the folder holds the
    beginning of another store, CacheError where what is there is damaged.
    """

    def __init__(
        self,
        folder: Path,
        origin: Mapping[str, Any],
        *,
        n_total: int,
        d: int,
        dtype: str,
        shard_rows: int,
    ):
        require(dtype in DTYPES, "dtype", dtype, " or ".join(map(repr, DTYPES)))
        require(shard_rows >= 1, "shard_rows", shard_rows, "at least 1")
        self.folder, self.origin, self.d, self.dtype = folder, dict(origin), d, dtype
        self.n_total, self.shard_rows = n_total, shard_rows
        self.n = 0
        self.shards: list[Shard] = []
        self.moments = Moments.zeros(d)
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._open_rows = self._open_n = 0
        if (folder / PARTIAL).exists():
            self._restore()

    def append(self, rows: Float[Tensor, "batch d"]) -> None:
        """Write rows in the store's dtype. They must not reach over the end of a shard.

        Raises DataError for values that are not finite in that dtype, OSError for a full disk and the
        like: whole shards stay, and a writer opened later goes on behind them.
        """
        kept = rows.to(getattr(torch, self.dtype))
        if not torch.isfinite(kept.sum(dtype=torch.float32)):
            raise DataError(
                f"rows {self.n} to {self.n + len(rows)} are not finite in {self.dtype}; store them in "
                "bfloat16 or float32"
            )
        batch = Moments.of(kept)
        self.moments = self.moments.to(batch.mean.device)
        if self._file is None:
            self._begin_shard()
        assert self._file is not None
        if self._open_rows + len(rows) > self._open_n:
            raise OptionError(f"{len(rows)} rows do not fit into what is left of a shard")
        data = tensor_files.raw_bytes(kept)
        try:
            self._file.write(data)
        except OSError as error:
            raise self._cannot_write(error) from error
        self._digest.update(data)
        self.moments.merge(batch)
        self.n += len(rows)
        self._open_rows += len(rows)
        if self._open_rows == self._open_n:
            self._end_shard()

    def finish(self) -> None:
        """Write moments and manifest: from here on the folder is a store."""
        if self.n != self.n_total or self._file is not None:
            raise DataError(f"the store in {self.folder} has {self.n} of {self.n_total} rows")
        _write_manifest(self.folder, self.origin, self.dtype, self.moments, self.shards)
        (self.folder / PARTIAL).unlink(missing_ok=True)

    def close(self) -> None:
        """Drop a shard that is not whole."""
        if self._file is not None:
            # On a full disk the buffer cannot be flushed; the file goes anyway.
            with suppress(OSError):
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _begin_shard(self) -> None:
        n = min(self.shard_rows, self.n_total - self.n)
        header = tensor_files.header({"rows": (getattr(torch, self.dtype), (n, self.d))})
        self._digest = hashlib.sha256(header)
        self._open_rows, self._open_n = 0, n
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / (self._shard_name() + _UNFINISHED)).open("wb")
            self._file.write(header)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _end_shard(self) -> None:
        assert self._file is not None
        unfinished, path = Path(self._file.name), self.folder / self._shard_name()
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            unfinished.replace(path)
        except OSError as error:
            raise self._cannot_write(error) from error
        self.shards.append(Shard(path.name, self._open_n, path.stat().st_size, self._digest.hexdigest()))
        state = {
            "format": FORMAT,
            "n": self.n,
            "n_total": self.n_total,
            "d": self.d,
            "dtype": self.dtype,
            "shard_rows": self.shard_rows,
            "origin": self.origin,
            "shards": [asdict(shard) for shard in self.shards],
        }
        # One file, so that the shards and their moments can never belong to different moments in time.
        _save(self.folder / PARTIAL, self.moments.state(), {"state": json.dumps(state)})

    def _restore(self) -> None:
        path = self.folder / PARTIAL
        tensors, metadata = _load(path)
        state = json.loads(metadata["state"])
        if state["format"] != FORMAT:
            raise CacheError(
                f"{path} has format {state['format']!r}, this version reads {FORMAT}; delete {self.folder}"
            )
        shape = {"n_total": self.n_total, "d": self.d, "dtype": self.dtype, "shard_rows": self.shard_rows}
        differ = differences({**state["origin"], **state}, {**self.origin, **shape})
        if differ:
            raise OptionError(
                f"{self.folder} holds the beginning of another store ({differ}); finish that harvest, choose "
                "another folder, or delete it"
            )
        self.shards = [Shard(**shard) for shard in state["shards"]]
        for shard in self.shards:
            _check_size(self.folder / shard.file, shard)
        self.n = int(state["n"])
        self.moments = Moments.from_state(tensors)

    def _shard_name(self) -> str:
        return f"shard-{len(self.shards):05d}.safetensors"

    def _cannot_write(self, error: OSError) -> OSError:
        self.close()
        whole = sum(shard.n for shard in self.shards)
        return type(error)(
            error.errno,
            f"cannot write {self.folder / self._shard_name()}: {error.strerror or error}; {whole} of "
            f"{self.n_total} rows are safe, the same call goes on behind them",
        )


def _write_manifest(
    folder: Path, origin: Mapping[str, Any], dtype: str, moments: Moments, shards: Sequence[Shard]
) -> None:
    """Write moments, then the manifest: from here on the folder is a store."""
    _save(folder / MOMENTS, moments.state(), {})
    Manifest(
        FORMAT,
        moments.n,
        len(moments.mean),
        dtype,
        tuple(moments.mean.tolist()),
        moments.scatter.diagonal().sum().item() / moments.n,
        dict(origin),
        tuple(shards),
        sha256_of(folder / MOMENTS),
    ).write(folder)


def _check_size(path: Path, shard: Shard) -> None:
    if not path.is_file():
        raise CacheError(f"{path} is missing; delete {path.parent} and harvest anew")
    found = path.stat().st_size
    if found != shard.bytes:
        raise CacheError(
            f"{path} has {found} bytes, but {shard.bytes} were written; delete {path.parent} and harvest anew"
        )


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    with write_whole(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"asi_lens_store": str(FORMAT), **metadata})


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path} cannot be read ({error}); delete {path.parent} and harvest anew") from error
