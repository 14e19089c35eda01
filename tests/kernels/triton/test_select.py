"""The choice of keys, on keys made by hand."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_triton import DEVICE, need_kernels, small_plan

need_kernels()

from asi_lens.kernels.triton.plan import Plan
from asi_lens.kernels.triton.select import select, select_warps


def chosen(first: list[int], second: list[int], plan: Plan) -> tuple[list[int], list[float], list[int]]:
    """Features, values and unsure groups of one row of keys."""
    keys = torch.full((2, 1, plan.groups), -1, dtype=torch.int32, device=DEVICE)
    for to, row in zip(keys, (first, second), strict=True):
        to[0, : len(row)] = torch.tensor(row, dtype=torch.int32)
    indices = torch.full((1, plan.k), -7, dtype=torch.int32, device=DEVICE)
    values = torch.full((1, plan.k), torch.nan, device=DEVICE)
    unsure = torch.full((1,), -7, dtype=torch.int32, device=DEVICE)
    which = select(keys[0], keys[1], plan, indices, values, unsure)
    listed = which[0, : min(int(unsure), plan.settled)]
    return indices[0].tolist(), values[0].tolist(), listed.tolist()


def key(score: float, place: int, plan: Plan) -> int:
    bits = int(torch.tensor(score).view(torch.int32))
    return (bits & -plan.group) | (plan.group - 1 - place)


def test_a_key_names_its_feature_and_its_value() -> None:
    plan = small_plan(32, 128, 2)
    stride = plan.features // plan.group
    first = [key(1.0, 0, plan)] * plan.groups
    first[stride - 1] = key(3.0, 5, plan)  # last group of the first block
    if plan.groups > stride:
        first[stride] = key(2.0, 1, plan)  # first group of the second block
    else:
        first[0] = key(2.0, 1, plan)
    features, values, listed = chosen(first, [-1] * plan.groups, plan)
    found = dict(zip(features, values, strict=True))
    second = plan.features + stride if plan.groups > stride else stride
    assert found.keys() == {5 * stride + stride - 1, second}
    assert abs(found[5 * stride + stride - 1] - 3) < 3 * plan.group * 2**-23
    assert listed == []


def test_equal_keys_are_chosen_by_group_and_the_first_before_the_second() -> None:
    plan = small_plan(32, 128, 3)
    features, _, listed = chosen([key(1.0, 0, plan)] * 4, [key(1.0, 1, plan)] * 4, plan)
    # Keys of place 0 are above those of place 1, since the place counts down.
    assert sorted(features) == [0, 1, 2]
    assert listed == []


def test_groups_whose_second_was_chosen_are_listed_and_counted() -> None:
    plan = small_plan(32, 128, 4, settled=4)
    first = [key(s, 0, plan) for s in (1.0, 5.0, 1.0, 6.0)]
    second = [key(s, 1, plan) for s in (0.5, 4.0, 0.5, 5.5)]
    features, values, listed = chosen(first, second, plan)
    assert listed == [1, 3]
    assert sorted(round(value) for value in values) == [4, 5, 6, 6]
    # A second of zero has only zeros behind it.
    zeros = [key(0.0, 1, plan)] * 4
    features, values, listed = chosen([key(1.0, 0, plan)] * 2, zeros, plan)
    assert listed == []
    assert sorted(round(value, 4) for value in values) == [0, 0, 1, 1]
    assert len(set(features)) == 4


_KEYS = st.sampled_from([0, 1, 2, 9, 1 << 23, 2 << 23, (127 << 23) + 5, (127 << 23) + 6, (2**31) - 1])
_ROW = st.lists(_KEYS, min_size=8, max_size=8)


@settings(max_examples=30)
@given(first=st.lists(_ROW, min_size=3, max_size=3), second=st.lists(_ROW, min_size=3, max_size=3))
@example(first=[[2**31 - 1] * 8] * 3, second=[[2**31 - 1] * 8] * 3)  # NaN everywhere
@example(first=[[0] * 8] * 3, second=[[-1] * 8] * 3)
def test_exactly_the_k_largest_of_every_row_are_chosen(
    first: list[list[int]], second: list[list[int]]
) -> None:
    plan = small_plan(32, 64, 5)
    keys = torch.full((2, 3, plan.groups), -1, dtype=torch.int32, device=DEVICE)
    keys[0, :, :8], keys[1, :, :8] = torch.tensor(first).to(keys), torch.tensor(second).to(keys)
    indices = torch.full((4, plan.k), -7, dtype=torch.int32, device=DEVICE)
    values, unsure = torch.zeros(4, plan.k, device=DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    select(*keys, plan, indices[:3], values[:3], unsure)
    for row in range(3):
        entries = keys[:, row].flatten()
        largest = entries.sort(descending=True).values[: plan.k]
        expected = torch.where(largest < plan.group, 0, largest & -plan.group)
        got = values[row].view(torch.int32)
        assert (got.sort(descending=True).values & -plan.group).tolist() == expected.tolist()
    assert (indices[:3] >= 0).all()
    assert (indices[3] == -7).all()  # nothing is written beyond a row's k


def test_warps_grow_with_the_groups() -> None:
    assert [select_warps(groups) for groups in (32, 2048, 4096, 8192)] == [4, 4, 4, 8]
