"""Activations of one site on disk or in memory, read as shuffled batches.

A store describes itself: no model and no dataset is needed to read it. Rows are memory-mapped, and a
batch is drawn from the whole store: the order of an epoch is a permutation of all rows that is computed
entry by entry, so that it takes no memory, and any position in the stream of batches can be resumed.
"""

from __future__ import annotations

import errno
import itertools
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from asi_lens import models, shards
from asi_lens.corpora import Tokens
from asi_lens.errors import CacheError, DataError, OptionError, require
from asi_lens.files import cache_key
from asi_lens.harvest import BATCH_TOKENS, SiteLayer, harvest, pairs
from asi_lens.moments import Moments
from asi_lens.paths import cache_dir
from asi_lens.spectra import Spectrum

# Bytes of a shard unless `shard_tokens` says otherwise: what a kill can cost, and a moderate number of files.
_SHARD_BYTES = 128 * 2**20
_CHUNK = 8192
# A permutation's key is (this, seed, epoch): training order and `sample` never coincide.
_TRAINING, _SAMPLE = 0, 1
# Origin keys that make two stores the same rows.
_IDENTITY = ("weights_fingerprint", "model_dtype", "hook_name", "layer", "tokens_fingerprint", "drop_first")


class ActivationStore:
    """Rows `[n d]` of one site, in order of the tokens they belong to.

    Attributes:
        n: rows (tokens).
        d: width.
        dtype: of the stored rows.
        mean: mean row, float64 `[d]`.
        scale: what centred rows are multiplied by so that their mean square norm is d.
        metadata: where the rows come from (model, site, hook_name, layer, corpus, context ...).
        folder: where they lie, None in memory.
    """

    def __init__(
        self,
        rows: Sequence[Float[Tensor, "n_i d"]],
        moments: Callable[[], Moments],
        mean: Float[Tensor, " d"],
        mean_square_norm: float,
        metadata: Mapping[str, Any],
        folder: Path | None = None,
    ):
        self._rows = list(rows)
        self._bounds = list(itertools.accumulate((len(part) for part in rows), initial=0))
        self._moments = moments
        self.n: int = self._bounds[-1]
        self.d: int = rows[0].shape[1]
        self.dtype = rows[0].dtype
        self.mean = mean
        self.mean_square_norm = mean_square_norm
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata))
        self.folder = folder

    @classmethod
    def open(
        cls,
        folder: Path | str,
        model: nn.Module | str | None = None,
        site: str | None = None,
        layer: int | None = None,
    ) -> ActivationStore:
        """The store in `folder`; given `model` (or its name), `site` or `layer`, it must hold just that.

        Sizes are checked here, contents by `verify`. Raises OptionError for a store of something else,
        DataError for one that is not finished, CacheError for a shard that is missing or cut off or for an
        unknown format, FileNotFoundError where there is none.
        """
        folder = Path(folder)
        manifest = shards.Manifest.read(folder)
        _require_origin(folder, manifest.origin, model, site, layer)
        return cls(
            shards.open_shards(folder, manifest),
            lambda: shards.read_moments(folder),
            torch.tensor(manifest.mean, dtype=torch.float64),
            manifest.mean_square_norm,
            manifest.origin,
            folder,
        )

    @classmethod
    def from_tensor(
        cls,
        rows: Float[Tensor, "n d"] | np.ndarray | Path | str,
        metadata: Mapping[str, Any] | None = None,
    ) -> ActivationStore:
        """A store of rows in memory, or of a `.npy` file, which is mapped, not loaded.

        They are read once for their moments. Raises DataError for rows that are not a matrix of floating
        point numbers, or where one is NaN or infinite (naming the row).
        """
        origin = dict(metadata or {})
        if isinstance(rows, str | Path):
            path = Path(rows)
            require(path.suffix == ".npy", "rows", str(rows), "a tensor, an array or a `.npy` file")
            try:
                # Mapped copy-on-write: torch warns of memory that it must not write to.
                rows = np.load(path, mmap_mode="c", allow_pickle=False)
            except ValueError as error:
                raise DataError(f"{path} is not a `.npy` file of plain numbers: {error}") from error
            origin.setdefault("file", path.name)
        if isinstance(rows, np.ndarray):
            try:
                rows = torch.from_numpy(rows)
            except (TypeError, ValueError) as error:
                raise DataError(f"rows of {rows.dtype} cannot be used: {error}") from error
        if not isinstance(rows, Tensor) or rows.ndim != 2 or 0 in rows.shape:
            shape = tuple(getattr(rows, "shape", ()))
            raise DataError(f"rows must be a matrix [n d] with at least one row, not of shape {shape}")
        if not rows.is_floating_point():
            raise DataError(f"rows must be floating point numbers, not {rows.dtype}")
        rows = rows.detach()
        moments = Moments.zeros(rows.shape[1], rows.device)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            bad = ~torch.isfinite(part).all(1)
            if bad.any():
                raise DataError(f"row {start + int(bad.nonzero()[0])} holds NaN or infinity")
            moments.update(part)
        square = moments.scatter.diagonal().sum().item() / moments.n
        return cls([rows], lambda: moments, moments.mean.cpu(), square, origin)

    @cached_property
    def scale(self) -> float:
        """sqrt(d / mean ||row - mean||^2). Raises DataError where the rows never vary."""
        if not self.mean_square_norm > 0:
            raise DataError("the rows never vary: they have no scale")
        return math.sqrt(self.d / self.mean_square_norm)

    @cached_property
    def moments(self) -> Moments:
        """Count, mean and scatter of all rows, float64."""
        return self._moments()

    @cached_property
    def spectrum(self) -> Spectrum:
        """Spectrum of the stored rows, which ASI can start from."""
        site, layer = self.metadata.get("site"), self.metadata.get("layer")
        return Spectrum.from_moments(self.moments, name="" if site is None else f"{site} {layer}")

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.n * self.d * self.dtype.itemsize

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        what = "{site} of layer {layer} of {model}".format_map(_Gaps(self.metadata))
        where = self.folder or "memory"
        return f"ActivationStore({self.n:,} x {self.d} {str(self.dtype)[6:]}, {what}, in {where})"

    def verify(self) -> None:
        """Compare every file with its checksum. Raises CacheError naming one that was changed."""
        if self.folder is not None:
            shards.verify_checksums(self.folder, shards.Manifest.read(self.folder))

    def in_order(self, batch_size: int) -> Iterator[Float[Tensor, "batch d"]]:
        """All rows once, in order, in the store's dtype: views of the files, not copies.

        A batch ends with its shard, so some are smaller.
        """
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        return (part for rows in self._rows for part in rows.split(batch_size))

    def rows(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
        """The rows at `index`, in its order, copied. Raises OptionError for one that does not exist."""
        if len(index) and not (0 <= int(index.min()) and int(index.max()) < self.n):
            raise OptionError(f"rows are 0 to {self.n - 1}, not {int(index.min())} to {int(index.max())}")
        return self._gather(index)

    def _gather(
        self, index: Int[Tensor, " batch"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "batch d"]:
        # Sorted, so that each file is walked through once and from its beginning to its end.
        ordered, order = index.sort()
        cuts = torch.searchsorted(ordered, torch.tensor(self._bounds)).tolist()
        device = self._rows[0].device
        found = torch.empty(len(index), self.d, dtype=self.dtype, device=device)
        for part, base, (low, high) in zip(self._rows, self._bounds, itertools.pairwise(cuts), strict=False):
            if low < high:
                torch.index_select(part, 0, (ordered[low:high] - base).to(device), out=found[low:high])
        out = torch.empty(len(index), self.d, dtype=dtype or self.dtype, device=device)
        out[order.to(device)] = found.to(out.dtype)
        return out

    def positions(self, index: Int[Tensor, " batch"]) -> Int[Tensor, "batch 2"]:
        """(sequence, position) in the harvested tokens of the rows at `index`.

        Raises OptionError for a store that was not harvested from tokens.
        """
        if "context" not in self.metadata or "drop_first" not in self.metadata:
            raise OptionError("this store was not harvested from tokens: its rows have no positions")
        first = int(self.metadata["drop_first"])
        kept = int(self.metadata["context"]) - first
        return torch.stack([index // kept, index % kept + first], dim=1)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        n_tokens: int | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> Iterator[Float[Tensor, "batch d"]]:
        """The stream of shuffled rows, from position `start` up to position `n_tokens` (None: endless).

        Each epoch holds every row once, in an order of its own that mixes the whole store. Position p of the
        stream is the same row for every batch size, so a stream resumed with `start` at the rows consumed
        goes on as if it had not stopped. The last batch before `n_tokens` may be smaller.

        Args:
            dtype: of the batches; None leaves the store's.
        """
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        require(start >= 0, "start", start, "at least 0")
        require(seed >= 0, "seed", seed, "at least 0")
        require(
            n_tokens is None or n_tokens >= start, "n_tokens", n_tokens, f"None or at least start={start}"
        )
        return self._stream(batch_size, seed, start, n_tokens, dtype)

    def _stream(
        self, batch_size: int, seed: int, start: int, n_tokens: int | None, dtype: torch.dtype | None
    ) -> Iterator[Float[Tensor, "batch d"]]:
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
            yield self._gather(torch.from_numpy(np.concatenate(index)), dtype)

    def sample(self, n: int, seed: int = 0) -> Float[Tensor, "n d"]:
        """`n` different rows drawn at random, float32. Raises OptionError for more rows than there are."""
        require(1 <= n <= self.n, "n", n, f"from 1 to {self.n}")
        require(seed >= 0, "seed", seed, "at least 0")
        index = Permutation(self.n, _SAMPLE, seed)(np.arange(n))
        return self._gather(torch.from_numpy(index), torch.float32)


class Permutation:
    """A random permutation of 0 ... n-1 that is computed entry by entry.

    A Feistel network over pairs (a, b) of a grid of at least n cells: each round adds a hash of one half to
    the other, which can be undone, so all rounds together are a permutation of the cells. A cell beyond n is
    sent through again until it is not (cycle walking); there are fewer than sqrt(n) + 1 of them. Nothing of
    size n is ever held.
    """

    _ROUNDS = 6

    def __init__(self, n: int, *key: int):
        self.n = n
        self._a = np.uint64(math.isqrt(n - 1) + 1)
        self._b = np.uint64(-(-n // int(self._a)))
        self._keys = np.random.SeedSequence(key or (0,)).generate_state(self._ROUNDS, np.uint64)

    def __call__(self, index: Int[np.ndarray, " batch"]) -> Int[np.ndarray, " batch"]:
        """Where 0 <= index < n go, int64."""
        out = self._once(index.astype(np.uint64))
        while (beyond := out >= self.n).any():
            out[beyond] = self._once(out[beyond])
        return out.astype(np.int64)

    def _once(self, cell: np.ndarray) -> np.ndarray:
        a, b = cell // self._b, cell % self._b
        for k, key in enumerate(self._keys):
            if k % 2 == 0:
                a = (a + _hash(b, key) % self._a) % self._a
            else:
                b = (b + _hash(a, key) % self._b) % self._b
        return a * self._b + b


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014) on x xor key; arrays wrap modulo 2^64."""
    x = (x ^ key) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def harvest_store(
    model: nn.Module,
    tokens: Tokens,
    site: str,
    layer: int,
    *,
    folder: Path | str | None = None,
    **options: Any,
) -> ActivationStore:
    """Store one site's activations in `folder` (None: in the cache, under a key of all they depend on).

    A folder that already holds these rows is opened. For `options` and errors see `harvest_stores`.
    """
    (where,) = pairs(model, [site], [layer])
    folders = None if folder is None else {where: Path(folder)}
    return _harvest(model, tokens, [where], folders, **options)[where]


def harvest_stores(
    model: nn.Module,
    tokens: Tokens,
    wheres: Sequence[SiteLayer],
    *,
    folder: Path | str | None = None,
    **options: Any,
) -> dict[SiteLayer, ActivationStore]:
    """Store several (site, layer) pairs in one pass of the model, each in `folder/site.layer`.

    The size is stated before anything is written. A harvest that was killed goes on at the last whole
    shard, to the same bytes; one that is complete is opened.

    Options:
        dtype: "bfloat16" (default), "float16" or "float32", of the rows on disk.
        budget_gb: refuse to write more than this many 10^9 bytes (default 20).
        shard_tokens: rows of a shard, rounded to whole forward batches (default: 128 MiB).
        drop_first: leave out position 0 of every sequence (default; see `harvest.harvest`).
        batch_tokens: tokens of a forward pass.
        progress: show a bar.

    Raises OptionError over the budget (it says both numbers) and for a folder that holds another store,
    DataError for activations that are NaN, infinite or too large for the dtype, CacheError while another
    process writes the same store or for damaged files, OSError for a full disk or a read-only folder.
    """
    chosen = list(dict.fromkeys(pairs(model, [site], [layer])[0] for site, layer in wheres))
    if not chosen:
        raise OptionError("no (site, layer) was asked for")
    parent = None if folder is None else Path(folder)
    folders = None if parent is None else {where: parent / f"{where[0]}.{where[1]}" for where in chosen}
    return _harvest(model, tokens, chosen, folders, **options)


def _harvest(
    model: nn.Module,
    tokens: Tokens,
    wheres: Sequence[SiteLayer],
    folders: Mapping[SiteLayer, Path] | None,
    *,
    dtype: str = "bfloat16",
    budget_gb: float = 20.0,
    shard_tokens: int | None = None,
    drop_first: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool = True,
) -> dict[SiteLayer, ActivationStore]:
    require(dtype in shards.DTYPES, "dtype", dtype, " or ".join(map(repr, shards.DTYPES)))
    require(budget_gb > 0, "budget_gb", budget_gb, "above 0")
    require(shard_tokens is None or shard_tokens >= 1, "shard_tokens", shard_tokens, "at least 1")
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "at least 1")
    origins = _origins(model, tokens, wheres, drop_first)
    if folders is None:
        folders = {where: _cached(origins[where], dtype) for where in wheres}
    per_sequence = tokens.context - drop_first
    n = len(tokens) * per_sequence
    if n == 0:
        raise DataError("no tokens to store (position 0 of a sequence is dropped unless drop_first=False)")
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    # Shards of whole forward batches: a pass that resumes cuts the text into the same batches.
    batch_rows = max(1, batch_tokens // tokens.context) * per_sequence
    with ExitStack() as stack:
        writers: dict[SiteLayer, shards.ShardWriter] = {}
        for where in wheres:
            stack.enter_context(_alone(folders[where]))
            if (folders[where] / shards.MANIFEST).exists():
                _require_same(folders[where], origins[where], dtype)
                continue
            d = models.site_width(model, *where)
            rows = shard_tokens or _SHARD_BYTES // (d * size)
            writers[where] = shards.ShardWriter(
                folders[where],
                {**origins[where], "batch_tokens": batch_tokens},
                n_total=n,
                d=d,
                dtype=dtype,
                shard_rows=max(1, rows // batch_rows) * batch_rows,
            )
        if writers:
            _state_size(writers, folders, n * size, dtype, budget_gb)
            for writer in writers.values():
                stack.callback(writer.close)
            start = min(writer.n for writer in writers.values()) // per_sequence
            harvest(
                model,
                tokens,
                [_StoreConsumer(writers, start * per_sequence)],
                batch_tokens=batch_tokens,
                drop_first=drop_first,
                start=start,
                progress=progress,
            )
            for writer in writers.values():
                writer.finish()
    return {where: ActivationStore.open(folders[where]) for where in wheres}


class _StoreConsumer:
    """A harvest consumer that appends to one writer per (site, layer)."""

    def __init__(self, writers: Mapping[SiteLayer, shards.ShardWriter], start: int):
        self.wants = tuple(writers)
        self._writers = writers
        self._seen = dict.fromkeys(writers, start)

    def consume(self, where: SiteLayer, rows: Float[Tensor, "n d"]) -> None:
        """Append one batch, unless a store that got further before a kill already has it."""
        if self._seen[where] == self._writers[where].n:
            self._writers[where].append(rows)
        self._seen[where] += len(rows)


def _origins(
    model: nn.Module, tokens: Tokens, wheres: Sequence[SiteLayer], drop_first: bool
) -> dict[SiteLayer, dict[str, Any]]:
    info = models.model_info(model)
    shared = {
        "model": info.name,
        "weights": info.weights,
        "weights_fingerprint": info.fingerprint,
        "model_dtype": info.dtype,
        "corpus": tokens.corpus,
        "tokenizer": tokens.tokenizer,
        "tokens_fingerprint": tokens.fingerprint,
        "sequences": len(tokens),
        "context": tokens.context,
        "bos": tokens.bos,
        "drop_first": drop_first,
    }
    return {
        (site, layer): {
            **shared,
            "site": site,
            "layer": layer,
            "hook_name": models.hook_name(model, site, layer),
        }
        for site, layer in wheres
    }


def _cached(origin: Mapping[str, Any], dtype: str) -> Path:
    key = cache_key(
        format=shards.FORMAT,
        dtype=dtype,
        **{k: origin[k] for k in _IDENTITY if k not in ("hook_name", "layer")},
    )
    # Names may be paths or hub names: anything but letters, digits, dot and dash would make folders.
    parent = re.sub(r"[^\w.-]+", "-", f"{origin['model']}-{origin['corpus']}-{key}")
    return cache_dir("stores") / parent / f"{origin['site']}.{origin['layer']}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the store's lock, or say at once that another process has it."""
    from filelock import FileLock, Timeout

    path = folder.with_name(folder.name + ".lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise CacheError(f"another process is writing the store in {folder}") from error
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _state_size(
    writers: Mapping[SiteLayer, shards.ShardWriter],
    folders: Mapping[SiteLayer, Path],
    column_bytes: int,
    dtype: str,
    budget_gb: float,
) -> None:
    """Say what will be written, and refuse what is over the budget or the free space."""
    total = sum(column_bytes * writer.d for writer in writers.values())
    missing = sum(column_bytes // w.n_total * w.d * (w.n_total - w.n) for w in writers.values())
    where, writer = next(iter(writers.items()))
    what = f"{where[0]} {where[1]}" if len(writers) == 1 else f"{len(writers)} sites"
    size = f"{total / 1e9:.3g} GB"
    if total > budget_gb * 1e9:
        raise OptionError(
            f"{what}: {writer.n_total:,} rows in {dtype} are {size}, over budget_gb={budget_gb}; take fewer "
            "tokens or sites, or raise budget_gb"
        )
    folder = folders[where]
    free = shutil.disk_usage(next(p for p in folder.parents if p.exists())).free
    if missing > free:
        raise OSError(
            errno.ENOSPC,
            f"{what}: {missing / 1e9:.3g} GB are to be written to {folder}, but {free / 1e9:.3g} GB are free",
        )
    done = f", {1 - missing / total:.0%} there already" if missing < total else ""
    tqdm.write(f"store of {what}: {writer.n_total:,} rows in {dtype}, {size}{done}, in {folder}")


def _require_same(folder: Path, origin: Mapping[str, Any], dtype: str) -> None:
    manifest = shards.Manifest.read(folder)
    asked = {**{key: origin[key] for key in _IDENTITY}, "dtype": dtype}
    there = {**manifest.origin, "dtype": manifest.dtype}
    differ = [
        f"{key} {there.get(key)!r}, not {value!r}" for key, value in asked.items() if there.get(key) != value
    ]
    if differ:
        raise OptionError(
            f"{folder} holds another store: {_describe(manifest.origin)}, asked for {_describe(origin)} "
            f"({'; '.join(differ)}); choose another folder or delete it"
        )


def _require_origin(
    folder: Path,
    origin: Mapping[str, Any],
    model: nn.Module | str | None,
    site: str | None,
    layer: int | None,
) -> None:
    asked: dict[str, Any] = {}
    fits = True
    if isinstance(model, nn.Module):
        info = models.model_info(model)
        asked["model"] = info.name
        fits &= origin.get("weights_fingerprint") == info.fingerprint
    elif model is not None:
        asked["model"] = model
        fits &= origin.get("model") == model
    if site is not None:
        asked["site"] = site
        fits &= site in (origin.get("site"), origin.get("hook_name"))
    if layer is not None:
        asked["layer"] = layer
        fits &= origin.get("layer") == layer
    if not fits:
        same = asked.get("model") == origin.get("model") and isinstance(model, nn.Module)
        other = f" (weights {origin.get('weights_fingerprint')} and {info.fingerprint})" if same else ""
        raise OptionError(f"{folder} holds {_describe(origin)}, not {_describe({**origin, **asked})}{other}")


class _Gaps(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "?"


def _describe(origin: Mapping[str, Any]) -> str:
    return "{site} of layer {layer} of {model} on {corpus}".format_map(_Gaps(origin))
