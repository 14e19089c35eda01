"""Overlap of subspaces: closed forms, invariances, and the value for random subspaces."""

from __future__ import annotations

import math

import pytest
import torch

from asi_lens.base.errors import DataError, OptionError
from asi_lens.collapse.subspaces import direct_rotation, overlap, principal_cosines, random_kernel


def frame(d: int, r: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q


def test_known_angles() -> None:
    angle = 0.4
    a = torch.eye(4, dtype=torch.float64)[:, :2]
    b = a.clone()
    b[1, 1], b[2, 1] = math.cos(angle), math.sin(angle)
    torch.testing.assert_close(
        principal_cosines(a, b), torch.tensor([1.0, math.cos(angle)], dtype=torch.float64)
    )
    found = overlap(a, b)
    assert found.kernel == pytest.approx((1 + math.cos(angle) ** 2) / 2)
    assert found.mean_cosine == pytest.approx((1 + math.cos(angle)) / 2)


def test_overlap_depends_on_the_subspaces_alone() -> None:
    a, b, rotation = frame(12, 4), frame(12, 5, seed=1), frame(12, 12, seed=2)
    same = overlap(a @ frame(4, 4, seed=3), b)
    assert same.kernel == pytest.approx(overlap(a, b).kernel)
    assert overlap(rotation @ a, rotation @ b).kernel == pytest.approx(same.kernel)
    assert overlap(b, a).kernel == pytest.approx(same.kernel)


def test_contained_and_orthogonal_subspaces() -> None:
    whole = frame(9, 6)
    assert overlap(whole[:, :2], whole).kernel == pytest.approx(1)
    assert overlap(whole[:, :3], whole[:, 3:]).kernel == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("d", "r_a", "r_b"), [(10, 3, 3), (12, 2, 7)])
def test_random_subspaces_have_the_stated_mean_and_deviation(d: int, r_a: int, r_b: int) -> None:
    fixed = frame(d, r_a)
    found = torch.tensor([overlap(fixed, frame(d, r_b, seed)).kernel for seed in range(1, 1501)])
    mean, deviation = random_kernel(d, r_a, r_b)
    assert found.mean().item() == pytest.approx(mean, abs=4 * deviation / len(found) ** 0.5)
    assert found.std().item() == pytest.approx(deviation, rel=0.08)
    assert random_kernel(d, d, r_b) == (1, 0)


def test_what_is_no_pair_of_subspaces_is_refused() -> None:
    with pytest.raises(OptionError, match="b is not allowed: its columns are not orthonormal"):
        overlap(frame(5, 2), 2 * frame(5, 2))
    with pytest.raises(OptionError, match="5 and 6 dimensions"):
        overlap(frame(5, 2), frame(6, 2))
    with pytest.raises(OptionError, match="r_b=6"):
        random_kernel(5, 2, 6)


def test_the_direct_rotation_maps_one_span_onto_the_other() -> None:
    a, b = frame(12, 4), frame(12, 4, seed=1)
    R = direct_rotation(a, b)
    torch.testing.assert_close(R @ R.T, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(R @ a @ a.T @ R.T, b @ b.T)
    # Whatever bases are given, and back again by the inverse.
    torch.testing.assert_close(direct_rotation(a @ frame(4, 4, seed=3), b), R)
    torch.testing.assert_close(direct_rotation(b, a), R.T)
    torch.testing.assert_close(direct_rotation(a, a), torch.eye(12, dtype=torch.float64))


def test_the_direct_rotation_turns_by_the_principal_angle_and_nothing_else() -> None:
    angle = 0.3
    a = torch.eye(4, dtype=torch.float64)[:, :1]
    b = torch.tensor([[math.cos(angle)], [math.sin(angle)], [0.0], [0.0]], dtype=torch.float64)
    expected = torch.eye(4, dtype=torch.float64)
    expected[0, 0] = expected[1, 1] = math.cos(angle)
    expected[1, 0], expected[0, 1] = math.sin(angle), -math.sin(angle)
    torch.testing.assert_close(direct_rotation(a, b), expected)


def test_a_rotation_that_is_not_unique_is_refused() -> None:
    one = torch.eye(4, dtype=torch.float64)
    with pytest.raises(DataError, match="90 degrees"):
        direct_rotation(one[:, :1], one[:, 1:2])
    with pytest.raises(OptionError, match=r"b=.*is not allowed; b must be 1 columns, as a"):
        direct_rotation(one[:, :1], one[:, :2])
