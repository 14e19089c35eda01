"""W_O counterfactuals against brute force on rows, and closed forms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.collapse.output_projection import (
    CLOSED_FORMS,
    RANDOM_FORMS,
    counterfactual_ranks,
    head_overlap,
    overlap_records,
)
from asi_lens.collapse.spectra import collect_spectra
from asi_lens.collapse.subspaces import principal_cosines
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.models import output_projection
from asi_lens.results.rows import HeadOverlapRow

HEADS, D_HEAD, D_MODEL = 3, 4, 12


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def z_rows(n: int = 800) -> torch.Tensor:
    return draw(n, HEADS * D_HEAD) @ draw(HEADS * D_HEAD, HEADS * D_HEAD, seed=1) + 2.0


def rank_of(rows: torch.Tensor) -> float:
    return Spectrum.of(rows).effective_rank


def test_closed_forms_equal_what_rows_give() -> None:
    z = z_rows()
    W_O = draw(HEADS, D_HEAD, D_MODEL, seed=2)
    flat = W_O.reshape(HEADS * D_HEAD, D_MODEL)
    got = counterfactual_ranks(W_O, Spectrum.of(z).covariance)
    assert tuple(got) == CLOSED_FORMS
    assert got["z"] == pytest.approx(rank_of(z) / 12, rel=1e-9)
    assert got["attn_out"] == pytest.approx(rank_of(z @ flat + 5.0) / 12, rel=1e-9)
    U, _, Vh = torch.linalg.svd(flat)
    assert got["flat_spectrum"] == pytest.approx(rank_of(z @ U @ Vh) / 12, rel=1e-9)
    singular = torch.linalg.svdvals(flat)
    p = singular / singular.sum()
    assert got["isotropic_z"] == pytest.approx(torch.exp(-(p * p.log()).sum()).item() / 12, rel=1e-9)
    per_head = [rank_of(z[:, 4 * h : 4 * h + 4] @ W_O[h]) for h in range(HEADS)]
    assert got["sum_of_heads"] == pytest.approx(sum(per_head) / 12, rel=1e-9)


def test_an_orthogonal_projection_keeps_the_rank_of_z() -> None:
    got = counterfactual_ranks(draw(HEADS, D_HEAD, D_MODEL, seed=2), Spectrum.of(z_rows()).covariance)
    assert got["random_orthogonal"] == pytest.approx(got["z"], rel=1e-9)
    assert got["flat_spectrum"] == pytest.approx(got["z"], rel=1e-9)


def test_heads_already_orthogonal_stay_as_they_are() -> None:
    # One-dimensional heads along different axes: nothing to separate, and ranks do not depend on the frame.
    z = z_rows()
    W_O = torch.diag(torch.arange(1.0, 13.0, dtype=torch.float64)).reshape(HEADS, D_HEAD, D_MODEL)
    got = counterfactual_ranks(W_O, Spectrum.of(z).covariance)
    assert got["orthogonal_heads"] == pytest.approx(got["attn_out"], rel=1e-9)


def test_heads_that_write_to_the_same_place_gain_from_being_separated() -> None:
    z = draw(4000, HEADS * D_HEAD)
    W_O = draw(1, D_HEAD, D_MODEL, seed=3).expand(HEADS, D_HEAD, D_MODEL)
    got = counterfactual_ranks(W_O, Spectrum.of(z).covariance)
    assert got["attn_out"] <= D_HEAD / D_MODEL + 1e-9
    assert got["orthogonal_heads"] > 2 * got["attn_out"]
    assert got["sum_of_heads"] == pytest.approx(HEADS * got["attn_out"], rel=0.05)
    overlap = head_overlap(W_O, Spectrum.of(z).covariance)
    assert overlap.mean_cosine.min() == pytest.approx(1.0)
    assert overlap.covariance_cosine.min() > 0.95


def test_overlap_of_known_angles() -> None:
    angle = 0.3
    e = torch.eye(6, dtype=torch.float64)
    tilted = torch.stack(
        [torch.cos(torch.tensor(angle)) * e[0] + torch.sin(torch.tensor(angle)) * e[2], e[3]]
    )
    W_O = torch.stack([2.0 * e[:2], tilted, e[4:]])
    overlap = head_overlap(W_O, torch.eye(6, dtype=torch.float64))
    c = float(torch.cos(torch.tensor(angle)))
    assert overlap.largest_cosine[0, 1] == pytest.approx(c, abs=1e-6)
    assert overlap.mean_cosine[0, 1] == pytest.approx(c / 2, abs=1e-6)
    assert overlap.largest_cosine[0, 2] == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(overlap.mean_cosine.diagonal(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(overlap.mean_cosine, overlap.mean_cosine.T)
    assert ((overlap.random_mean_cosine > 0) & (overlap.random_mean_cosine < 1)).all()


def test_overlap_does_not_depend_on_the_basis_inside_a_head() -> None:
    W_O = draw(HEADS, D_HEAD, D_MODEL, seed=2)
    mixed = draw(HEADS, D_HEAD, D_HEAD, seed=5) @ W_O
    C = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(head_overlap(W_O, C).mean_cosine, head_overlap(mixed, C).mean_cosine)


def test_a_head_that_writes_nothing_has_rank_0_and_no_angles() -> None:
    W_O, C = draw(HEADS, D_HEAD, D_MODEL, seed=2), Spectrum.of(z_rows()).covariance
    W_O[1] = 0
    kept = [0, 1, 2, 3, 8, 9, 10, 11]
    rest, C_rest = W_O[[0, 2]], C[kept][:, kept]
    got, without = counterfactual_ranks(W_O, C), counterfactual_ranks(rest, C_rest)
    for variant in ("attn_out", "isotropic_z", "sum_of_heads", "orthogonal_heads"):
        assert got[variant] == pytest.approx(without[variant], rel=1e-9)
    overlap, alone = head_overlap(W_O, C), head_overlap(rest, C_rest)
    for name in ("mean_cosine", "largest_cosine", "covariance_cosine", "random_mean_cosine"):
        pairs = getattr(overlap, name)
        assert pairs[1].isnan().all()
        assert pairs[:, 1].isnan().all()
        torch.testing.assert_close(pairs[[0, 2]][:, [0, 2]], getattr(alone, name))


def test_directions_that_a_head_does_not_write_have_no_angles() -> None:
    # Heads of rank 2 (in 4 dimensions), 4 and 1: as if each had only its own directions.
    W_O = draw(HEADS, D_HEAD, D_MODEL, seed=2)
    W_O[0] = draw(D_HEAD, 2, seed=6) @ W_O[0, :2]
    W_O[2] = draw(D_HEAD, 1, seed=7) @ W_O[2, :1]
    got = head_overlap(W_O, torch.eye(12, dtype=torch.float64))
    spans = [torch.linalg.qr(w[:rank].T).Q for w, rank in zip(W_O, (2, 4, 1), strict=True)]
    for a, b in itertools.product(range(HEADS), repeat=2):
        cosines = principal_cosines(spans[a], spans[b])
        assert got.mean_cosine[a, b].item() == pytest.approx(cosines.mean().item())
        assert got.largest_cosine[a, b].item() == pytest.approx(cosines.max().item())
    # Of all lines, the mean of cos^2 with a plane is 2 / 12, so small subspaces have smaller cosines.
    draws = [head_overlap(W_O, torch.eye(12), seed=seed).random_mean_cosine for seed in range(100)]
    assert torch.stack(draws)[:, 0, 2].square().mean().item() == pytest.approx(2 / 12, rel=0.2)
    assert torch.equal(draws[0], draws[0].T)
    assert draws[0][0, 0].item() != draws[0][0, 0].float().item(), "rounded to float32"


@pytest.mark.model_facing
@pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
def test_pairs_of_an_ablated_head_are_left_out_of_the_table(
    tiny_llama: Any, tiny_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    spectra = collect_spectra(tiny_llama, tiny_tokens, ["z"], [0, 1], progress=False)

    def ablated(model: Any, layer: int, site: str) -> torch.Tensor:
        W_O = output_projection(model, layer, site).clone()
        W_O[3] *= layer == 0
        return W_O

    monkeypatch.setattr(models, "output_projection", ablated)
    found = [(row["layer"], row["head_a"], row["head_b"]) for row in overlap_records(tiny_llama, spectra)]
    pairs = list(itertools.combinations(range(4), 2))
    assert found == [(0, *pair) for pair in pairs] + [(1, *pair) for pair in pairs if 3 not in pair]
    assert all(HeadOverlapRow(**row) for row in overlap_records(tiny_llama, spectra))


def test_more_head_dimensions_than_the_model_has() -> None:
    # Gemma: n_heads * d_head > d_model.
    W_O = draw(4, 4, 10, seed=2)
    got = counterfactual_ranks(W_O, torch.eye(16, dtype=torch.float64))
    assert got["z"] == pytest.approx(1.0)
    assert got["flat_spectrum"] == pytest.approx(1.0)
    assert got["random_orthogonal"] == pytest.approx(1.0)
    assert got["attn_out"] < 1.0 < got["orthogonal_heads"] <= 1.6


def test_fewer_head_dimensions_than_the_model_has() -> None:
    W_O = draw(2, 3, 10, seed=2)
    got = counterfactual_ranks(W_O, torch.eye(6, dtype=torch.float64))
    assert got["random_orthogonal"] == pytest.approx(0.6)
    assert got["attn_out"] <= 0.6


def test_the_seed_fixes_the_random_variants_and_only_them() -> None:
    W_O, C = draw(HEADS, D_HEAD, D_MODEL, seed=2), Spectrum.of(z_rows()).covariance
    a, b, c = (counterfactual_ranks(W_O, C, seed=seed) for seed in (0, 0, 1))
    assert a == b
    for variant in CLOSED_FORMS:
        if variant not in RANDOM_FORMS:
            assert a[variant] == c[variant]
    assert a["gaussian"] != c["gaussian"]


def test_bad_input() -> None:
    W_O = draw(HEADS, D_HEAD, D_MODEL)
    with pytest.raises(UnknownNameError, match="did you mean 'gaussian'"):
        counterfactual_ranks(W_O, torch.eye(12), variants=("gausian",))
    with pytest.raises(OptionError, match="asks for"):
        counterfactual_ranks(W_O, torch.eye(11))
