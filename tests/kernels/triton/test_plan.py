"""Sizes of groups, limits, and memory."""

from __future__ import annotations

import math

import pytest

from asi_lens.kernels.triton.card import GIB, UnsupportedError
from asi_lens.kernels.triton.plan import MOST_GROUPS, Plan, n_pieces

SIZES = [(576, 16_384, 32), (576, 131_072, 32), (576, 1_048_576, 32), (4096, 131_072, 50), (64, 100, 4)]


@pytest.mark.parametrize(("d", "n", "k"), SIZES)
def test_every_feature_is_in_a_group_and_groups_suffice(d: int, n: int, k: int) -> None:
    plan = Plan.of(d, n, k)
    assert plan.groups * plan.group >= n
    assert k <= 2 * plan.groups <= 2 * MOST_GROUPS
    assert d % plan.depth == 0
    assert plan.rows_at_a_time % plan.rows == 0
    assert 8 * plan.rows_at_a_time * plan.groups <= 2**29 or plan.rows_at_a_time == plan.rows


def test_groups_grow_with_the_dictionary() -> None:
    assert [Plan.of(576, n, 32).group for _, n, _ in SIZES[:3]] == [8, 32, 128]


@pytest.mark.parametrize(("n", "k"), [(16_384, 32), (131_072, 64), (2048, 48)])
def test_an_overflow_is_rare(n: int, k: int) -> None:
    plan = Plan.of(576, n, k)
    mean = math.comb(k, 2) / plan.groups
    tail = sum(math.exp(-mean) * mean**i / math.factorial(i) for i in range(plan.settled + 1, 90))
    assert tail < 1e-7


@pytest.mark.parametrize(
    ("d", "n", "k", "message"),
    [
        (570, 4096, 32, "d_in=570; the kernels take multiples of 16 up to 4096"),
        (8192, 4096, 32, "d_in=8192"),
        (576, 1_048_577, 32, "d_sae=1048577; the kernels take up to 1048576"),
        (576, 256, 64, r"k=64 with d_sae=256.* take k up to (\d+)"),
        (576, 1000, 1000, r"k=1000 with d_sae=1000.* take k up to (\d+)"),
    ],
)
def test_sizes_beyond_the_limits_are_refused(d: int, n: int, k: int, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        Plan.of(d, n, k)
    if "k up to" in str(caught.value):
        largest = int(str(caught.value).rsplit(maxsplit=1)[1])
        Plan.of(d, n, largest)
        with pytest.raises(UnsupportedError):
            Plan.of(d, n, largest + 1)


def test_too_little_memory_says_how_much_is_needed_and_what_would_fit() -> None:
    plan = Plan.of(4096, 1_048_576, 32)
    assert plan.weight_bytes() == pytest.approx(26 * plan.n * plan.d, rel=1e-3)
    with pytest.raises(
        UnsupportedError, match=r"need 10\d\.\d\d GiB.*75\.00 are there.*(d_sae=\d+)"
    ) as caught:
        plan.require_memory(4096, 75 * GIB)
    features = int(str(caught.value).split("d_sae=")[-1].split()[0])
    assert features < plan.n
    Plan.of(4096, features, 32).require_memory(4096, 75 * GIB)

    small = Plan.of(576, 16_384, 32)
    room = small.weight_bytes() + small.step_bytes(1024)
    small.require_memory(1024, room)
    with pytest.raises(UnsupportedError, match="batch_size=1024 or d_sae="):
        small.require_memory(2048, room)
    with pytest.raises(UnsupportedError, match="no smaller batch or dictionary would fit"):
        small.require_memory(2048, 1000)


def test_pieces_suffice_for_any_share_of_picks() -> None:
    for counts in ([65] * 10, [64] * 10, [1000], [128, 1, 1], [0]):
        needed = sum(-(-count // 64) for count in counts if count > 64)
        assert needed <= n_pieces(sum(counts))
