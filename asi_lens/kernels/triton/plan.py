"""Sizes of blocks and groups for a dictionary, the limits of the kernels, and the memory of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from asi_lens.kernels.triton.card import GIB, UnsupportedError
from asi_lens.kernels.triton.language import next_power_of_2

MOST_GROUPS = 8192
"""Largest number of groups: `select` holds the keys of a row in registers, and more would spill."""
WIDEST = 4096
"""Largest width of a row: `update` holds a row of each weight in registers."""
PIECE = 64
"""Picks of a feature that one program sums; a feature with more picks is summed in pieces."""

# Groups that are wanted at least, and sizes of groups that are tried, where that many are possible.
_GROUPS, _SIZES = 4096, (8, 16, 32, 64, 128)
# Unsure groups of a row that are settled, and how many rows may have more: then the batch is encoded again.
_SETTLED, _RARE = (8, 16, 32), 1e-8
# Bytes of keys at a time: larger batches are encoded in parts.
_KEY_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Plan:
    """How the kernels encode rows [batch d] with n features of which k are picked.

    Attributes:
        d, n, k: width of a row, number of features, picks of a row.
        group: members of a group, of which the two largest are kept.
        settled: groups of a row that may hold a third and are scored again; more are an overflow.
        rows, features, depth: block of the product. warps, stages: how it is run.
        band: blocks of rows whose programs are neighbours, so that they share weights in the cache.
    """

    d: int
    n: int
    k: int
    group: int
    settled: int
    rows: int = 128
    features: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    band: int = 32

    def __post_init__(self) -> None:
        powers = (self.group, self.settled, self.rows, self.features, self.depth)
        assert all(size == next_power_of_2(size) for size in powers), powers
        whole = self.d % self.depth == 0 and self.features % self.group == 0
        assert whole, self
        assert (self.k + 1) // 2 <= self.groups <= MOST_GROUPS, self

    @classmethod
    def of(cls, d: int, n: int, k: int) -> Plan:
        """Return the plan for these sizes. Raises UnsupportedError, naming the limit, if there is none."""
        depth = next((depth for depth in (64, 32, 16) if d % depth == 0), None)
        if depth is None or d > WIDEST:
            raise UnsupportedError(f"d_in={d}; the kernels take multiples of 16 up to {WIDEST}")
        most = MOST_GROUPS * _SIZES[-1]
        if n > most:
            raise UnsupportedError(f"d_sae={n}; the kernels take up to {most} features")
        found = _groups_for(n, k)
        if found is None:
            largest = next(least for least in range(k, 0, -1) if _groups_for(n, least))
            raise UnsupportedError(
                f"k={k} with d_sae={n}: too many of the k largest would be in one group of features; "
                f"at this d_sae the kernels take k up to {largest}"
            )
        group, settled = found
        return cls(d, n, k, group, settled, depth=depth)

    @property
    def groups(self) -> int:
        """Number of groups, those of the last block's missing features included."""
        return _groups(self.n, self.features, self.group)

    @property
    def rows_at_a_time(self) -> int:
        """Rows whose keys are in memory at a time."""
        return max(self.rows, _KEY_BYTES // (8 * self.groups) // self.rows * self.rows)

    def weight_bytes(self) -> int:
        """Return the bytes of both weights, their moments and the bfloat16 copy: 26 n d, and the biases'."""
        return 26 * self.n * self.d + 12 * self.n

    def step_bytes(self, batch: int) -> int:
        """Return about the bytes of a step on `batch` rows, beside the weights."""
        picks = batch * self.k
        keys = 8 * self.groups * min(batch, self.rows_at_a_time)
        # Rows: the batch, centered, in bfloat16 and the residual. Picks: sorted with their places.
        return keys + 14 * batch * self.d + 60 * picks + 8 * n_pieces(picks) * (self.d + 1) + 12 * self.n

    def require_memory(self, batch: int, room: int) -> None:
        """Raise UnsupportedError, naming a batch or a dictionary that fits, unless weights and a step on
        `batch` rows fit into `room` bytes: the free ones and those that hold the weights already."""
        if (needed := self.weight_bytes() + self.step_bytes(batch)) <= room:
            return
        batches = (batch >> i for i in range(1, batch.bit_length()))
        smaller = next((b for b in batches if self.weight_bytes() + self.step_bytes(b) <= room), None)
        features = next((n for n in _smaller(self.n) if self._fits(n, batch, room)), None)
        fits = [f"batch_size={smaller}"] if smaller else []
        fits += [f"d_sae={features}"] if features else []
        raise UnsupportedError(
            f"d_in={self.d}, d_sae={self.n} and batch_size={batch} need {needed / GIB:.2f} GiB of the card "
            f"({self.weight_bytes() / GIB:.2f} of it for weights and moments); {room / GIB:.2f} are there. "
            + (f"{' or '.join(fits)} would fit" if fits else "no smaller batch or dictionary would fit")
        )

    def _fits(self, n: int, batch: int, room: int) -> bool:
        found = _groups_for(n, self.k)
        if found is None:
            return False
        plan = replace(self, n=n, group=found[0], settled=found[1])
        return plan.weight_bytes() + plan.step_bytes(batch) <= room


def n_pieces(picks: int, piece: int = PIECE) -> int:
    """Return the largest number of pieces of up to `piece` picks, of features with more picks than that."""
    return 2 * picks // piece + 1


def _groups(n: int, features: int, group: int) -> int:
    return -(-n // features) * (features // group)


def _share_above(settled: int, k: int, groups: int) -> float:
    """Return the share of rows with more than `settled` groups that hold two of the k largest.

    Their number is about Poisson distributed, with mean k (k - 1) / 2 / groups, if features of a group are
    not picked together more often than others.
    """
    mean = k * (k - 1) / 2 / groups
    term = below = math.exp(-mean)
    for i in range(1, settled + 1):
        term *= mean / i
        below += term
    return max(0.0, 1.0 - below)


def _groups_for(n: int, k: int) -> tuple[int, int] | None:
    """Return the size of a group, and how many groups of a row may be settled; None if k is too large."""
    first = next((i for i, size in enumerate(_SIZES) if n <= _GROUPS * size), len(_SIZES) - 1)
    # Smaller groups are more groups, of which fewer hold three of the k largest.
    for size in reversed(_SIZES[: first + 1]):
        groups = _groups(n, Plan.features, size)
        if k <= 2 * groups <= 2 * MOST_GROUPS:
            for settled in _SETTLED:
                if _share_above(settled, k, groups) <= _RARE:
                    return size, settled
    return None


def _smaller(n: int) -> Iterator[int]:
    """Yield numbers of features below n, each about 1/16 smaller than the one before."""
    while (n := (n * 15 // 16) // 1024 * 1024) > 0:
        yield n
