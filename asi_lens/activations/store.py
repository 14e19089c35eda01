"""Activations of one site on disk or in memory, read as shuffled batches.

A store describes itself: reading it needs neither model nor dataset. Rows are memory-mapped. A batch is
drawn from the whole store: the order of an epoch is a permutation of all rows. The permutation is computed
entry by entry, so it takes no memory, and the stream of batches can be resumed at any position.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from asi_lens.activations import shards
from asi_lens.activations.ahead import copied, moved, pinned, read_ahead
from asi_lens.activations.moments import Moments
from asi_lens.activations.row_files import open_rows
from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, require
from asi_lens.base.permutation import Permutation

_CHUNK = 8192
# A permutation's key is (this, seed, epoch): training order and `sample` never coincide.
_TRAINING, _SAMPLE = 0, 1


class ReadRows(NamedTuple):
    """Rows read for a batch, in ascending order; row i belongs at place `order[i]` of the batch."""

    rows: Float[Tensor, "batch d"]
    order: Int[Tensor, " batch"]


@checked
class ActivationStore:
    """Rows `[n d]` of one site, in the order of their tokens.

    Attributes:
        n: number of rows (tokens).
        d: width of a row.
        dtype: dtype of the stored rows.
        mean: mean row, float64 `[d]`.
        scale: factor that gives centred rows a mean square norm of d.
        metadata: origin of the rows (model, site, hook_name, layer, corpus, context ...).
        folder: folder of the files; None for rows in memory.
    """

    def __init__(
        self,
        rows: Sequence[Float[Tensor, "n_i d"]],
        moments: Callable[[], Moments],
        mean: Float[Tensor, " d"],
        mean_square_norm: float,
        metadata: Mapping[str, Any],
        folder: Path | None = None,
        checksums: Sequence[str] = (),
        left_out: Callable[[], Int[Tensor, " m"]] | None = None,
    ):
        require(len(rows) > 0, "rows", rows, "one matrix [n d] or more")
        self._rows = list(rows)
        self._bounds = list(itertools.accumulate((len(part) for part in rows), initial=0))
        self._moments = moments
        self._left_out = left_out
        self.n: int = self._bounds[-1]
        self.d, self.dtype = int(rows[0].shape[1]), rows[0].dtype
        self.mean, self.mean_square_norm = mean, mean_square_norm
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata))
        self.folder = folder
        self._checksums = tuple(checksums)

    @classmethod
    def open(cls, folder: Path | str) -> ActivationStore:
        """Open the store in `folder`, or the rows that another tool left in a file or folder.

        Rows of other tools (`row_files`) are mapped and read once, for their moments. Of a store, file sizes
        are checked here, contents by `verify`. Raises DataError for an unfinished store or files of no rows,
        CacheError for a shard that is missing or cut off or for an unknown format, FileNotFoundError.
        """
        folder = Path(folder)
        if folder.exists() and not shards.is_store(folder):
            return cls.from_tensor(folder)
        manifest = shards.Manifest.read(folder)
        return cls(
            shards.open_shards(folder, manifest),
            lambda: shards.read_moments(folder),
            torch.tensor(manifest.mean, dtype=torch.float64, device="cpu"),
            manifest.mean_square_norm,
            manifest.origin,
            folder,
            [shard.sha256 for shard in manifest.shards],
            lambda: shards.read_left_out(folder),
        )

    @classmethod
    def from_tensor(
        cls, rows: Tensor | np.ndarray | Path | str, metadata: Mapping[str, Any] | None = None
    ) -> ActivationStore:
        """Return a store of rows [n d] in memory, or of a file or folder of rows, mapped, not loaded.

        The rows are read once, for their moments. Raises DataError for rows that are not a matrix of floats,
        and for a NaN or infinite value (naming the row), and the errors of `row_files.open_rows`.
        """
        if isinstance(rows, str | Path):
            parts, origin = open_rows(Path(rows))
            return cls._of_parts(parts, origin | dict(metadata or {}))
        if isinstance(rows, np.ma.MaskedArray):
            raise DataError("a masked array has values under its mask; give the rows that are to count")
        if isinstance(rows, np.ndarray):
            try:
                rows = torch.from_numpy(rows)
            except (TypeError, ValueError) as error:
                raise DataError(f"rows of dtype {rows.dtype} cannot be read: {error}") from error
        if not isinstance(rows, Tensor) or rows.ndim != 2 or 0 in rows.shape:
            shape = tuple(getattr(rows, "shape", ()))
            raise DataError(f"rows must be a matrix [n d] with at least one row, not of shape {shape}")
        if not rows.is_floating_point():
            raise DataError(f"rows must be floating point numbers, not {rows.dtype}")
        return cls._of_parts([rows.detach()], metadata or {})

    @classmethod
    def _of_parts(cls, parts: Sequence[Float[Tensor, "_ d"]], origin: Mapping[str, Any]) -> ActivationStore:
        """Return a store of rows whose moments are not known yet. Raises DataError naming a bad row."""
        moments = Moments.zeros(parts[0].shape[1], parts[0].device)
        # A bar is shown only if reading takes seconds.
        with tqdm(
            total=sum(map(len, parts)), desc="mean and scale", unit="row", unit_scale=True, delay=3
        ) as bar:
            for part in (part for rows in parts for part in rows.split(_CHUNK)):
                bad = ~torch.isfinite(part).all(1)
                if bad.any():
                    raise DataError(f"row {moments.n + int(bad.nonzero()[0])} holds NaN or infinity")
                moments.update(part)
                bar.update(len(part))
        square = moments.scatter.diagonal().sum().item() / moments.n
        return cls(parts, lambda: moments, moments.mean.cpu(), square, origin)

    @property
    def parts(self) -> Sequence[Float[Tensor, "n_i d"]]:
        """Rows as they are stored, in parts."""
        return self._rows

    @cached_property
    def scale(self) -> float:
        """sqrt(d / mean ||row - mean||^2). Raises DataError if all rows are equal."""
        if not self.mean_square_norm > 0:
            raise DataError("the rows do not vary, so they have no scale")
        return math.sqrt(self.d / self.mean_square_norm)

    @cached_property
    def moments(self) -> Moments:
        """Count, mean and scatter of all rows, float64."""
        return self._moments()

    @cached_property
    def left_out(self) -> Int[Tensor, " m"]:
        """Numbers of the harvested tokens that are not among the rows (massive activations), ascending.

        Tokens are counted over all sequences, without position 0 if the harvest dropped it.
        """
        return torch.empty(0, dtype=torch.int64, device="cpu") if self._left_out is None else self._left_out()

    @cached_property
    def spectrum(self) -> Spectrum:
        """Spectrum of the stored rows, from which ASI can start."""
        site, layer = self.metadata.get("site"), self.metadata.get("layer")
        name = "" if site is None else f"{site} {layer}"
        return Spectrum.from_moments(self.moments, name=name, left_out=len(self.left_out))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the rows (in memory: with their moments or a sample of the rows)."""
        digest = hashlib.sha256(f"{self.n} {self.d} {self.dtype}".encode())
        for checksum in self._checksums:
            digest.update(checksum.encode())
        if not self._checksums:
            some = self._gather(torch.arange(0, self.n, max(1, self.n // 64), device="cpu"), torch.float64)
            for part in (self.mean, self.moments.scatter, some):
                digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        what = shards.describe(self.metadata) if "site" in self.metadata else "rows"
        if out := self.metadata.get("left_out"):
            what += f" without {out:,} massive"
        where = self.folder or "memory"
        return f"ActivationStore({what}: {self.n:,} x {self.d} {str(self.dtype)[6:]}, in {where})"

    def _repr_html_(self) -> str:
        return shards.html(self.n, self.d, self.dtype, self.folder, self.metadata)

    def verify(self) -> None:
        """Compare every file with its checksum. Raises CacheError naming the first file that differs."""
        if self.folder is not None:
            shards.verify_checksums(self.folder, shards.Manifest.read(self.folder))

    def in_order(self, batch_size: int) -> Iterator[Float[Tensor, "batch d"]]:
        """Return an iterator over all rows, once and in order, as views of the files in the store's dtype.

        A batch ends with its shard, so some batches are smaller.
        """
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        return (part for rows in self._rows for part in rows.split(batch_size))

    def rows(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
        """Return a copy of the rows at `index`, in its order. Raises OptionError for rows out of range."""
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < self.n):
            raise OptionError(f"rows {index.min()} to {index.max()} are not allowed; 0 to {self.n - 1} are")
        return self._gather(index)

    def _gather(
        self, index: Int[Tensor, " batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "batch d"]:
        return self._placed(self._read(index), dtype)

    def _read(self, index: Int[Tensor, " batch"]) -> ReadRows:
        """Return the rows as stored, in ascending order, and the order asked for."""
        # Sorted, so that each file is read once, from its beginning to its end.
        ordered, order = index.sort()
        cuts = torch.searchsorted(ordered, torch.tensor(self._bounds, device="cpu")).tolist()
        found = torch.empty(len(index), self.d, dtype=self.dtype, device=self._rows[0].device)
        for part, base, (low, high) in zip(self._rows, self._bounds, itertools.pairwise(cuts), strict=False):
            if low < high:
                shards.take(part, ordered[low:high] - base, found[low:high])
        return ReadRows(found, order)

    def _placed(self, read: ReadRows, dtype: torch.dtype | None) -> Float[Tensor, "batch d"]:
        """Return a copy of the rows in the order asked for."""
        out = torch.empty_like(read.rows)
        out[read.order.to(out.device)] = read.rows
        return self._seen(out, dtype)

    @property
    def _stored(self) -> Sequence[Float[Tensor, "n_i width"]]:
        """Parts that `_read` reads from."""
        return self._rows

    def _seen(self, stored: Float[Tensor, "batch width"], dtype: torch.dtype | None) -> Tensor:
        """Return rows as they are stored as rows [batch d] of this store."""
        return stored.to(dtype or self.dtype)

    def positions(self, index: Int[Tensor, " batch"]) -> Int[Tensor, "batch 2"]:
        """Return (sequence, position) in the harvested tokens of the rows at `index`.

        Raises OptionError for a store that was not harvested from tokens.
        """
        if "context" not in self.metadata or "drop_first" not in self.metadata:
            raise OptionError("the rows of this store have no positions: they were not harvested from tokens")
        first = int(self.metadata["drop_first"])
        kept = int(self.metadata["context"]) - first
        # Left-out token j stands before row i if it has at most i rows before it.
        rows_before = self.left_out - torch.arange(len(self.left_out), device="cpu")
        token = index + torch.searchsorted(rows_before, index, right=True)
        return torch.stack([token // kept, token % kept + first], dim=1)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        n_tokens: int | None = None,
        dtype: torch.dtype | None = torch.float32,
        share: Callable[[int], tuple[int, int]] | None = None,
        device: torch.device | None = None,
    ) -> Iterator[Float[Tensor, "batch d"]]:
        """Return the stream of shuffled rows from position `start` to position `n_tokens` (None: endless).

        Each epoch holds every row once, in its own order that mixes the whole store. Position p of the
        stream is the same row for every batch size, so a stream with `start` at the number of rows consumed
        continues as if it had not stopped. The last batch before `n_tokens` may be smaller.

        Args:
            dtype: dtype of the batches; None keeps the store's dtype.
            share: maps the size n of a batch to the rows of it that are read: (first, after the last). None
                reads all rows. Positions count whole batches.
            device: device of the batches; None is that of the store. All rows are copied to a GPU first if
                they take at most half of its free memory; else batches are read ahead and copied as they are
                stored, from pinned memory and without a wait, and converted and put into order there.
        """
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(start >= 0, "start", start, "at least 0")
        require(seed >= 0, "seed", seed, "at least 0")
        require(
            n_tokens is None or n_tokens >= start, "n_tokens", n_tokens, f"None or at least start={start}"
        )
        return self._stream(batch_size, seed, start, n_tokens, dtype, share, device)

    def _stream(
        self,
        batch_size: int,
        seed: int,
        start: int,
        n_tokens: int | None,
        dtype: torch.dtype | None,
        share: Callable[[int], tuple[int, int]] | None,
        device: torch.device | None,
    ) -> Iterator[Float[Tensor, "batch d"]]:
        def own(index: Int[Tensor, " batch"]) -> Int[Tensor, " own"]:
            return index if share is None else index[slice(*share(len(index)))]

        def read(index: Int[Tensor, " batch"]) -> ReadRows:
            return ReadRows(*(pinned(part, device) for part in self._read(own(index))))

        order = self._order(batch_size, seed, start, n_tokens)
        if (whole := copied(self._stored, device)) is not None:
            for index in read_ahead(lambda index: pinned(own(index), device), order):
                yield self._seen(whole[moved(index, device)], dtype)
            return
        for found in read_ahead(read, order):
            yield self._placed(ReadRows(*(moved(part, device) for part in found)), dtype)

    def _order(
        self, batch_size: int, seed: int, start: int, n_tokens: int | None
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Yield the row numbers of each batch."""
        epoch, shuffle = -1, Permutation(self.n)
        while n_tokens is None or start < n_tokens:
            stop = start + batch_size if n_tokens is None else min(start + batch_size, n_tokens)
            index = []
            while start < stop:
                if epoch != start // self.n:
                    epoch = start // self.n
                    shuffle = Permutation(self.n, _TRAINING, seed, epoch)
                first = start - epoch * self.n
                last = min(stop - epoch * self.n, self.n)
                index.append(shuffle(np.arange(first, last)))
                start += last - first
            yield torch.from_numpy(np.concatenate(index))

    def sample(self, n: int, seed: int = 0) -> Float[Tensor, "n d"]:
        """Return `n` different rows drawn at random, float32. Raises OptionError if `n` exceeds the rows."""
        require(1 <= n <= self.n, "n", n, f"from 1 to {self.n}")
        require(seed >= 0, "seed", seed, "at least 0")
        index = Permutation(self.n, _SAMPLE, seed)(np.arange(n))
        return self._gather(torch.from_numpy(index), torch.float32)
