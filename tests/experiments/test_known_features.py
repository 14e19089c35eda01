"""Known features: what the activations are made of, and what a dictionary is said to find of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_trainings import quick

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.experiments.known_features import FOUND, NOISE, known_feature_rows, known_features
from asi_lens.experiments.runs import train_recipes

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


def test_features_are_unit_inside_the_subspace_and_of_falling_frequency() -> None:
    truth = known_features(32, 6, 40, 3, seed=1)
    torch.testing.assert_close(truth.directions.norm(dim=1), torch.ones(40))
    assert torch.linalg.matrix_rank(truth.directions.double(), tol=1e-4) == 6
    assert (truth.frequencies.diff() <= 0).all()
    assert truth.frequencies.max() <= 0.5
    ratio = truth.frequencies[9] / truth.frequencies[19]
    torch.testing.assert_close(ratio, torch.tensor(2.0))
    other = known_features(32, 6, 40, 3, seed=2)
    assert not torch.allclose(truth.directions, other.directions)


def test_rows_are_made_of_them_with_a_little_noise() -> None:
    truth = known_features(32, 6, 40, 3, seed=1)
    store = truth.store(20_000, 0)
    spectrum = store.spectrum
    inside = spectrum.explained_variance(6)
    assert inside == pytest.approx(1 - NOISE * 26 / 32 / (1 + NOISE), rel=2e-3)
    assert torch.equal(
        truth.store(500, 1).rows(torch.arange(500)), truth.store(500, 1).rows(torch.arange(500))
    )
    assert not torch.equal(
        truth.store(500, 0).rows(torch.arange(5)), truth.store(500, 1).rows(torch.arange(5))
    )
    # The mean is that of independent features with values of mean 1.5.
    expected = 1.5 * truth.frequencies @ truth.directions
    torch.testing.assert_close(store.mean.float(), expected, rtol=0, atol=0.03)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_dictionary_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    found = known_feature_rows(
        [8, 24],
        width=24,
        n_features=32,
        n_active=2,
        n_rows=4_096,
        n_held_out=512,
        seeds=[0, 1],
        train=quick(n_tokens=16_384, lr=5e-3, dead_window=4_096),
        progress=False,
    )
    whole = [row for row in found if row.fifth is None]
    assert [(row.r, row.seed, row.method) for row in whole] == [
        (r, seed, method) for r in (8, 24) for seed in (0, 1) for method in ("random", "ASI")
    ]
    full = [row for row in whole if row.r == 24]
    assert min(row.recovered for row in full) > max(row.recovered for row in whole if row.r == 8)
    # Each true feature that is recovered has a decoder row of that cosine.
    truth = known_features(24, 24, 32, 2, seed=1)
    train = quick(n_tokens=16_384, lr=5e-3, dead_window=4_096)
    options = {"d_sae": 32, "k": 2, "seeds": [1], "train": train, "log_every": 64, "progress": False}
    (run,) = train_recipes(truth.store(4_096, 0), ["ASI"], **options)  # type: ignore[arg-type]
    decoder = torch.nn.functional.normalize(run.sae().W_dec.detach())
    near = ((truth.directions @ decoder.T).amax(1) >= FOUND).double().mean().item()
    assert 0 < full[-1].recovered <= near
    assert full[-1].recovered == pytest.approx(near, abs=0.1)
    for row in whole:
        whose = (row.r, row.seed, row.method)
        parts = [one for one in found if one.fifth and (one.r, one.seed, one.method) == whose]
        assert sum(part.n_features for part in parts) == row.n_features == 32
        mean = sum(part.recovered * part.n_features for part in parts) / 32
        assert mean == pytest.approx(row.recovered)
        assert row.silent is not None
        assert row.live_recovered is not None
        assert row.recovered <= row.live_recovered * (1 - row.silent) + row.silent + 1e-6
        assert parts[0].silent is None


def test_each_run_has_a_row_and_one_for_each_fifth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    found = known_feature_rows(
        [4],
        width=8,
        n_features=16,
        n_active=2,
        n_rows=64,
        n_held_out=64,
        seeds=[0],
        train=quick(n_tokens=128),
        progress=False,
    )
    assert [(row.method, row.fifth) for row in found] == [
        (method, fifth) for method in ("random", "ASI") for fifth in (None, 1, 2, 3, 4, 5)
    ]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match=r"r=33 .*from 1 to width=32"):
        known_features(32, 33, 40, 3, seed=1)
    with pytest.raises(OptionError, match=r"n_active=40 .*below n_features=40"):
        known_features(32, 8, 40, 40, seed=1)
    options = {"width": 8, "n_features": 16, "n_active": 2, "n_rows": 64, "n_held_out": 64, "seeds": [0]}
    with pytest.raises(UnknownNameError, match="recipe 'AIS'"):
        known_feature_rows([4], **options, train=quick(), methods=["AIS"])  # type: ignore[arg-type]
