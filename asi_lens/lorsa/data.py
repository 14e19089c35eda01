"""Data of a Lorsa: inputs and outputs of an attention layer, in whole sequences.

Position 0 of a sequence (BOS, the attention sink) is kept, because later positions attend to it. Statistics,
losses and counts leave it out; the other positions are "the positions that count".
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from asi_lens.activations.ahead import copied, moved, pinned, read_ahead
from asi_lens.activations.harvest import SiteLayer, harvest
from asi_lens.activations.harvest_store import harvest_stores
from asi_lens.activations.moments import Moments
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, require
from asi_lens.base.permutation import Permutation
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.lorsa.attention import READ_SITE, origin, write_site


@dataclass(frozen=True)
class PairBatch:
    """Inputs x and outputs y of the same sequences, in raw units. The length is the number of positions that
    count."""

    x: Float[Tensor, "batch position d"]
    y: Float[Tensor, "sequences positions d_out"]

    def __len__(self) -> int:
        return self.x.shape[0] * (self.x.shape[1] - 1)


@checked
class SequencePairs:
    """Inputs and outputs [sequence position d] of one attention layer, in memory.

    `pairs[a:b]` are sequences a to b, without a copy. Raises DataError for shapes that do not fit, or for a
    context of 1 (position 0 alone, which does not count).
    """

    def __init__(
        self,
        inputs: Tensor,
        outputs: Tensor,
        metadata: Mapping[str, Any] | None = None,
    ):
        if inputs.shape != outputs.shape or inputs.ndim != 3 or inputs.numel() == 0 or inputs.shape[1] < 2:
            raise DataError(
                f"inputs have shape {tuple(inputs.shape)} and outputs {tuple(outputs.shape)}; both must be "
                "[sequence position d] with at least 2 positions"
            )
        self.inputs, self.outputs = inputs, outputs
        self.d = inputs.shape[2]
        """Width of inputs and outputs."""
        self.metadata: dict[str, Any] = dict(metadata or {})

    def __len__(self) -> int:
        """Number of sequences."""
        return self.inputs.shape[0]

    def __getitem__(self, part: slice) -> SequencePairs:
        return SequencePairs(self.inputs[part], self.outputs[part], self.metadata)

    @property
    def context(self) -> int:
        """Positions of a sequence, position 0 included."""
        return self.inputs.shape[1]

    @property
    def n(self) -> int:
        """Number of positions that count, over all sequences."""
        return len(self) * (self.context - 1)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the data: a hash of the means and variances of both sides."""
        digest = hashlib.sha256(f"{len(self)} {self.context}".encode())
        for moments in (self.input_moments, self.output_moments):
            digest.update(moments.mean.cpu().numpy().tobytes())
            digest.update(moments.scatter.diagonal().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def blocks(self, n_sequences: int) -> Iterator[PairBatch]:
        """Yield all sequences once, in order, `n_sequences` at a time."""
        require(n_sequences >= 1, "n_sequences", n_sequences, "at least 1")
        sides = (self.inputs.split(n_sequences), self.outputs.split(n_sequences))
        return itertools.starmap(PairBatch, zip(*sides, strict=True))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        n_tokens: int | None = None,
        device: torch.device | None = None,
    ) -> Iterator[PairBatch]:
        """Yield shuffled batches from position `start` of the stream to `n_tokens` (None: without end).

        `batch_size`, `start` and `n_tokens` count positions. A batch holds as many whole sequences as fit,
        the last batch too, and may reach from an epoch into the next. Each epoch has its own order, drawn
        from `seed`. Batches are copied ahead to `device`, if it is given. Raises OptionError for a batch
        smaller than a sequence, or a start between batches.
        """
        each = self.context - 1
        require(seed >= 0, "seed", seed, "at least 0")
        require(
            batch_size >= each,
            "batch_size",
            batch_size,
            f"at least {each}, the positions of a sequence that count",
        )
        n_sequences = batch_size // each
        require(start % (n_sequences * each) == 0, "start", start, f"a multiple of {n_sequences * each}")
        last = None if n_tokens is None else -(-n_tokens // each)

        def read(chosen: Int[Tensor, " batch"]) -> PairBatch:
            at = chosen.to(self.inputs.device)
            return PairBatch(pinned(self.inputs[at], device), pinned(self.outputs[at], device))

        order = self._order(n_sequences, seed, start // each, last)
        x, y = (copied([side], device) for side in (self.inputs, self.outputs))
        if x is not None and y is not None:
            for at in order:
                at = moved(pinned(at, device), device)
                yield PairBatch(x[at], y[at])
            return
        del x, y  # a copy of one side would only take memory
        for found in read_ahead(read, order):
            yield PairBatch(moved(found.x, device), moved(found.y, device))

    def _order(self, size: int, seed: int, first: int, last: int | None) -> Iterator[Int[Tensor, " batch"]]:
        """Yield the numbers of the sequences of each batch, from place `first` of the stream to `last`."""
        n = len(self)
        while last is None or first < last:
            places = np.arange(first, first + size)
            index = np.empty_like(places)
            for epoch in np.unique(places // n):
                inside = places // n == epoch
                index[inside] = Permutation(n, seed, int(epoch))(places[inside] % n)
            yield torch.from_numpy(index)
            first += size

    @cached_property
    def input_moments(self) -> Moments:
        """Moments of the inputs at the positions that count. Raises DataError for NaN or infinity."""
        return _moments(self.inputs)

    @cached_property
    def output_moments(self) -> Moments:
        """Moments of the outputs at the positions that count. Raises DataError for NaN or infinity."""
        return _moments(self.outputs)


@checked
def harvest_pairs(
    model: nn.Module,
    tokens: Tokens,
    layer: int,
    *,
    dtype: str | torch.dtype = "float32",
    batch_tokens: int | None = None,
    progress: bool = True,
) -> SequencePairs:
    """Run the model once and return the inputs and outputs of the attention of `layer`, in memory.

    Outputs are taken before any norm that follows the layer. The result holds 2 * tokens * d_model numbers of
    `dtype` ("bfloat16" halves the memory, "auto" takes the machine's fast dtype). Raises as `harvest` and
    `models.hook_name` do.
    """
    read = models.hook_name(model, READ_SITE, layer)
    d = int(models.model_info(model, fingerprint=False).d_model)
    kept = _Kept(
        (read, layer),
        (write_site(model, layer), layer),
        torch.empty(2, tokens.ids.numel(), d, dtype=models.resolve_dtype(dtype, torch.device("cpu"))),
    )
    whole: dict[str, Any] = {"drop_first": False, "drop_massive": False}
    harvest(model, tokens, [kept], batch_tokens=batch_tokens, progress=progress, **whole)
    inputs, outputs = kept.rows.unflatten(1, (len(tokens), tokens.context))
    about = {**origin(model, layer), "corpus": tokens.corpus, "tokens": tokens.fingerprint}
    return SequencePairs(inputs, outputs, about)


@checked
def stored_pairs(
    model: nn.Module,
    tokens: Tokens,
    layer: int,
    *,
    budget_gb: int | float = 20,
    progress: bool = True,
) -> SequencePairs:
    """Return the same data as `harvest_pairs`, read from bfloat16 stores in the cache.

    Stores that are missing are harvested and written first.

    Raises as `harvest_stores` and `models.hook_name` do.
    """
    wheres = ((models.hook_name(model, READ_SITE, layer), layer), (write_site(model, layer), layer))
    whole: dict[str, Any] = {"drop_first": False, "drop_massive": False}
    stores = harvest_stores(model, tokens, wheres, budget_gb=budget_gb, progress=progress, **whole)
    inputs, outputs = (
        torch.cat(list(stores[where].in_order(8192))).view(len(tokens), tokens.context, -1)
        for where in wheres
    )
    about = {**origin(model, layer), "corpus": tokens.corpus, "tokens": tokens.fingerprint}
    return SequencePairs(inputs, outputs, about)


class _Kept:
    """Consumer that writes the rows of two sites side by side into one array."""

    def __init__(self, read: SiteLayer, write: SiteLayer, rows: Float[Tensor, "2 n d"]):
        self.wants = (read, write)
        self.rows = rows
        self._at = [0, 0]

    def consume(self, where: SiteLayer, rows: Float[Tensor, "n d"]) -> None:
        """See `harvest.Consumer`."""
        side = self.wants.index(where)
        start = self._at[side]
        self._at[side] = start + len(rows)
        self.rows[side, start : self._at[side]] = rows


def _moments(sequences: Float[Tensor, "sequence position d"]) -> Moments:
    """Return the moments of all positions but the first, with products in float64."""
    moments = Moments.zeros(sequences.shape[2], sequences.device)
    for block in sequences.split(math.ceil(8192 / sequences.shape[1])):
        moments.update(block[:, 1:].flatten(0, 1).double())
    return moments
