"""Activation stores on disk from a model and tokens: `harvest_store`, `harvest_stores`.

One pass of the model writes every (site, layer) asked for, each into its own folder. A harvest that was
killed resumes at the last complete shard and ends with the same bytes. Several processes (`ranks.joined`, or
`torchrun -m asi_lens.activations harvest.yaml`) each process one stretch of the text.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from asi_lens.activations import shards
from asi_lens.activations.batch_rows import Given, positions_of, rows_before, shard_rows
from asi_lens.activations.harvest import SiteLayer, batch_tokens_for, harvest, places
from asi_lens.activations.shard_writer import Appending, ShardWriter, join_parts
from asi_lens.activations.store import ActivationStore
from asi_lens.base.doors import checked
from asi_lens.base.errors import CacheError, DataError, OptionError, require
from asi_lens.base.files import cache_key, file_name, locked
from asi_lens.base.metadata import plain_metadata
from asi_lens.base.paths import cached
from asi_lens.base.ranks import Ranks
from asi_lens.inputs import models
from asi_lens.inputs.fingerprint import is_fixed, number_key

__all__ = ["ActivationStore", "harvest_store", "harvest_stores"]

# Bytes of a shard if `shard_tokens` is None: a kill loses at most one shard, and the files are not too many.
_SHARD_BYTES = 128 * 2**20
# Two stores of one format and dtype hold the same rows if these fields agree.
_CONTENT = ("weights_fingerprint", "model_dtype", "tokens_fingerprint", "drop_first", "drop_massive")
_IDENTITY = (*_CONTENT, "hook_name", "layer")


@checked
def harvest_store(
    model: nn.Module,
    tokens: Given,
    site: str,
    layer: int,
    *,
    folder: Path | str | None = None,
    dtype: str = "bfloat16",
    budget_gb: int | float = 20,
    shard_tokens: int | None = None,
    drop_first: bool = True,
    drop_massive: bool = True,
    batch_tokens: int | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> ActivationStore:
    """Store one site's activations in `folder`; returns the store. All else is as in `harvest_stores`."""
    (where,) = places(model, [site], [layer])
    return _harvest(
        model,
        tokens,
        {where: None if folder is None else Path(folder)},
        dtype=dtype,
        budget_gb=budget_gb,
        shard_tokens=shard_tokens,
        drop_first=drop_first,
        drop_massive=drop_massive,
        batch_tokens=batch_tokens,
        progress=progress,
        ranks=ranks or Ranks(),
    )[where]


@checked
def harvest_stores(
    model: nn.Module,
    tokens: Given,
    wheres: Sequence[SiteLayer],
    *,
    folder: Path | str | None = None,
    dtype: str = "bfloat16",
    budget_gb: int | float = 20,
    shard_tokens: int | None = None,
    drop_first: bool = True,
    drop_massive: bool = True,
    batch_tokens: int | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> dict[SiteLayer, ActivationStore]:
    """Store several (site, layer) places in one pass of the model, each in `folder/site.layer`.

    Returns the stores by (site, layer). Existing stores are opened; the model runs only for missing stores.
    The size is printed before anything is written.

    Args:
        folder: None writes the stores to the cache, under a key of everything that their rows depend on (not
            allowed while hooks that somebody added to the model are in force). If another process is writing
            the same stores there, this process waits for it. Several `ranks` do not wait: RankError.
        dtype: dtype of the rows on disk: "bfloat16", "float16" or "float32".
        budget_gb: refuse to write more than this many 10^9 bytes.
        shard_tokens: rows of a shard, rounded to whole forward batches (None: 128 MiB).
        drop_first: leave out position 0 of every sequence of tokens (see `harvest.harvest`).
        drop_massive: leave out rows with massive activations (`massive`). The store's metadata states how
            many (`left_out`), and `ActivationStore.left_out` which tokens.
        batch_tokens: tokens of a forward pass; None for a number that suits the device.
        progress: show a bar.
        ranks: the processes that call this function together. Each runs the model over its stretch of the
            tokens; the first writes moments and manifest. All processes must see the same folder.

    Raises OptionError over the budget (the message states both sizes) and for a folder that holds another
    store, DataError for activations that are NaN, infinite or too large for the dtype, CacheError while
    another process writes to `folder` and for damaged files, OSError for a full disk or a read-only folder.
    """
    chosen = [places(model, [site], [layer])[0] for site, layer in wheres]
    return _harvest(
        model,
        tokens,
        {at: None if folder is None else Path(folder) / f"{at[0]}.{at[1]}" for at in chosen},
        dtype=dtype,
        budget_gb=budget_gb,
        shard_tokens=shard_tokens,
        drop_first=drop_first,
        drop_massive=drop_massive,
        batch_tokens=batch_tokens,
        progress=progress,
        ranks=ranks or Ranks(),
    )


def _harvest(
    model: nn.Module,
    tokens: Given,
    chosen: Mapping[SiteLayer, Path | None],
    *,
    dtype: str,
    budget_gb: int | float,
    shard_tokens: int | None,
    drop_first: bool,
    drop_massive: bool,
    batch_tokens: int | None,
    progress: bool,
    ranks: Ranks,
) -> dict[SiteLayer, ActivationStore]:
    batch_tokens = batch_tokens_for(model, batch_tokens)
    _check(dtype, budget_gb, shard_tokens, batch_tokens)
    require(len(chosen) > 0, "wheres", [], "one or more (site, layer)")
    before = rows_before(tokens, drop_first)
    if before[-1] == 0:
        raise DataError(
            f"no rows to store from {len(tokens)} sequences of {tokens.context} with drop_first={drop_first}"
        )
    origins = _origins(model, tokens, list(chosen), drop_first, drop_massive)
    folders = {where: folder or _cached(origins[where], dtype) for where, folder in chosen.items()}
    size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
    # Shards hold whole forward batches: a pass that resumes cuts the text into the same batches.
    per_batch = max(1, batch_tokens // tokens.context)
    first, last = _stretch(len(tokens), per_batch, ranks)
    with ExitStack() as stack:
        writers: dict[SiteLayer, ShardWriter] = {}

        def begin() -> None:
            for where, folder in folders.items():
                if (folder / shards.MANIFEST).exists():
                    _require_same(folder, origins[where], dtype)
                    continue
                d = models.site_width(model, *where)
                rows = shard_tokens or _SHARD_BYTES // (d * size)
                own = folder if ranks.size == 1 else shards.part_folder(folder, ranks.rank)
                own.mkdir(parents=True, exist_ok=True)
                _require_begun_so(folder, own)
                writers[where] = ShardWriter(
                    own,
                    {**origins[where], "batch_tokens": batch_tokens},
                    n_total=before[last] - before[first],
                    d=d,
                    dtype=dtype,
                    shard_rows=shard_rows(tokens, before[first : last + 1], per_batch, rows),
                    first=before[first],
                )
                stack.callback(writers[where].close)
            if writers:
                _state_size(writers, before[-1], size, budget_gb, ranks)

        # All ranks look for finished stores after rank 0 has the locks, so all find the same ones.
        ranks.together("locking the stores", lambda: _lock(stack, folders, chosen, ranks))
        ranks.together("beginning the harvest", begin)
        if writers:
            start = min(writer.n for writer in writers.values())
            appending = Appending(writers, start)
            harvest(
                model,
                tokens[:last],
                [appending],
                batch_tokens=batch_tokens,
                drop_first=drop_first,
                drop_massive=drop_massive,
                left_out=appending.leave_out,
                start=before.index(before[first] + start),
                after_batch=lambda done: ranks.advance(),
                progress=progress and ranks.rank == 0,
            )
            ranks.exchange("the harvest", "", patient=True)
            ranks.together("finishing the store", lambda: _finish(writers, folders, ranks))
    return {where: ActivationStore.open(folder) for where, folder in folders.items()}


def _lock(
    stack: ExitStack,
    folders: Mapping[SiteLayer, Path],
    chosen: Mapping[SiteLayer, Path | None],
    ranks: Ranks,
) -> None:
    # Locks are taken in sorted order, so that two harvests never wait for each other. Finished stores are not
    # locked: they may be in a read-only cache.
    for where in sorted(folders, key=folders.__getitem__):
        if ranks.rank == 0 and not (folders[where] / shards.MANIFEST).exists():
            busy = CacheError(f"another process is writing the store in {folders[where]}")
            # Cached stores are shared between processes: the second process waits for the first.
            waits = chosen[where] is None and ranks.size == 1
            stack.enter_context(locked(folders[where], None if waits else busy))


def _finish(
    writers: Mapping[SiteLayer, ShardWriter], folders: Mapping[SiteLayer, Path], ranks: Ranks
) -> None:
    for where, writer in writers.items():
        if ranks.size == 1:
            writer.finish()
        elif ranks.rank == 0:
            join_parts(folders[where], writer.origin, ranks.size)


def _check(dtype: str, budget_gb: int | float, shard_tokens: int | None, batch_tokens: int) -> None:
    require(dtype in shards.DTYPES, "dtype", dtype, " or ".join(map(repr, shards.DTYPES)))
    require(budget_gb > 0, "budget_gb", budget_gb, "above 0")
    require(shard_tokens is None or shard_tokens >= 1, "shard_tokens", shard_tokens, "at least 1")
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "at least 1")


def _stretch(n: int, per_batch: int, ranks: Ranks) -> tuple[int, int]:
    """Return the first sequence of this rank and the sequence after its last, in whole forward batches.

    Raises OptionError for fewer batches than ranks.
    """
    n_batches = -(-n // per_batch)
    if n_batches < ranks.size:
        raise OptionError(
            f"{n} sequences make {n_batches} forward batches of {per_batch}, but {ranks.size} processes need "
            "at least one each; use fewer processes or a smaller batch_tokens"
        )
    first, last = (min(n, n_batches * k // ranks.size * per_batch) for k in (ranks.rank, ranks.rank + 1))
    return first, last


def _require_begun_so(folder: Path, own: Path) -> None:
    """Raise OptionError if one process began the harvest in `folder` and several continue it, or reversed."""
    there = shards.unfinished(folder)
    if folder in there if own != folder else there and folder not in there:
        raise OptionError(
            f"{folder} holds the beginning of a harvest by "
            f"{'one process' if folder in there else 'several processes'}; finish it so, or delete the folder"
        )


def _origins(
    model: nn.Module, tokens: Given, wheres: Sequence[SiteLayer], drop_first: bool, drop_massive: bool
) -> dict[SiteLayer, dict[str, Any]]:
    """Return the manifest's `origin` for each store: model, tokens, site and layer of its rows."""
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
        **positions_of(tokens),
        "drop_first": drop_first,
        "drop_massive": drop_massive,
    }
    own = {
        where: {"site": where[0], "layer": where[1], "hook_name": models.hook_name(model, *where)}
        for where in wheres
    }
    # Values that no manifest can hold are found here, before a shard is written.
    return {where: plain_metadata({**shared, **parts}) for where, parts in own.items()}


def _cached(origin: Mapping[str, Any], dtype: str) -> Path:
    weights, model_dtype, tokens, drop_first, drop_massive = (origin[name] for name in _CONTENT)
    if not is_fixed(weights):
        raise OptionError(
            "folder=None is not allowed while hooks that somebody added to the model are in force: no cache "
            "key covers their code; name a folder"
        )
    options = {"format": shards.FORMAT, "store_dtype": dtype, "drop_first": drop_first}
    if drop_massive:  # left out where False: keeps the keys of stores from before this option existed
        options["drop_massive"] = True
    key = cache_key(**number_key(weights, model_dtype, tokens, **options))
    parent = file_name(origin["model"], origin["corpus"], key=key)
    return cached("stores", f"{parent}/{origin['site']}.{origin['layer']}", shards.MANIFEST)


def _state_size(
    writers: Mapping[SiteLayer, ShardWriter], n: int, size: int, budget_gb: int | float, ranks: Ranks
) -> None:
    """Print what will be written. Raises OptionError over the budget, OSError over the free space."""
    total = sum(n * writer.d * size for writer in writers.values())
    # An estimate: the other processes have written about as many rows as this process.
    left = sum((n - writer.n * ranks.size) * writer.d * size for writer in writers.values())
    (where, first), *others = writers.items()
    what = f"{len(writers)} sites" if others else f"{where[0]} {where[1]}"
    what += f", {n:,} rows in {first.dtype}"
    if total > budget_gb * 1e9:
        raise OptionError(
            f"{what}: {total / 1e9:.3g} GB, over budget_gb={budget_gb}; take fewer tokens or sites, or raise "
            "budget_gb"
        )
    free = shutil.disk_usage(first.folder).free
    if left > free:
        raise OSError(
            errno.ENOSPC,
            f"{what}: {left / 1e9:.3g} GB are to be written to {first.folder}, {free / 1e9:.3g} GB are free",
        )
    done = f", {1 - left / total:.0%} there already" if left < total else ""
    if ranks.rank == 0:
        tqdm.write(f"store of {what}: {total / 1e9:.3g} GB{done}, in {first.folder}")


def _require_same(folder: Path, origin: Mapping[str, Any], dtype: str) -> None:
    manifest = shards.Manifest.read(folder)
    asked = {**{key: origin[key] for key in _IDENTITY}, "dtype": dtype}
    # Stores from before `drop_massive` existed hold all rows.
    differ = shards.differences({"drop_massive": False, **manifest.origin, "dtype": manifest.dtype}, asked)
    if differ:
        raise OptionError(
            f"{folder} holds {shards.describe(manifest.origin)}, not {shards.describe(origin)} ({differ}); "
            "choose another folder or delete it"
        )
