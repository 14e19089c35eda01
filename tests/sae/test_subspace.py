"""Coordinates in the active subspace, and the way back to full width."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_trainings import D_IN, quick, rows, small_store

from asi_lens.activations.harvest_store import ActivationStore
from asi_lens.activations.moments import Moments
from asi_lens.activations.shaped import ShapedStore, power_gains
from asi_lens.base.errors import OptionError
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.evaluate import evaluate
from asi_lens.sae.initialize import initialize
from asi_lens.sae.subspace import SubspaceStore, expand
from asi_lens.sae.train import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
R = 6


def coordinates(store: SubspaceStore, x: torch.Tensor) -> torch.Tensor:
    return (x.double() - store.center) @ store.basis


def trained(store: SubspaceStore, **changes: Any) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(R, 64, 4, metadata=dict(store.metadata)))
    initialize(sae, "random", store.spectrum, None, store.sample(500))
    Trainer(sae, quick(**changes)).fit(store, progress=False)
    return sae


def test_rows_are_coordinates() -> None:
    store = SubspaceStore(small_store(), R)
    assert (store.n, store.d, len(store)) == (1000, R, 1000)
    exact = coordinates(store, rows())
    torch.testing.assert_close(torch.cat(list(store.in_order(300))), exact.float())
    index = torch.tensor([3, 999, 0])
    torch.testing.assert_close(store.rows(index), exact[index].float())
    batch = next(store.batches(64, seed=5))
    torch.testing.assert_close(batch, coordinates(store, next(store.of.batches(64, seed=5))).float())


def test_moments_and_floor_are_those_of_the_rows() -> None:
    store = SubspaceStore(small_store(), R)
    exact = coordinates(store, rows())
    found = Moments.of(exact)
    largest = found.scatter.max().item()
    torch.testing.assert_close(store.moments.scatter, found.scatter, rtol=1e-5, atol=1e-6 * largest)
    assert store.scale == pytest.approx((R / exact.square().sum(1).mean().item()) ** 0.5, rel=1e-5)
    centered = rows().double() - rows().double().mean(0)
    assert store.discarded == pytest.approx(
        1 - (exact**2).sum().item() / (centered**2).sum().item(), rel=1e-4
    )
    whole = SubspaceStore(small_store(), D_IN)
    assert whole.discarded == pytest.approx(0, abs=1e-9)


def test_the_fingerprint_changes_with_rows_and_subspace() -> None:
    base = SubspaceStore(small_store(), R)
    assert base.fingerprint == SubspaceStore(small_store(), R).fingerprint
    assert base.fingerprint != SubspaceStore(small_store(), R + 1).fingerprint
    assert base.fingerprint != base.of.fingerprint


def test_expanded_it_is_the_same_function() -> None:
    store = SubspaceStore(small_store(), R)
    sae = trained(store)
    wide = expand(sae, store.basis, store.center)
    assert (wide.d_in, wide.d_sae) == (D_IN, 64)
    x = rows(50)
    inside = sae(coordinates(store, x).float()).double()
    torch.testing.assert_close(wide(x).double(), store.center + inside @ store.basis.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wide.W_dec.norm(dim=1), torch.ones(64), rtol=1e-5, atol=1e-5)


def test_the_floor_holds_and_adds_up() -> None:
    store = SubspaceStore(small_store(), R)
    sae = trained(store)
    wide = evaluate(expand(sae, store.basis, store.center), rows(), progress=False)
    inside = evaluate(sae, torch.cat(list(store.in_order(1000))), progress=False)
    assert wide.fvu > store.discarded
    assert wide.fvu == pytest.approx(store.discarded + (1 - store.discarded) * inside.fvu, rel=1e-4)
    assert wide.l0 == pytest.approx(inside.l0, rel=1e-3)


def test_expanded_it_is_saved_and_loaded(tmp_path: Path) -> None:
    store = SubspaceStore(small_store(), R)
    wide = expand(trained(store), store.basis, store.center)
    wide.save(tmp_path / "sae")
    x = rows(20)
    assert torch.equal(SparseAutoencoder.load(tmp_path / "sae")(x), wide(x))


@given(st.integers(0, 50), st.integers(1, 5))
def test_any_rotation_of_the_basis_expands(seed: int, r: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(9, r, generator=generator, dtype=torch.float64)).Q
    sae = SparseAutoencoder(SAEConfig(r, 12, 2, seed=seed), dtype=torch.float64)
    sae.b_dec.data.normal_(generator=generator)
    sae.b_enc.data.normal_(generator=generator)
    sae.set_normalization(torch.randn(r, generator=generator, dtype=torch.float64), 1.7)
    center = torch.randn(9, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    direct = center + sae((x - center) @ basis) @ basis.T
    torch.testing.assert_close(expand(sae, basis, center)(x), direct, rtol=1e-9, atol=1e-9)


def test_bad_input_is_named() -> None:
    store = small_store()
    with pytest.raises(OptionError, match="d_init=17"):
        SubspaceStore(store, 17)
    sae = SparseAutoencoder(SAEConfig(R, 64, 4))
    basis = torch.eye(D_IN, dtype=torch.float64)
    with pytest.raises(OptionError, match="basis"):
        expand(sae, basis[:, : R + 1], torch.zeros(D_IN))
    with pytest.raises(OptionError, match="orthonormal"):
        expand(sae, 2 * basis[:, :R], torch.zeros(D_IN))
    with pytest.raises(OptionError, match="center"):
        expand(sae, basis[:, :R], torch.zeros(3))


def test_a_dictionary_of_whitened_rows_is_one_of_raw_rows(tmp_path: Path) -> None:
    base = small_store()
    store = ShapedStore(base, power_gains(base.spectrum, 0))
    sae = SparseAutoencoder(SAEConfig(D_IN, 64, 4, metadata=dict(base.metadata)))
    initialize(sae, "random", store.spectrum, None, store.sample(500))
    Trainer(sae, quick()).fit(store, progress=False)
    raw = expand(sae, store.matrix, store.center, store.inverse)
    x = rows()[:200]
    white = ((x.double() - store.center) @ store.matrix).float()
    code, same = sae.encode(white), raw.encode(x)
    assert torch.equal(code.indices.sort(1).values, same.indices.sort(1).values)
    direct = store.center + sae(white).double() @ store.inverse
    torch.testing.assert_close(raw(x).double(), direct, rtol=1e-3, atol=1e-3)
    raw.save(tmp_path / "raw")
    torch.testing.assert_close(SparseAutoencoder.load(tmp_path / "raw")(x), raw(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(OptionError, match="given with its inverse"):
        expand(sae, store.matrix, store.center, store.matrix)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_subspace_of_a_store_on_a_gpu() -> None:
    here, there = (SubspaceStore(ActivationStore.from_tensor(x), R) for x in (rows(), rows().cuda()))
    assert len(there.fingerprint) == 16
    torch.testing.assert_close(there.sample(50).cpu().abs(), here.sample(50).abs(), rtol=1e-3, atol=1e-3)
    sae = SparseAutoencoder(SAEConfig(R, 64, 4)).to("cuda")
    initialize(sae, "random", there.spectrum, None, there.sample(500))
    Trainer(sae, quick()).fit(there, progress=False)
    whole = expand(sae, there.basis, there.center)
    assert torch.isfinite(whole(rows(10).cuda())).all()
