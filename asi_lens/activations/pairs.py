"""Two stores of the same tokens, row by row: the inputs and the target outputs of a transcoder."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Num
from torch import Tensor

from asi_lens.activations.harvest_store import ActivationStore
from asi_lens.activations.moments import Moments
from asi_lens.activations.shaped import LinearStore
from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.doors import checked
from asi_lens.base.errors import OptionError, require

# Fields that agree in two stores of the same tokens of the same model.
_SHARED = ("model", "weights_fingerprint", "tokens_fingerprint", "drop_first")


@checked
@dataclass(frozen=True)
class Pair:
    """Raw inputs and outputs of the same tokens; the length is the number of tokens."""

    x: Num[Tensor, "batch d_in"]
    y: Num[Tensor, "n d_out"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, part: slice) -> Pair:
        return Pair(self.x[part], self.y[part])

    def split(self, n: int) -> Iterator[Pair]:
        """Yield the tokens in order, `n` at a time, as `Tensor.split` does with rows."""
        require(n >= 1, "n", n, "at least 1")
        return (Pair(x, y) for x, y in zip(self.x.split(n), self.y.split(n), strict=True))


@checked
class PairedStores:
    """Two stores of the same tokens, row by row: the inputs and the target outputs of a transcoder.

    Attributes:
        inputs, outputs: the stores. n: tokens. d, d_out: widths. metadata: origin of the outputs; its key
            `reads` holds site, layer and hook name of the inputs.
    """

    def __init__(self, inputs: ActivationStore, outputs: ActivationStore):
        """Pair two stores. Tokens that one store left out (massive activations) are left out of both.

        Raises OptionError for stores of different length, model or text.
        """
        for key in _SHARED:
            mine, theirs = inputs.metadata.get(key), outputs.metadata.get(key)
            if mine != theirs:
                raise OptionError(
                    f"the outputs have {key} {theirs!r}, but the inputs have {key} {mine!r}; they must agree"
                )
        inputs, outputs = without(inputs, outputs.left_out), without(outputs, inputs.left_out)
        require(inputs.n == outputs.n, "outputs", f"{outputs.n:,} rows", f"{inputs.n:,} rows, as the inputs")
        self.inputs, self.outputs = inputs, outputs
        self.n, self.d, self.d_out = inputs.n, inputs.d, outputs.d
        of_inputs = {key: inputs.metadata.get(key) for key in ("site", "layer", "hook_name")}
        self.metadata: Mapping[str, Any] = {**outputs.metadata, "reads": of_inputs}

    def __len__(self) -> int:
        return self.n

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the rows of either store."""
        both = self.inputs.fingerprint + self.outputs.fingerprint
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    @property
    def spectrum(self) -> Spectrum:
        """Spectrum of the outputs, which ASI starts from."""
        return self.outputs.spectrum

    @property
    def output_moments(self) -> Moments:
        """Moments of the outputs."""
        return self.outputs.moments

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        n_tokens: int | None = None,
        device: torch.device | None = None,
    ) -> Iterator[Pair]:
        """Batches as of `ActivationStore.batches`, with the same tokens of both stores."""
        options: dict[str, Any] = {"seed": seed, "start": start, "n_tokens": n_tokens, "device": device}
        sides = (store.batches(batch_size, **options) for store in (self.inputs, self.outputs))
        return (Pair(x, y) for x, y in zip(*sides, strict=True))

    def sample(self, n: int, seed: int = 0) -> Pair:
        """Return `n` different tokens drawn at random, float32. Errors as in `ActivationStore.sample`."""
        return Pair(self.inputs.sample(n, seed), self.outputs.sample(n, seed))

    def in_order(self, batch_size: int) -> Iterator[Pair]:
        """Return an iterator over all tokens, once and in order."""
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        starts = range(0, self.n, batch_size)
        parts = (torch.arange(first, min(first + batch_size, self.n), device="cpu") for first in starts)
        return (Pair(self.inputs.rows(part), self.outputs.rows(part)) for part in parts)


def without(store: ActivationStore, tokens: Int[Tensor, " m"]) -> ActivationStore:
    """Return a store without some of its harvested tokens (numbers as in `left_out`), as views of its rows.

    Returns the store itself if none of the tokens is among its rows.
    """
    tokens = tokens[~torch.isin(tokens, store.left_out)].unique()
    if len(tokens) == 0:
        return store
    if isinstance(store, LinearStore):
        return LinearStore(without(store.of, tokens), store.matrix, store.center)
    gone = tokens - torch.searchsorted(store.left_out, tokens)
    removed = Moments.of(store.rows(gone).double())
    moments = store.moments.without(removed.to(store.moments.mean.device))
    parts, base = [], 0
    for part in store.parts:
        own = gone[(gone >= base) & (gone < base + len(part))] - base
        cuts = [-1, *own.tolist(), len(part)]
        parts += [part[first + 1 : last] for first, last in itertools.pairwise(cuts) if first + 1 < last]
        base += len(part)
    left_out = torch.cat([store.left_out, tokens]).sort().values
    return ActivationStore(
        parts,
        lambda: moments,
        moments.mean.cpu(),
        moments.scatter.diagonal().sum().item() / moments.n,
        {**store.metadata, "left_out": len(left_out)},
        store.folder,
        [store.fingerprint, f"without {tokens.tolist()}"],
        lambda: left_out,
    )
