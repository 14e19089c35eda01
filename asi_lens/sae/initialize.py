"""How a dictionary begins: decoder directions, encoder, norm, biases. Every part is a switch of its own.

Active Subspace Initialization (arXiv 2508.16929): decoder directions are drawn as usual, projected on the
top `d_init` principal directions of the centered activations and put to unit norm; the encoder starts
tied, at the norm that makes the first reconstruction best. Nothing is constrained after that. The
projection runs in float64 on float64 eigenvectors, so that the leak outside the subspace at step 0 is
that of rounding the weights to their dtype.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import OptionError, require, unknown_name
from asi_lens.kernels.draws import DRAW_ROWS, draw_gaussian
from asi_lens.kernels.gradients import decode_sum
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.threshold import set_threshold
from asi_lens.training.mesh import Mesh

METHODS = ("random", "orthogonal", "asi", "asi_authors")
"""Gaussian directions; orthonormal sets of d_in; ASI; ASI in the order of the authors' code."""

AUTO_SHARE = 0.8
"""Share of the singular values' sum that `auto_d_init` keeps."""


@dataclass(frozen=True)
class InitReport:
    """What `initialize` did, and how exact it came out.

    Attributes:
        d_init: dimensions of the active subspace; none for methods without one.
        leak_decoder, leak_encoder: largest share of a row's norm outside the subspace, measured in
            float64 on the weights as stored; none for methods without one.
        encoder_norm: mean norm of the encoder's rows (decoder rows have norm 1).
        fvu: fraction of the sample's variance that the first reconstruction leaves unexplained; none
            without a sample.
    """

    method: str
    d_init: int | None
    seed: int
    tied: bool
    norm_search: bool
    b_dec: str
    center: bool
    center_encoder_bias: bool
    leak_decoder: float | None
    leak_encoder: float | None
    encoder_norm: float
    fvu: float | None


def auto_d_init(spectrum: Spectrum) -> int:
    """Dimensions to start in: the smallest r whose leading singular values hold `AUTO_SHARE` of the sum.

    Two things pull. A feature drawn isotropically from the top r directions starts with the mean of their
    r eigenvalues as the variance of its pre-activation: the fewer directions, the stronger and the less
    wasted on what never varies. A direction that is left out is learned only by features that drift into
    it, so all that is left out together must be worth little. Worth is measured by singular values, the
    weights whose entropy is the effective rank: by variance, one massive direction (in the residual stream
    past a massive activation it holds over 90 %) would make all others look worthless. A flat spectrum
    gets 0.8 d, a collapsed one as little as it needs, and nothing depends on d itself.

    The share is set by a sweep on the packaged model, layer 15 (4,096 features, 600k tokens, one seed): on
    attention outputs it picks 192 of 576, where of 64 to 512 the fewest features are silent on held-out
    rows and the held-out FVU is 1 % above its smallest (128). 64 kills features again, 512 is hardly better
    than random. MLP outputs get 337 and residual streams 288, which were not trained; the values tried there
    (128 to 512) were all at least as good as random, by little. One layer and one seed set the share, so this
    sweep is no test of it.
    """
    cumulative = spectrum.eigenvalues.clamp_min(0).sqrt().cumsum(0)
    return int((cumulative < AUTO_SHARE * cumulative[-1]).sum().item()) + 1


@torch.no_grad()
def initialize(
    sae: SparseAutoencoder,
    method: str = "asi",
    spectrum: Spectrum | None = None,
    d_init: int | str | None = None,
    sample: Float[Tensor, "n d_in"] | None = None,
    *,
    tied: bool = True,
    norm_search: bool = True,
    b_dec: str = "mean",
    center: bool = True,
    center_encoder_bias: bool = False,
    initial_l0: float | int | None = None,
    seed: int | None = None,
    mesh: Mesh | None = None,
) -> InitReport:
    """Set every weight of `sae` and its input normalization, in place.

    Args:
        method: one of `METHODS`. `asi` draws what `random` draws from the same seed, then projects.
            `asi_authors` takes the first d_init columns of a uniform draw as coordinates in the subspace
            and searches the norm on the authors' grid, before the encoder bias is centered.
        spectrum: of the activations; for ASI, and for the input's mean and scale (from `sample` if there
            is none; left as they are if there is neither).
        d_init: dimensions of the active subspace, 1 to d_in, or "auto" (`auto_d_init`). ASI only.
        sample: raw activations, for the norm search, the encoder bias and the report.
        tied: the encoder starts as the decoder's transpose; else it is drawn on its own, the same way.
        norm_search: scale the encoder so that the first reconstruction of `sample` has the smallest mean
            squared error. The first reconstruction is proportional to the scale, so the best one is
            known in closed form: what a grid over the norm would tend to (the authors' variant does
            use their grid). Without the search the scale is 1.
        b_dec: "mean", the mean of the normalized input (zero where `center` took it out already), or
            "zeros".
        center: take the mean out of the input (`input_mean`); else that is zero.
        center_encoder_bias: b_enc = - mean pre-activation on `sample`, so that every feature starts with
            mean pre-activation zero; else zeros.
        initial_l0: features that fire on a token of the sample, for activation functions with a threshold
            (`threshold.set_threshold`); by default the dictionary's k.
        seed: of the directions; by default that of the configuration.
        mesh: where `sae` has the features of one rank of several (`mesh.shard`): they get the weights that
            they would have in the whole dictionary. Every rank gives the same spectrum and sample.

    Raises OptionError, UnknownNameError, or DataError for a sample that is not finite.
    """
    mesh = mesh or Mesh()
    total = sae.d_sae * mesh.config.model
    first, _ = mesh.features(total)
    if method not in METHODS:
        raise unknown_name("initialization method", method, METHODS)
    require(b_dec in ("mean", "zeros"), "b_dec", b_dec, "'mean' or 'zeros'")
    switches = {"norm_search": norm_search, "center_encoder_bias": center_encoder_bias}
    needy = [name for name, on in switches.items() if on]
    require(sample is not None or not needy, "sample", sample, f"given for {' and '.join(needy)}=True")
    if spectrum is not None:
        require(spectrum.d == sae.d_in, "spectrum", f"of width {spectrum.d}", f"of width d_in={sae.d_in}")
    if not sae.activation.has_threshold:
        require(initial_l0 is None, "initial_l0", initial_l0, "left out for an activation without thresholds")
    elif method == "asi_authors":
        raise OptionError(f"method={method!r} is not for activation={sae.config.activation!r}; take 'asi'")
    active = active_subspace_of(method, spectrum, d_init, sae.d_in)
    seed = sae.config.seed if seed is None else seed
    require(seed >= 0, "seed", seed, "at least 0")

    mean = _set_input(sae, spectrum, sample, center)
    offset = (mean - sae.input_mean.double().cpu()) * sae.input_scale.double().cpu()
    sae.b_dec.copy_(offset if b_dec == "mean" else torch.zeros_like(offset))
    sae.b_enc.zero_()
    norms = directions(sae.W_dec.data, method, seed, active, first, total)
    if tied:
        sae.encoder_rows.copy_(sae.W_dec.data)
        norms = norms.square()
    else:
        # Any other stream of the same seed.
        norms = norms * directions(sae.encoder_rows, method, seed + 2**31, active, first, total)

    fvu = None
    if method == "asi_authors":
        # Rows of norm n in both, as theirs are, give n^2 relu(x . w) w with unit w.
        scale: Tensor | float = norms.to(sae.W_dec).unsqueeze(1)
        if norm_search and sample is not None:
            scale = _authors_grid(*_first_fit(sae, sample, mesh))
        sae.encoder_rows.mul_(scale)
        if center_encoder_bias and sample is not None:
            sae.b_enc.copy_(-_mean_pre(sae, sample))
    else:
        if center_encoder_bias and sample is not None:
            sae.b_enc.copy_(-_mean_pre(sae, sample))
        if sae.activation.has_threshold and sample is not None:
            set_threshold(sae, sample, sae.k if initial_l0 is None else initial_l0)
        if norm_search and sample is not None:
            _, cross, power = _first_fit(sae, sample, mesh)
            scale = cross / power if cross > 0 else 1.0
            sae.encoder_rows.mul_(scale)
            sae.b_enc.mul_(scale)
            sae.activation.rescale(scale)
    if sample is not None:
        square, cross, power = _first_fit(sae, sample, mesh)
        x = sae.normalize(sample).double()
        fvu = (square - 2 * cross + power) / (x - x.mean(0)).square().sum().item()
    # Of the weights as they are stored now: scaling the encoder rounded it once more.
    leaks = None
    if active is not None:
        leaks = [mesh.largest(largest_leak(w, active)) for w in (sae.W_dec.data, sae.encoder_rows)]
    norm = torch.linalg.vector_norm(sae.encoder_rows, dim=1).double().sum()
    report = InitReport(
        method=method,
        d_init=None if active is None else active.shape[1],
        seed=seed,
        tied=tied,
        norm_search=norm_search,
        b_dec=b_dec,
        center=center,
        center_encoder_bias=center_encoder_bias,
        leak_decoder=None if leaks is None else leaks[0],
        leak_encoder=None if leaks is None else leaks[1],
        encoder_norm=mesh.over_features(norm).item() / total,
        fvu=fvu,
    )
    settings = ("method", "d_init", "seed", "tied", "norm_search", "b_dec", "center", "center_encoder_bias")
    sae.initialization = {key: value for key, value in asdict(report).items() if key in settings}
    return report


def active_subspace_of(
    method: str, spectrum: Spectrum | None, d_init: int | str | None, d_in: int
) -> Float[Tensor, "d_in d_init"] | None:
    """V_active, or none for methods without one; options that do not go together raise."""
    if not method.startswith("asi"):
        require(d_init is None, "d_init", d_init, f"left out for method={method!r}")
        return None
    require(spectrum is not None, "spectrum", spectrum, f"given for method={method!r}")
    assert spectrum is not None
    if d_init == "auto":
        d_init = auto_d_init(spectrum)
    allowed = f"'auto' or a whole number from 1 to d_in={d_in}"
    if not isinstance(d_init, int) or isinstance(d_init, bool):
        raise OptionError(f"d_init={d_init!r} is not allowed; d_init must be {allowed}")
    require(1 <= d_init <= d_in, "d_init", d_init, allowed)
    return spectrum.active_subspace(d_init).cpu()


def _set_input(
    sae: SparseAutoencoder, spectrum: Spectrum | None, sample: Tensor | None, center: bool
) -> Float[Tensor, " d_in"]:
    """Set mean and scale of the input; returns the mean of the raw activations, float64."""
    if spectrum is not None:
        mean, variance = spectrum.mean.double().cpu(), spectrum.eigenvalues.sum().item()
    elif sample is not None:
        rows = sample.double()
        mean = rows.mean(0).cpu()
        variance = (rows - rows.mean(0)).square().sum(1).mean().item()
    else:
        return sae.input_mean.double().cpu()
    if not center:
        variance += mean.square().sum().item()
    require(0 < variance < math.inf, "variance of the activations", variance, "finite and above 0")
    scale = math.sqrt(sae.d_in / variance)
    sae.set_normalization(mean if center else torch.zeros_like(mean), scale)
    return mean


def directions(
    out: Float[Tensor, "d_sae d_in"],
    method: str,
    seed: int,
    active: Tensor | None,
    first: int = 0,
    total: int | None = None,
) -> Float[Tensor, " d_sae"]:
    """Fill `out` with unit directions, `first` and on of `total`; returns the norms before, float64.

    Raises OptionError for orthogonal or the authors' directions of which `out` has a part.
    """
    whole = total in (None, len(out))
    require(whole or method in ("random", "asi"), "method", method, "'random' or 'asi' over several ranks")
    d_in = out.shape[1]
    generator = torch.Generator().manual_seed(seed)
    if method != "asi_authors":
        draw_gaussian(out, seed, first, total)
    norms = []
    # Sets of d_in rows are orthonormal, so that is how many are taken at a time.
    for rows in out.split(d_in if method == "orthogonal" else DRAW_ROWS):
        if method == "orthogonal":
            square = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(square)
            # With the signs of R's diagonal the directions are uniform (Mezzadri 2007).
            exact = (q * r.diagonal().sign()).T[: len(rows)]
        elif method == "asi_authors" and active is not None:
            uniform = torch.rand(rows.shape, generator=generator) * 2 - 1
            exact = uniform[:, : active.shape[1]].double() @ active.T
        else:
            exact = rows.double().cpu()
            if active is not None:
                exact = (exact @ active) @ active.T
        norm = torch.linalg.vector_norm(exact, dim=1)
        rows.copy_(exact / norm.unsqueeze(1))
        norms.append(norm)
    return torch.cat(norms)


def largest_leak(rows: Float[Tensor, "n d"], active: Float[Tensor, "d r"]) -> float:
    """Largest share of a row's norm outside the subspace, in float64."""
    largest = 0.0
    for block in rows.split(DRAW_ROWS):
        exact = block.double().cpu()
        outside = exact - (exact @ active) @ active.T
        share = torch.linalg.vector_norm(outside, dim=1) / torch.linalg.vector_norm(exact, dim=1)
        largest = max(largest, share.max().item())
    return largest


def _first_fit(sae: SparseAutoencoder, sample: Tensor, mesh: Mesh) -> tuple[float, float, float]:
    """Sums over the sample of |x|^2, x . r and |r|^2 for centered x and its first reconstruction r."""
    total = cross = power = 0.0
    for block in sample.split(2048):
        x = sae.centered(block)
        r = mesh.over_features(decode_sum(mesh.pick(sae.encode(block), sae.k), sae.W_dec.data))
        total += x.double().square().sum().item()
        cross += (x.double() * r.double()).sum().item()
        power += r.double().square().sum().item()
    return total, cross, power


def _authors_grid(total: float, cross: float, power: float) -> float:
    """The authors' search: norm r of encoder and decoder rows from 50 values 0.1 to 5.0, then 20 values
    from 0.09 below to 0.1 above the best. The reconstruction goes as r^2. Returns r^2.
    """

    def best(norms: list[float]) -> float:
        return min(norms, key=lambda r: total - 2 * r**2 * cross + r**4 * power)

    coarse = best([0.1 * i for i in range(1, 51)])
    return best([coarse - 0.09 + 0.01 * i for i in range(20)]) ** 2


def _mean_pre(sae: SparseAutoencoder, sample: Tensor) -> Float[Tensor, " d_sae"]:
    """Mean over the sample of pre-activations without bias."""
    return sae.centered(sample).mean(0) @ sae.W_enc.data
