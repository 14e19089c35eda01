"""Stores with another spectrum: the variances asked for, the same directions, and nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_trainings import D_IN, rows, small_store

from asi_lens.activations import ahead
from asi_lens.activations.moments import Moments
from asi_lens.activations.shaped import (
    LinearStore,
    ShapedStore,
    flat_head_gains,
    lifted_tail_gains,
    power_gains,
)
from asi_lens.activations.spectrum import Spectrum
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError, OptionError
from asi_lens.sae.subspace import SubspaceStore

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5])
def test_eigenvalues_are_raised_to_the_power_and_the_total_stays(power: float) -> None:
    store = small_store()
    values = store.spectrum.eigenvalues
    shaped = ShapedStore(store, power_gains(store.spectrum, power))
    measured = Spectrum.of(torch.cat(list(shaped.in_order(300))).double())
    expected = values**power / (values**power).sum() * values.sum()
    torch.testing.assert_close(measured.eigenvalues, expected, rtol=1e-3, atol=1e-6 * expected[0].item())
    torch.testing.assert_close(shaped.spectrum.eigenvalues, expected, rtol=1e-9, atol=0)
    assert torch.equal(shaped.spectrum.eigenvectors, store.spectrum.eigenvectors)
    assert shaped.mean_square_norm == pytest.approx(store.mean_square_norm)
    assert (shaped.n, shaped.d) == (store.n, store.d)
    if power == 1:
        torch.testing.assert_close(
            shaped.sample(9), store.sample(9) - store.mean.float(), rtol=1e-4, atol=1e-4
        )


def test_head_and_tail_come_apart() -> None:
    spectrum = small_store().spectrum
    values = spectrum.eigenvalues
    head, tail = flat_head_gains(spectrum, 0.25), lifted_tail_gains(spectrum, 0.5)
    flat, lifted = values * head**2, values * tail**2
    cut, half = D_IN // 4, D_IN // 2
    torch.testing.assert_close(flat[:cut], flat[cut].expand(cut))
    assert (flat[cut:] / values[cut:]).std() < 1e-9, "the tail keeps its shape"
    torch.testing.assert_close(lifted[half:], lifted[half - 1].expand(D_IN - half))
    assert (lifted[:half] / values[:half]).std() < 1e-9, "the head keeps its shape"
    for changed in (flat, lifted):
        assert changed.sum().item() == pytest.approx(values.sum().item())


def test_held_out_rows_take_the_training_spectrum() -> None:
    train = small_store()
    held = ActivationStore.from_tensor(rows()[:400] * 3)
    gains = power_gains(train.spectrum, 0)
    shaped = ShapedStore(held, gains, train.spectrum)
    exact = (rows()[:400].double() * 3 - train.mean) @ ShapedStore(train, gains).matrix
    torch.testing.assert_close(torch.cat(list(shaped.in_order(64))), exact.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shaped.mean, exact.mean(0), rtol=1e-4, atol=1e-4)
    assert shaped.spectrum.n == 400


def test_a_linear_store_is_the_map_of_its_rows() -> None:
    store, generator = small_store(), torch.Generator().manual_seed(3)
    matrix = torch.randn(D_IN, 5, generator=generator, dtype=torch.float64)
    center = torch.randn(D_IN, generator=generator, dtype=torch.float64)
    linear = LinearStore(store, matrix, center)
    exact = (rows().double() - center) @ matrix
    torch.testing.assert_close(torch.cat(list(linear.in_order(300))), exact.float(), rtol=1e-4, atol=1e-4)
    direct = Moments.of(exact)
    torch.testing.assert_close(linear.mean, direct.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(linear.moments.scatter, direct.scatter, rtol=1e-4, atol=1e-2)
    assert linear.fingerprint != LinearStore(store, matrix, center + 1).fingerprint != store.fingerprint


@pytest.mark.parametrize("n_parts", [1, 3])
def test_batches_drawn_from_a_copy_are_those_that_are_read(
    n_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ActivationStore.from_tensor(rows().bfloat16())
    parts = rows().bfloat16().tensor_split(n_parts)
    store = ActivationStore(parts, lambda: whole.moments, whole.mean, whole.mean_square_norm, {})
    seen = [SubspaceStore(store, 3), ShapedStore(store, power_gains(store.spectrum, 0.5))]
    seen.append(LinearStore(seen[0], torch.ones(3, 2, dtype=torch.float64), torch.ones(3)))
    options: dict[str, Any] = {"start": 7, "n_tokens": 1100, "device": torch.device("cpu")}
    for linear in seen:
        for given in (options, options | {"share": lambda n: (1, n), "dtype": torch.float64}):
            read = list(linear.batches(16, **given))
            with monkeypatch.context() as roomy:
                roomy.setattr(ahead, "room", lambda device: 2**30)
                drawn = list(linear.batches(16, **given))
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(drawn, read, strict=True))


def test_what_cannot_be_shaped_is_refused() -> None:
    flat = rows().clone()
    flat[:, 3] = 1.0
    constant = ActivationStore.from_tensor(flat).spectrum
    few = ActivationStore.from_tensor(rows()[: D_IN // 2]).spectrum
    for spectrum in (constant, few):
        with pytest.raises(DataError, match="have zero variance and cannot be whitened"):
            power_gains(spectrum, 0.9)
        with pytest.raises(DataError, match="no gain can lift"):
            lifted_tail_gains(spectrum)
        assert torch.isfinite(power_gains(spectrum, 1.5)).all()
    with pytest.raises(OptionError, match="power=-1"):
        power_gains(constant, -1)
    with pytest.raises(OptionError, match="share=1"):
        flat_head_gains(small_store().spectrum, 1)
    with pytest.raises(OptionError, match="gains="):
        ShapedStore(small_store(), torch.zeros(D_IN))
    with pytest.raises(OptionError, match="center="):
        LinearStore(small_store(), torch.eye(D_IN, dtype=torch.float64), torch.zeros(2))
