"""Dictionaries of SAELens and sparsify that start in the active subspace, held against our own start."""

from __future__ import annotations

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from some_dictionaries import D_SAE, D, K
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import asi_lens as al
from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.sae import foreign
from asi_lens.sae.starts import Draw
from asi_lens.sae.starts.start import Start

D_INIT = 4


@pytest.fixture(scope="module")
def saes() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("sae_lens")
        import sae_lens.saes as module
    return module


@pytest.fixture(scope="module")
def sparsify() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sparsify")


@pytest.fixture(scope="module")
def sample() -> Tensor:
    """Rows with a mean, mostly in a few directions that no axis shows."""
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(D, D, generator=generator))
    rows = torch.randn(400, D, generator=generator) * torch.logspace(0.5, -2, D)
    return rows @ turn.T + torch.linspace(-1, 2, D)


def saelens(saes: ModuleType, kind: str = "TopK", **options: Any) -> Any:
    if kind in ("TopK", "BatchTopK", "AbsTopK"):
        options = {"k": K} | options
    if kind == "MatryoshkaBatchTopK":
        options = {"k": K, "matryoshka_widths": [D_SAE // 2, D_SAE]} | options
    module = getattr(saes, f"{kind}TrainingSAE", None) or getattr(
        __import__("sae_lens"), f"{kind}TrainingSAE"
    )
    config = getattr(saes, f"{kind}TrainingSAEConfig", None) or getattr(
        __import__("sae_lens"), f"{kind}TrainingSAEConfig"
    )
    return module(config(d_in=D, d_sae=D_SAE, **options))


def coder(sparsify: ModuleType, **options: Any) -> Any:
    return sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K, **options))


def ours(sample: Tensor) -> tuple[al.SparseAutoencoder, Any]:
    sae = al.SparseAutoencoder(al.SAEConfig(D, D_SAE, K))
    return sae, al.initialize(sae, "asi", al.Spectrum.of(sample), D_INIT, sample, seed=5)


def test_saelens_starts_as_our_own_does(saes: ModuleType, sample: Tensor) -> None:
    sae, report = ours(sample)
    theirs = saelens(saes, rescale_acts_by_decoder_norm=False)
    before = [id(parameter) for parameter in theirs.parameters()]
    found = foreign.initialize(theirs, al.Spectrum.of(sample), D_INIT, sample, seed=5)
    assert [id(parameter) for parameter in theirs.parameters()] == before
    torch.testing.assert_close(theirs.W_dec.data, 0.1 * sae.W_dec.data)
    torch.testing.assert_close(theirs(sample), sae(sample), rtol=1e-4, atol=1e-4)
    assert found.fvu == pytest.approx(report.fvu, rel=1e-4)
    assert (found.library, found.kind, found.d_init) == ("SAELens", "TopKTrainingSAE", D_INIT)
    assert found.leak_decoder is not None
    assert found.leak_decoder < 1e-6


def test_sparsify_starts_as_our_own_does(sparsify: ModuleType, sample: Tensor) -> None:
    sae, report = ours(sample)
    theirs = coder(sparsify)
    found = foreign.initialize(theirs, al.Spectrum.of(sample), D_INIT, sample, seed=5)
    torch.testing.assert_close(theirs.W_dec.data, sae.W_dec.data)
    torch.testing.assert_close(theirs(sample).sae_out, sae(sample), rtol=1e-4, atol=1e-4)
    assert found.fvu == pytest.approx(report.fvu, rel=1e-4)


def test_overshoot_multiplies_the_scale(saes: ModuleType, sparsify: ModuleType, sample: Tensor) -> None:
    for make, name in ((lambda: saelens(saes), "W_enc"), (lambda: coder(sparsify), "encoder.weight")):
        best, more = make(), make()
        more.load_state_dict(best.state_dict())  # their draws have other norms
        one = foreign.initialize(best, None, D_INIT, sample)
        other = foreign.initialize(more, None, D_INIT, sample, overshoot=1.5)
        assert other.scale == pytest.approx(1.5 * one.scale)
        torch.testing.assert_close(more.get_parameter(name), 1.5 * best.get_parameter(name))
    with pytest.raises(OptionError, match=r"overshoot=2 .* 1 without a sample, and for jumprelu"):
        foreign.initialize(best, al.Spectrum.of(sample), overshoot=2)
    with pytest.raises(OptionError, match=r"overshoot=2 .* 1 without a sample, and for jumprelu"):
        foreign.initialize(saelens(saes, "JumpReLU"), None, D_INIT, sample, norm_search=False, overshoot=2)
    with pytest.raises(OptionError, match=r"overshoot=0 .* finite and above 0"):
        foreign.initialize(best, None, D_INIT, sample, overshoot=0)
    with pytest.raises(DataError, match="rows of the sample never vary"):
        foreign.initialize(best, al.Spectrum.of(sample), D_INIT, sample[:1].expand(9, -1))


KINDS = ["TopK", "BatchTopK", "MatryoshkaBatchTopK", "AbsTopK", "Standard", "Gated"]


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("normalization", ["none", "expected_average_only_in", "layer_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_is_the_best_one(
    saes: ModuleType, sample: Tensor, kind: str, normalization: str, apply: bool
) -> None:
    sae = saelens(saes, kind, normalize_activations=normalization, apply_b_dec_to_input=apply)
    found = foreign.initialize(sae, None, D_INIT, sample, seed=1)
    factor = D**0.5 / sample.norm(dim=1).mean() if normalization == "expected_average_only_in" else 1.0
    x = factor * sample

    def error(scale: float) -> float:
        weights = [getattr(sae, name) for name in ("W_enc", "b_enc", "b_gate", "b_mag") if hasattr(sae, name)]
        for weight in weights:
            weight.data.mul_(scale)
        left = (x - sae(x)).square().sum().item()
        for weight in weights:
            weight.data.div_(scale)
        return left

    assert error(1.0) < min(error(0.97), error(1.03))
    variance = (x - x.mean(0)).square().sum().item()
    assert found.fvu == pytest.approx(error(1.0) / variance, rel=1e-3)
    assert found.leak_decoder is not None
    assert found.leak_encoder is not None
    assert max(found.leak_decoder, found.leak_encoder) < 1e-5
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1))


@pytest.mark.parametrize("normalization", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("apply", [True, False])
def test_the_mean_is_taken_off(saes: ModuleType, sample: Tensor, apply: bool, normalization: str) -> None:
    """Pre-activations have mean zero over the sample, whichever way the dictionary takes a mean off."""
    sae = saelens(saes, apply_b_dec_to_input=apply, normalize_activations=normalization)
    foreign.initialize(sae, al.Spectrum.of(sample), D_INIT, sample)
    factor = D**0.5 / sample.norm(dim=1).mean() if normalization != "none" else 1.0
    pre = sae.process_sae_in(factor * sample) @ sae.W_enc + sae.b_enc
    assert pre.mean(0).abs().max() < 1e-4 * pre.std()


def test_a_start_without_a_sample_keeps_the_norms(sparsify: ModuleType, sample: Tensor) -> None:
    spectrum = al.Spectrum.of(sample)
    theirs = coder(sparsify)
    norm = theirs.encoder.weight.norm(dim=1).mean().item()
    found = foreign.initialize(theirs, spectrum)
    assert (found.scale, found.fvu) == (1.0, None)
    torch.testing.assert_close(theirs.encoder.weight.norm(dim=1), torch.full((D_SAE,), norm))
    torch.testing.assert_close(theirs.b_dec.data, spectrum.mean.float())
    foreign.initialize(theirs, spectrum, center=False, method="random")
    assert not theirs.b_dec.any()


def test_jumprelu_keeps_its_thresholds(saes: ModuleType, sample: Tensor) -> None:
    sae = saelens(saes, "JumpReLU")
    with pytest.raises(OptionError, match=r"norm_search=True .* must be False for jumprelu"):
        foreign.initialize(sae, None, D_INIT, sample)
    found = foreign.initialize(sae, None, D_INIT, sample, norm_search=False)
    assert found.scale == 1
    assert found.fvu is not None
    assert bool((sae.threshold == sae.cfg.jumprelu_init_threshold).all())


def test_half_precision(saes: ModuleType, sample: Tensor) -> None:
    sae = saelens(saes, dtype="bfloat16")
    found = foreign.initialize(sae, None, D_INIT, sample)
    assert sae.W_dec.dtype == torch.bfloat16
    assert found.leak_decoder is not None
    assert 0 < found.leak_decoder < 2**-7


def test_their_own_loops_train_it(saes: ModuleType, sparsify: ModuleType, sample: Tensor) -> None:
    """An optimizer made before the start moves the weights that the start has set."""
    for theirs, reconstruct in (
        (saelens(saes), lambda sae: sae(sample)),
        (coder(sparsify), lambda sae: sae(sample).sae_out),
    ):
        optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3)
        first = foreign.initialize(theirs, None, D_INIT, sample)
        for _ in range(50):
            optimizer.zero_grad()
            loss = (reconstruct(theirs) - sample).square().sum()
            loss.backward()
            optimizer.step()
        variance = (sample - sample.mean(0)).square().sum().item()
        assert first.fvu is not None
        assert loss.item() / variance < first.fvu


def test_foreign_dictionaries_that_cannot_start(
    saes: ModuleType, sparsify: ModuleType, sample: Tensor
) -> None:
    spectrum = al.Spectrum.of(sample)
    with pytest.raises(OptionError, match=r"covariance_whitening.*same variance"):
        foreign.initialize(saelens(saes, normalize_activations="covariance_whitening"), spectrum)
    with pytest.raises(OptionError, match=r"sample=None .*'expected_average_only_in'"):
        foreign.initialize(saelens(saes, normalize_activations="expected_average_only_in"), spectrum)
    with pytest.raises(OptionError, match=r"spectrum=.* normalises every token"):
        foreign.initialize(saelens(saes, normalize_activations="layer_norm"), spectrum, sample=sample)
    with pytest.raises(OptionError, match="transcode=True"):
        foreign.initialize(coder(sparsify, transcode=True), spectrum)
    with pytest.raises(OptionError, match="decoder=False"):
        foreign.initialize(
            sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K), decoder=False),
            spectrum,
        )
    hooked = saelens(saes)
    hooked.hook_sae_input.add_hook(lambda x, hook: 2 * x)
    with pytest.raises(OptionError, match="hooks on hook_sae_input"):
        foreign.initialize(hooked, spectrum)
    wide = al.Spectrum.of(torch.randn(400, D + 1))
    with pytest.raises(OptionError, match=f"of width {D + 1}.*d_in={D}"):
        foreign.initialize(saelens(saes), wide)
    with pytest.raises(OptionError, match="width"):
        foreign.initialize(saelens(saes), spectrum, sample=torch.randn(400, D + 1))
    with pytest.raises(OptionError, match=f"d_init={D + 1}"):
        foreign.initialize(saelens(saes), spectrum, D + 1)
    with pytest.raises(UnknownNameError, match="asi"):
        foreign.initialize(saelens(saes), spectrum, method="azi")
    with pytest.raises(OptionError, match="method='asi_authors'"):
        foreign.initialize(saelens(saes), spectrum, method="asi_authors")
    with pytest.raises(OptionError, match="sample=None"):
        foreign.initialize(saelens(saes))
    for bad in (torch.full((40, D), torch.nan), sample[:1]):
        with pytest.raises(DataError, match="sample"):
            foreign.initialize(saelens(saes), spectrum, sample=bad)


@pytest.mark.parametrize("given", [nn.Linear(D, D_SAE), al.SparseAutoencoder(al.SAEConfig(D, D_SAE)), None])
def test_objects_of_no_library(given: Any, sample: Tensor) -> None:
    with pytest.raises(OptionError, match=r"coder=.* is not allowed; coder must be a TrainingSAE of SAELens"):
        foreign.initialize(given, al.Spectrum.of(sample))


def test_inference_dictionaries_are_refused(saes: ModuleType, sample: Tensor) -> None:
    import sae_lens

    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=D_SAE, k=K))
    with pytest.raises(OptionError, match=r"coder=sae_lens.*TrainingSAE"):
        foreign.initialize(sae, al.Spectrum.of(sample))


def test_directions_are_drawn_on_the_cpu(sample: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subspace of another device, here one that is made up, is taken to the rows."""
    seen: list[Tensor] = []
    spectrum = al.Spectrum.of(sample)

    def fill(rows: Tensor, draw: Draw) -> Tensor:
        seen.extend([rows, draw.subspace])
        return rows.norm(dim=1)

    start, rows = Start("asi", fill, subspace=True), torch.empty(D_SAE, D)
    coder = foreign._Coder("SAELens", rows, rows, [], rows[0], True, True, 1.0, None, torch.relu)
    monkeypatch.setattr(foreign, "find_start", lambda method: start)
    with FakeTensorMode(allow_non_fake_inputs=True):
        active = torch.empty(D, 4, dtype=torch.float64, device="cuda")
        monkeypatch.setattr(foreign, "active_subspace_of", lambda *options: active)
        found, directions = foreign._directions(coder, "asi", spectrum, 4, None, 0)
    assert found is active
    assert [one.device.type for one in (*seen, directions)] == ["cpu"] * 3
