"""Where dictionaries begin: exactness of the subspace, each switch alone, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from small_starts import D_IN, D_SAE, make, mse, rows

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import auto_d_init, initialize
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.starts import STARTS


def subspace_options(method: str) -> dict[str, int]:
    return {"d_init": 10} if STARTS[method].subspace else {}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("method", ["asi", "asi_authors"])
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_leaks_out_of_the_subspace(
    dtype: torch.dtype, limit: float, method: str, tied: bool, spectrum: Spectrum, sample: torch.Tensor
) -> None:
    sae = make(dtype)
    report = initialize(sae, method, spectrum, 10, sample.to(dtype), tied=tied)
    assert report.leak_decoder is not None
    assert report.leak_encoder is not None
    active = spectrum.active_subspace(10)
    for weights, reported in ((sae.W_dec, report.leak_decoder), (sae.encoder_rows, report.leak_encoder)):
        exact = weights.detach().double()
        outside = (exact - exact @ active @ active.T).norm(dim=1) / exact.norm(dim=1)
        assert outside.max() < limit
        assert reported == pytest.approx(outside.max().item(), rel=1e-3, abs=1e-16)
    # The directions fill the subspace: none of its dimensions is left out.
    assert torch.linalg.matrix_rank(sae.W_dec.double() @ active) == 10


@pytest.mark.parametrize("method", list(STARTS))
def test_every_method_is_tied_unit_and_from_its_seed(
    method: str, spectrum: Spectrum, sample: torch.Tensor
) -> None:
    options = subspace_options(method)
    sae, again, other = make(), make(), make()
    report = initialize(sae, method, spectrum, sample=sample, **options)
    initialize(again, method, spectrum, sample=sample, **options)
    initialize(other, method, spectrum, sample=sample, seed=1, **options)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.encoder_rows / report.encoder_norm, sae.W_dec.data)
    assert torch.equal(sae.W_dec, again.W_dec)
    assert not torch.allclose(sae.W_dec, other.W_dec)
    assert sae.encoder_rows.is_contiguous()
    assert not sae.b_enc.any()
    assert sae.initialization["method"] == method
    assert (sae.initialization["seed"], other.initialization["seed"]) == (0, 1)


@pytest.mark.parametrize("method", list(STARTS))
@pytest.mark.parametrize("center_encoder_bias", [False, True])
def test_no_other_norm_reconstructs_better(
    method: str, center_encoder_bias: bool, spectrum: Spectrum, sample: torch.Tensor
) -> None:
    sae = make(torch.float64)
    x = sample.double()
    options = {**subspace_options(method), "center_encoder_bias": center_encoder_bias}
    report = initialize(sae, method, spectrum, sample=x, **options)
    found = mse(sae, x)
    assert report.fvu == pytest.approx(found / (x - x.mean(0)).square().sum(1).mean().item())
    # Their grid is 0.01 wide in the norm, whose square scales the reconstruction.
    slack = 1 + (1e-3 if method == "asi_authors" else 1e-12)
    for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0):
        sae.encoder_rows.mul_(factor)
        sae.b_enc.data.mul_(factor)
        assert mse(sae, x) >= found / slack
        sae.encoder_rows.div_(factor)
        sae.b_enc.data.div_(factor)


def test_input_is_centered_and_scaled_from_the_spectrum(spectrum: Spectrum, sample: torch.Tensor) -> None:
    sae = make(torch.float64)
    initialize(sae, "asi", spectrum, 10, sample[:100])
    x_n = sae.normalize(sample)
    torch.testing.assert_close(x_n.mean(0), torch.zeros(D_IN, dtype=torch.float64), atol=1e-6, rtol=0)
    assert x_n.square().sum(1).mean().item() == pytest.approx(D_IN, rel=1e-6)
    assert not sae.b_dec.any()


def test_without_a_spectrum_the_sample_gives_mean_and_scale(sample: torch.Tensor) -> None:
    sae = make(torch.float64)
    initialize(sae, "random", sample=sample)
    x_n = sae.normalize(sample)
    assert x_n.square().sum(1).mean().item() == pytest.approx(D_IN)
    torch.testing.assert_close(sae.input_mean, sample.double().mean(0))


def test_without_either_the_input_stays_as_it_is() -> None:
    sae = make()
    report = initialize(sae, "random", norm_search=False)
    assert not sae.is_normalized
    assert (report.fvu, report.leak_decoder, report.encoder_norm) == (None, None, pytest.approx(1.0))


@pytest.mark.parametrize(
    ("center", "b_dec"), [(True, "mean"), (False, "mean"), (True, "zeros"), (False, "zeros")]
)
def test_centering_is_a_switch(center: bool, b_dec: str, spectrum: Spectrum, sample: torch.Tensor) -> None:
    sae = make(torch.float64)
    initialize(sae, "random", spectrum, sample=sample, center=center, b_dec=b_dec)
    assert bool(sae.input_mean.any()) == center
    # What the first layer subtracts in all, in raw units.
    taken = sae.b_dec / sae.input_scale + sae.input_mean
    expected = torch.zeros(D_IN, dtype=torch.float64) if not center and b_dec == "zeros" else spectrum.mean
    torch.testing.assert_close(taken.detach(), expected)
    square = ((sample.double() - sae.input_mean) * sae.input_scale).square().sum(1).mean().item()
    assert square == pytest.approx(D_IN, rel=1e-5)


def test_a_centered_encoder_bias_makes_mean_pre_activations_zero(
    spectrum: Spectrum, sample: torch.Tensor
) -> None:
    for method in ("asi", "asi_authors"):
        sae = make(torch.float64)
        part = sample[:50].double()
        initialize(sae, method, spectrum, 10, part, center=False, b_dec="zeros", center_encoder_bias=True)
        pre = sae.normalize(part) @ sae.W_enc + sae.b_enc
        assert pre.mean(0).abs().max() < 1e-9
        assert sae.b_enc.abs().max() > 1e-3


def test_an_untied_encoder_is_drawn_on_its_own(spectrum: Spectrum, sample: torch.Tensor) -> None:
    tied, untied = make(), make()
    initialize(tied, "asi", spectrum, 10, sample)
    initialize(untied, "asi", spectrum, 10, sample, tied=False)
    assert torch.equal(tied.W_dec, untied.W_dec)
    cosines = torch.nn.functional.cosine_similarity(untied.encoder_rows, untied.W_dec.data)
    assert cosines.abs().mean() < 0.5


def test_auto_takes_most_of_the_space_where_variance_is_flat_and_little_where_it_is_not() -> None:
    def dimensions(eigenvalues: torch.Tensor) -> int:
        d = len(eigenvalues)
        values = eigenvalues.double()
        return auto_d_init(Spectrum(values, torch.zeros(d, dtype=torch.float64), 10**6, torch.diag(values)))

    d = 100
    assert dimensions(torch.ones(d)) == math.ceil(0.8 * d)
    assert dimensions(torch.eye(d)[0]) == 1
    decaying = [dimensions(torch.exp(-torch.arange(d) / scale)) for scale in (2.0, 10.0, 50.0)]
    assert decaying == sorted(decaying)
    assert 1 < decaying[0] < decaying[-1] < d
    # One direction of huge variance does not hide the others.
    massive = torch.cat([torch.tensor([1e4]), torch.ones(d - 1)])
    assert dimensions(massive) > 0.5 * d


def test_auto_can_be_named(spectrum: Spectrum, sample: torch.Tensor) -> None:
    report = initialize(make(), "asi", spectrum, "auto", sample)
    assert report.d_init == auto_d_init(spectrum)


@pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
def test_d_init_above_the_rank_is_refused() -> None:
    flat = rows() @ torch.diag((torch.arange(D_IN) < 10).float())
    spectrum = Spectrum.of(flat)
    assert spectrum.rank == 10
    initialize(make(), "asi", spectrum, 10, flat)
    with pytest.raises(OptionError, match=r"d_init=11 .*at most 10, the rank of the spectrum"):
        initialize(make(), "asi", spectrum, 11, flat)
    few = rows()[:8]
    with pytest.raises(OptionError, match=r"d_init=8 .*at most 7, the rank of .*n=8 rows"):
        initialize(make(), "asi", Spectrum.of(few), 8, few)
    # The automatic choice never is.
    assert auto_d_init(spectrum) <= 10
    assert auto_d_init(Spectrum.of(few)) <= 7


@pytest.mark.parametrize("d_init", [0, -1, D_IN + 1, None, "automatic", True])
def test_d_init_that_cannot_be_is_refused(d_init: object, spectrum: Spectrum, sample: torch.Tensor) -> None:
    with pytest.raises(OptionError, match=f"d_init={d_init!r}.*(1 to d_in={D_IN}|a whole number)"):
        initialize(make(), "asi", spectrum, d_init, sample)


def test_bad_input(spectrum: Spectrum, sample: torch.Tensor) -> None:
    sae = make()
    with pytest.raises(UnknownNameError, match="did you mean 'asi'"):
        initialize(sae, "as", spectrum, 10, sample)
    with pytest.raises(OptionError, match="d_init=10"):
        initialize(sae, "random", spectrum, 10, sample)
    with pytest.raises(OptionError, match="spectrum=None"):
        initialize(sae, "asi", None, 10, sample)
    with pytest.raises(OptionError, match="norm_search=True"):
        initialize(sae, "asi", spectrum, 10)
    with pytest.raises(OptionError, match="center_encoder_bias=True"):
        initialize(sae, "asi", spectrum, 10, norm_search=False, center_encoder_bias=True)
    with pytest.raises(OptionError, match="b_dec='median'"):
        initialize(sae, "asi", spectrum, 10, sample, b_dec="median")
    with pytest.raises(OptionError, match="width 23"):
        initialize(sae, "asi", Spectrum.of(sample[:, 1:]), 10, sample)
    with pytest.raises(DataError, match="d_in=24"):
        initialize(sae, "asi", spectrum, 10, sample[:, 1:])
    broken = sample.clone()
    broken[5] = float("nan")
    with pytest.raises(DataError, match="1 of 2000"):
        initialize(sae, "asi", spectrum, 10, broken)
    with pytest.raises(OptionError, match="variance"):
        initialize(sae, "random", sample=torch.ones(10, D_IN))
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    for same in (sample[:1], sample[:1].expand(10, -1)):
        with pytest.raises(DataError, match="rows of the sample never vary"):
            initialize(sae, "asi", spectrum, 10, same)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("method", list(STARTS))
def test_a_gpu_starts_where_a_cpu_does(method: str, spectrum: Spectrum, sample: torch.Tensor) -> None:
    options = subspace_options(method)
    here, there = make(torch.float64), make(torch.float64).to("cuda")
    on_gpu = Spectrum.of(sample.cuda())
    ours = initialize(here, method, spectrum, sample=sample.double(), **options)
    for known in (spectrum, on_gpu):
        theirs = initialize(there, method, known, sample=sample.double().cuda(), **options)
        torch.testing.assert_close(there.W_dec.cpu(), here.W_dec, rtol=1e-6, atol=1e-6)
        assert theirs.encoder_norm == pytest.approx(ours.encoder_norm, rel=1e-5)
        assert theirs.leak_decoder is None or theirs.leak_decoder < 1e-12


@pytest.mark.parametrize("activation", list(KINDS))
@pytest.mark.parametrize("norm_search", [True, False])
def test_nothing_is_left_of_an_earlier_training(
    activation: str, norm_search: bool, spectrum: Spectrum, sample: torch.Tensor
) -> None:
    new, used = (SparseAutoencoder(SAEConfig(D_IN, D_SAE, 4, activation)) for _ in range(2))
    for tensor in used.state_dict().values():
        tensor.fill_(0.7)
    for sae in (new, used):
        initialize(sae, "random", spectrum, sample=sample if norm_search else None, norm_search=norm_search)
    for name, tensor in new.state_dict().items():
        assert torch.equal(used.state_dict()[name], tensor), name
