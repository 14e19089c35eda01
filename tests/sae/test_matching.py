"""Features matched between dictionaries: against brute force, planted pairs, and bad input."""

from __future__ import annotations

import itertools

import pytest
import torch

from asi_lens.base.errors import DataError, OptionError
from asi_lens.sae.matching import assign, match_features


def draw(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_no_assignment_is_better_by_more_than_the_gap(n: int, seed: int) -> None:
    scores = draw(n, n, seed) if seed % 2 else draw(n, n, seed).round()  # with many ties
    best = max(
        sum(scores[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(n))
    )
    for tolerance in (0.1, 1e-4):
        column, gap = assign(scores, tolerance=tolerance)
        assert sorted(column.tolist()) == list(range(n))
        found = scores.gather(1, column[:, None]).sum().item()
        assert gap <= tolerance + 1e-5
        assert found - 1e-4 <= best <= found + n * gap + 1e-4
    # Scores as far apart as these have one best assignment, which this tolerance finds.
    assert found == pytest.approx(best, abs=1e-3)


def test_greed_is_not_enough() -> None:
    """The largest score first leaves a pair that costs more than it gave."""
    column, gap = assign(torch.tensor([[1.0, 0.9], [0.9, 0.0]]), tolerance=1e-3)
    assert column.tolist() == [1, 0]
    assert gap <= 1e-3


def test_a_shuffled_dictionary_is_found_whatever_its_scale() -> None:
    a, order = draw(300, 16, 0), torch.randperm(300, generator=torch.Generator().manual_seed(1))
    found = match_features(a, 7.0 * a[order])
    assert torch.equal(order[found.partner], torch.arange(300))
    torch.testing.assert_close(found.cosine, torch.ones(300))
    assert found.best == pytest.approx(1)
    assert found.gap < 1e-5


def test_a_match_lies_between_any_pairing_and_the_best_cosines() -> None:
    a, b = draw(200, 24, 0), draw(200, 24, 1)
    found = match_features(a, b)
    mean = found.cosine.mean().item()
    assert 0.2 < mean <= found.best
    torch.testing.assert_close(torch.cosine_similarity(a, b[found.partner]), found.cosine)
    assert found.gap <= 1e-3
    back = match_features(b, a)
    assert abs(back.cosine.mean().item() - mean) <= 1e-3
    assert back.best == pytest.approx(found.best)


def test_two_features_of_a_on_one_of_b_share_it_only_in_the_best_cosines() -> None:
    eye = torch.eye(3)
    found = match_features(eye[[0, 0, 1]], eye)
    assert found.cosine.sum().item() == pytest.approx(2)
    assert found.best == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize("shape", [(4, 8), (5, 7)])
def test_dictionaries_of_another_size_or_width_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(OptionError, match=r"5 features of width 8 .* cannot be matched one to one"):
        match_features(draw(5, 8, 0), draw(*shape, 1))


def test_bad_scores_and_rows_are_refused() -> None:
    dead = draw(5, 8, 0)
    dead[2] = 0
    with pytest.raises(DataError, match="b has rows that are zero or not finite"):
        match_features(draw(5, 8, 1), dead)
    with pytest.raises(DataError, match="a has rows that are zero or not finite"):
        match_features(dead / 0.0, draw(5, 8, 1))
    with pytest.raises(OptionError, match="is not allowed; scores must be square"):
        assign(torch.zeros(2, 3))
    with pytest.raises(DataError, match="scores are not finite"):
        assign(torch.tensor([[float("nan")]]))
    for tolerance in (0.0, 2.0, float("nan")):
        with pytest.raises(OptionError, match="is not allowed; tolerance must be from 1e-05 to 1"):
            assign(torch.zeros(2, 2), tolerance=tolerance)
