"""Writing an activation store: shards of rows first, moments and manifest last.

A shard is written under a temporary name and renamed when it is complete, so a kill loses at most one shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.moments import Moments
from asi_lens.activations.shards import (
    DTYPES,
    FORMAT,
    MOMENTS,
    PARTIAL,
    Manifest,
    Shard,
    check_size,
    differences,
    load,
    part_folder,
    save,
)
from asi_lens.base import safetensors_io
from asi_lens.base.errors import CacheError, DataError, OptionError, require
from asi_lens.base.files import sha256_of

_UNFINISHED = ".unfinished"


class ShardWriter:
    """Appends rows to the shards of one store, after any complete shards that are already in the folder.

    `n`: tokens seen so far (after a restart, those of complete shards): rows written, and tokens left out.
    `n_total` and `shard_rows` count tokens, too; `shard_rows` may be a list, a number for each shard. `first`
    is the harvest's token that the store begins with, above 0 in a part of several processes. Raises
    OptionError if the folder holds the beginning of another store, CacheError if the files there are damaged.
    """

    def __init__(
        self,
        folder: Path,
        origin: Mapping[str, Any],
        *,
        n_total: int,
        d: int,
        dtype: str,
        shard_rows: int | list[int],
        first: int = 0,
    ):
        require(dtype in DTYPES, "dtype", dtype, " or ".join(map(repr, DTYPES)))
        least = min(shard_rows) if isinstance(shard_rows, list) else shard_rows
        require(least >= 1, "shard_rows", shard_rows, "at least 1")
        self.folder, self.origin, self.d, self.dtype = folder, dict(origin), d, dtype
        self.n_total, self.shard_rows, self.first = n_total, shard_rows, first
        self.n = 0
        self.shards: list[Shard] = []
        self.moments = Moments.zeros(d)
        self.left_out = torch.empty(0, dtype=torch.int64, device="cpu")
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._open_seen = self._open_rows = self._open_n = 0
        if (folder / PARTIAL).exists():
            self._restore()

    def append(self, rows: Float[Tensor, "batch d"], left_out: Int[Tensor, " m"] | None = None) -> None:
        """Write rows in the store's dtype. All rows must fit into the current shard.

        `left_out`: numbers of the tokens that the batch has beside the rows (counted from the first token).

        Raises DataError for values that are not finite in that dtype, OptionError for rows that do not fit,
        OSError for a full disk and the like. Complete shards stay; a writer opened later appends after them.
        """
        kept = rows.to(getattr(torch, self.dtype))
        if not torch.isfinite(kept.sum(dtype=torch.float32)):
            raise DataError(
                f"rows {self.n} to {self.n + len(rows)} are not finite in {self.dtype}; store them in "
                "bfloat16 or float32"
            )
        seen = len(rows) + (0 if left_out is None else len(left_out))
        self.moments = self.moments.to(kept.device)
        batch = self.moments.block(kept) if len(rows) else None
        if self._file is None:
            self._begin_shard()
        assert self._file is not None
        if self._open_seen + seen > self._open_n:
            raise OptionError(f"{len(rows)} rows do not fit into the rest of the open shard")
        if left_out is not None:
            self.left_out = torch.cat([self.left_out, left_out.cpu()])
        if batch is not None:
            data = safetensors_io.raw_bytes(kept)
            try:
                self._file.write(data)
            except OSError as error:
                raise self._cannot_write(error) from error
            self._digest.update(data)
            self.moments.merge(batch)
        self.n += seen
        self._open_seen += seen
        self._open_rows += len(rows)
        if self._open_seen == self._open_n:
            self._end_shard()

    def finish(self) -> None:
        """Write moments and manifest, which make the folder a store."""
        if self.n != self.n_total or self._file is not None:
            raise DataError(f"the store in {self.folder} has {self.n} of {self.n_total} rows")
        _write_manifest(self.folder, self.origin, self.dtype, self.moments, self.left_out, self.shards)
        (self.folder / PARTIAL).unlink(missing_ok=True)

    def close(self) -> None:
        """Delete a shard that is not complete."""
        if self._file is not None:
            # On a full disk the buffer cannot be flushed; the file is deleted anyway.
            with suppress(OSError):
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _begin_shard(self) -> None:
        each = self.shard_rows
        rows = each[len(self.shards)] if isinstance(each, list) else each
        n = min(rows, self.n_total - self.n)
        header = self._header(n)
        self._digest = hashlib.sha256(header)
        self._open_seen, self._open_rows, self._open_n = 0, 0, n
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = (self.folder / (self._shard_name() + _UNFINISHED)).open("wb")
            self._file.write(header)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _header(self, n: int, size: int = 0) -> bytes:
        """Return the bytes before `n` rows, of `size` bytes (spaces fill them up)."""
        header = safetensors_io.header({"rows": (getattr(torch, self.dtype), (n, self.d))})
        if size <= len(header):
            return header
        return (size - 8).to_bytes(8, "little") + header[8:] + b" " * (size - len(header))

    def _end_shard(self) -> None:
        assert self._file is not None
        unfinished, path = Path(self._file.name), self.folder / self._shard_name()
        checksum = self._digest.hexdigest()
        try:
            if self._open_rows < self._open_n:
                # The header was written before it was known that tokens are left out.
                self._file.seek(0)
                self._file.write(self._header(self._open_rows, len(self._header(self._open_n))))
                self._file.flush()
                checksum = sha256_of(unfinished)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            unfinished.replace(path)
        except OSError as error:
            raise self._cannot_write(error) from error
        self.shards.append(Shard(path.name, self._open_rows, path.stat().st_size, checksum))
        state = {
            "format": FORMAT,
            "n": self.n,
            "n_total": self.n_total,
            "d": self.d,
            "dtype": self.dtype,
            "shard_rows": self.shard_rows,
            "first": self.first,
            "origin": self.origin,
            "shards": [asdict(shard) for shard in self.shards],
        }
        # One file, so that the list of shards and their moments always count the same rows.
        save(self.folder / PARTIAL, _tensors(self.moments, self.left_out), {"state": json.dumps(state)})

    def _restore(self) -> None:
        path = self.folder / PARTIAL
        tensors, metadata = load(path)
        state = json.loads(metadata["state"])
        if state["format"] != FORMAT:
            raise CacheError(
                f"{path} has format {state['format']!r}, this version reads {FORMAT}; delete {self.folder}"
            )
        shape = {"n_total": self.n_total, "d": self.d, "dtype": self.dtype, "shard_rows": self.shard_rows}
        # Without the first token, another number of processes could go on with a part of other rows. Files
        # from before it was kept are taken for beginnings of the text.
        differ = differences(
            {"first": 0, **state["origin"], **state}, {**self.origin, **shape, "first": self.first}
        )
        if differ:
            raise OptionError(
                f"{self.folder} holds the beginning of another store ({differ}); finish that harvest, choose "
                "another folder, or delete it"
            )
        self.shards = [Shard(**shard) for shard in state["shards"]]
        for shard in self.shards:
            check_size(self.folder / shard.file, shard)
        self.n = int(state["n"])
        self.moments, self.left_out = Moments.from_state(tensors), tensors["left_out"]

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


class Appending:
    """A harvest consumer that appends to one writer per (site, layer)."""

    def __init__(self, writers: Mapping[SiteLayer, ShardWriter], start: int):
        self.wants: Collection[SiteLayer] = tuple(writers)
        self._writers = writers
        self._seen = dict.fromkeys(writers, start)
        self._out: dict[SiteLayer, Tensor] = {}

    def leave_out(self, where: SiteLayer, tokens: Int[Tensor, " m"], rows: Float[Tensor, "m d"]) -> None:
        """Note tokens of the next batch that are not among its rows (`harvest.LeftOut`)."""
        self._out[where] = tokens

    def consume(self, where: SiteLayer, rows: Float[Tensor, "n d"]) -> None:
        """Append one batch, unless the store already holds it (from before a kill)."""
        out = self._out.pop(where, None)
        if self._seen[where] == self._writers[where].n:
            self._writers[where].append(rows, out)
        self._seen[where] += len(rows) + (0 if out is None else len(out))


def join_parts(folder: Path, origin: Mapping[str, Any], n_parts: int) -> None:
    """Join the finished parts of a harvest by several processes: write moments and manifest of one store.

    The shards are not moved. Raises DataError if a part is not complete, CacheError if its state is damaged.
    """
    parts = [part_folder(folder, rank) for rank in range(n_parts)]
    read = [load(part / PARTIAL) for part in parts]
    states = [json.loads(metadata["state"]) for _, metadata in read]
    shards = []
    for part, state in zip(parts, states, strict=True):
        if state["n"] != state["n_total"]:
            raise DataError(f"the store in {part} has {state['n']} of {state['n_total']} rows")
        for values in state["shards"]:
            check_size(part / values["file"], Shard(**values))
            shards.append(Shard(**{**values, "file": f"{part.name}/{values['file']}"}))
    moments = Moments.from_state(read[0][0])
    for tensors, _ in read[1:]:
        moments.merge(Moments.from_state(tensors))
    left_out = torch.cat([tensors["left_out"] for tensors, _ in read])
    _write_manifest(folder, origin, states[0]["dtype"], moments, left_out, shards)
    for part in parts:
        (part / PARTIAL).unlink()


def _write_manifest(
    folder: Path,
    origin: Mapping[str, Any],
    dtype: str,
    moments: Moments,
    left_out: Int[Tensor, " m"],
    shards: Sequence[Shard],
) -> None:
    """Write moments, then the manifest, which makes the folder a store."""
    save(folder / MOMENTS, _tensors(moments, left_out), {})
    Manifest(
        FORMAT,
        moments.n,
        len(moments.mean),
        dtype,
        tuple(moments.mean.tolist()),
        moments.scatter.diagonal().sum().item() / moments.n,
        {**origin, "left_out": len(left_out)},
        tuple(shards),
        sha256_of(folder / MOMENTS),
    ).write(folder)


def _tensors(moments: Moments, left_out: Int[Tensor, " m"]) -> dict[str, Tensor]:
    """Return the tensors to store: the moments, and the numbers of the tokens that are not among the rows."""
    return {**moments.state(), "left_out": left_out}
