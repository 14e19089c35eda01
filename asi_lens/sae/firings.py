"""Rows on which each feature of a dictionary fires: how often, the strongest of them, and a random sample.

One pass over a store. Memory holds a block of codes and the entries kept so far, never a row for each firing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import require, require_whole
from asi_lens.kernels.codes import SparseCode
from asi_lens.sae.dictionary import SparseAutoencoder

_BLOCK = 16_384


@dataclass(frozen=True)
class Picks:
    """Up to m firings of every feature.

    Attributes:
        rows: numbers of the store's rows [d_sae m]; -1 where a feature has fewer than m firings.
        values: values of the feature on them [d_sae m], in normalized units; 0 where there is no firing.
    """

    rows: Int[Tensor, "d_sae m"]
    values: Float[Tensor, "d_sae m"]

    def by_row(self) -> Picks:
        """Return the same firings in the order of their rows."""
        # Places without a firing stay last.
        order = self.rows.where(self.rows >= 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        return Picks(self.rows.gather(1, order), self.values.gather(1, order))


@dataclass(frozen=True)
class Firings:
    """Firings of a dictionary's features on the rows of a store.

    Attributes:
        n: rows of the store.
        counts: rows on which each feature fires [d_sae], int64.
        sums: sum of each feature's values [d_sae], float64.
        top: the firings with the largest values, largest first; of equal values the earlier row.
        sampled: firings drawn at random, all of a feature's firings with the same probability, by row.
    """

    n: int
    counts: Int[Tensor, " d_sae"]
    sums: Float[Tensor, " d_sae"]
    top: Picks
    sampled: Picks

    @property
    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Share of rows on which each feature fires."""
        return self.counts.double() / self.n

    @property
    def mean(self) -> Float[Tensor, " d_sae"]:
        """Mean value of each feature where it fires; NaN for a feature that never fires."""
        return self.sums / self.counts


@torch.no_grad()
def find_firings(
    sae: SparseAutoencoder,
    store: ActivationStore | PairedStores,
    *,
    top: int = 16,
    sampled: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Firings:
    """Return the firings of every feature on the rows of `store`; for a transcoder, of paired stores.

    The result does not depend on how the rows are cut into blocks.

    Args:
        top, sampled: firings kept of each feature, at least 1.
        seed: seed of the random sample.

    Raises OptionError for numbers out of range, DataError for rows of another width.
    """
    codes = codes_in_order(sae, store)
    return count_firings(codes, sae.d_sae, len(store), top, sampled, seed, progress)


def count_firings(
    codes: Iterable[tuple[int, SparseCode]],
    d_sae: int,
    n: int,
    top: int,
    sampled: int,
    seed: int,
    progress: bool,
) -> Firings:
    """Return the firings in a code of `n` rows, given in blocks with the number of each block's first row.

    The other options are those of `find_firings`. Raises OptionError for numbers out of range.
    """
    require_whole("top", top, 1)
    require_whole("sampled", sampled, 1)
    require_whole("seed", seed, 0)
    counts = torch.zeros(d_sae, dtype=torch.int64)
    sums = torch.zeros(d_sae, dtype=torch.float64)
    strongest, drawn = _Best(d_sae, top), _Best(d_sae, sampled)
    with tqdm(total=n, unit="row", unit_scale=True, desc="firings", disable=not progress) as bar:
        for first, code in codes:
            place, column = (code.values > 0).nonzero(as_tuple=True)
            features, values = code.indices[place, column], code.values[place, column]
            rows = place + first
            counts += torch.bincount(features, minlength=d_sae)
            sums.index_add_(0, features, values.double())
            strongest.add(features, rows, values, values.double())
            drawn.add(features, rows, values, _hashed(rows, features, seed))
            bar.update(len(code.values))
    return Firings(n, counts, sums, strongest.picks(), drawn.picks().by_row())


def codes_in_order(
    sae: SparseAutoencoder, store: ActivationStore | PairedStores
) -> Iterator[tuple[int, SparseCode]]:
    """Yield the number of the first row of a block and the block's code, on the CPU, over all rows."""
    inputs = store.inputs if isinstance(store, PairedStores) else store
    require(inputs.d == sae.d_in, "store", f"of width {inputs.d}", f"of width d_in={sae.d_in}")
    first = 0
    for rows in inputs.in_order(_BLOCK):
        code = sae.encode(rows)
        yield first, SparseCode(code.indices.cpu(), code.values.cpu())
        first += len(rows)


class _Best:
    """The m entries of every feature with the largest keys, of a stream of entries."""

    def __init__(self, n_features: int, m: int):
        self._keys = torch.full((n_features, m), -torch.inf, dtype=torch.float64)
        self._rows = torch.full((n_features, m), -1)
        self._values = torch.zeros(n_features, m)

    def add(
        self,
        features: Int[Tensor, " n"],
        rows: Int[Tensor, " n"],
        values: Float[Tensor, " n"],
        keys: Float[Tensor, " n"],
    ) -> None:
        """Add entries. Of equal keys the entry that came first stays."""
        hopeful = keys > self._keys[features, -1]
        features, rows, values, keys = (part[hopeful] for part in (features, rows, values, keys))
        if not len(features):
            return
        # By feature, then by key from the largest down; both sorts keep the order of equal entries.
        order = keys.argsort(descending=True, stable=True)
        order = order[features[order].argsort(stable=True)]
        features, rows, values, keys = (part[order] for part in (features, rows, values, keys))
        changed, counts = features.unique_consecutive(return_counts=True)
        place = torch.arange(len(features)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        m = self._keys.shape[1]
        kept = place < m
        line = torch.arange(len(changed)).repeat_interleave(counts)[kept]
        new_keys = torch.full((len(changed), m), -torch.inf, dtype=torch.float64)
        new_rows, new_values = torch.full((len(changed), m), -1), torch.zeros(len(changed), m)
        for new, part in ((new_keys, keys), (new_rows, rows), (new_values, values.float())):
            new[line, place[kept]] = part[kept]
        together = torch.cat([self._keys[changed], new_keys], 1)
        best = together.argsort(dim=1, descending=True, stable=True)[:, :m]
        for kept_part, new in ((self._rows, new_rows), (self._values, new_values)):
            kept_part[changed] = torch.cat([kept_part[changed], new], 1).gather(1, best)
        self._keys[changed] = together.gather(1, best)

    def picks(self) -> Picks:
        """Return the entries, largest key first."""
        return Picks(self._rows, self._values)


def _hashed(rows: Int[Tensor, " n"], features: Int[Tensor, " n"], seed: int) -> Float[Tensor, " n"]:
    """Return a number for each (row, feature, seed), uniform on 0 to 1 (the mixer of SplitMix64).

    The entries with the largest numbers are a random sample that does not depend on the order of the stream.
    """
    x = rows * 0x9E3779B9 + features * 0x85EBCA6B + (seed + 1) * 0xC2B2AE35
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    x = x ^ ((x >> 31) & (2**33 - 1))
    return ((x >> 11) & (2**53 - 1)).double() / 2**53
