"""Initialization of dictionaries: decoder directions, encoder, norm, biases, each with its own option.

Active Subspace Initialization (arXiv 2508.16929): decoder directions are drawn as usual, projected on the
top `d_init` principal directions of the centered activations, and scaled to unit norm. The encoder starts
tied, at the norm that gives the first reconstruction its smallest error. Training constrains nothing. The
projection runs in float64 on float64 eigenvectors, so the leak outside the subspace at step 0 comes only from
rounding the weights to their dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.doors import checked
from asi_lens.base.errors import OptionError, require
from asi_lens.base.products import exact_products
from asi_lens.kernels.draws import DRAW_ROWS, other_stream
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.finite import require_varying
from asi_lens.sae.scale import first_fit, fit_scale, require_overshoot, scale_encoder
from asi_lens.sae.starts import STARTS, Draw, Start, find_start
from asi_lens.sae.starts.start import starts_with
from asi_lens.training.mesh import Mesh

AUTO_SHARE = 0.8
"""Share of the singular values' sum that `auto_d_init` keeps."""


@dataclass(frozen=True)
class InitOptions:
    """Options of one `initialize`, with d_init and seed resolved."""

    method: str
    d_init: int | None
    seed: int
    tied: bool
    norm_search: bool
    overshoot: float
    b_dec: str
    center: bool
    center_encoder_bias: bool


@dataclass(frozen=True)
class InitReport:
    """Options and measured results of one initialization: of an autoencoder, a transcoder or a Lorsa.

    Attributes:
        options: the options as resolved (JSON values), also stored in the coder's `initialization`.
        leak_decoder, leak_encoder: largest share of the norm of a row that writes (reads) outside the active
            subspace that the row was drawn in, measured in float64 on the stored weights; None for rows drawn
            without a subspace.
        encoder_norm: mean norm of the rows that read (rows that write have norm 1).
        fvu: fraction of the sample's variance that the first reconstruction leaves unexplained; None
            without a sample.
        linear_fvu: fraction of the outputs' variance that the linear prediction leaves unexplained; None
            except for transcoders with the reader "regression".
    """

    options: Mapping[str, Any]
    leak_decoder: float | None
    leak_encoder: float | None
    encoder_norm: float
    fvu: float | None
    linear_fvu: float | None = None

    @property
    def method(self) -> str:
        """Name of the start."""
        return str(self.options["method"])

    @property
    def d_init(self) -> int | None:
        """Dimensions of the active subspace; None for methods without a subspace."""
        return self.options["d_init"]


def auto_d_init(spectrum: Spectrum) -> int:
    """Return d_init for "auto": the smallest r whose leading singular values hold `AUTO_SHARE` of the sum.

    The choice of r balances two effects. A feature drawn isotropically from the top r directions starts with
    a pre-activation variance equal to the mean of their r eigenvalues, so fewer directions give stronger
    features. A direction outside the subspace is learned only by features that drift into it, so the
    directions outside must matter little together. Their weight is measured by singular values (the weights
    whose entropy is the effective rank). Variance would let a single massive direction hide all others: in
    the residual stream after a massive activation, such a direction holds over 90 %. A flat spectrum gets
    0.8 d, a collapsed spectrum a small r, and nothing depends on d itself.

    `AUTO_SHARE` comes from a sweep on the packaged model, layer 15 (4,096 features, 600k tokens, one seed).
    On attention outputs it gives 192 of 576: among 64 to 512, 192 has the fewest silent features on held-out
    rows, and a held-out FVU 1 % above the smallest (at 128). 64 has more dead features again, 512 is hardly
    better than random. MLP outputs get 337 and residual streams 288, which were not trained; all values tried
    there (128 to 512) were as good as random or slightly better. One layer and one seed set the share, so
    this sweep is not a test of it.
    """
    cumulative = spectrum.eigenvalues.clamp_min(0).sqrt().cumsum(0)
    return int((cumulative < AUTO_SHARE * cumulative[-1]).sum().item()) + 1


@checked
@exact_products()
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
    overshoot: float | int = 1.0,
    b_dec: str = "mean",
    center: bool = True,
    center_encoder_bias: bool = False,
    initial_l0: float | int | None = None,
    seed: int | None = None,
    mesh: Mesh | None = None,
    subspace_of: Spectrum | None = None,
) -> InitReport:
    """Set every weight of `sae` and its input normalization, in place. Returns a report.

    Args:
        method: one of `starts.STARTS`. `asi` projects the rows that `random` draws from the same seed.
            `asi_authors` takes the first d_init columns of a uniform draw as coordinates in the subspace
            and searches the norm on the authors' grid, before the encoder bias is centered.
        spectrum: spectrum of the activations, for ASI and for the input's mean and scale. Without a
            spectrum, mean and scale come from `sample`; without both they stay unchanged.
        d_init: dimensions of the active subspace, 1 to the rank of the spectrum (at most d_in), or "auto"
            (`auto_d_init`). ASI only.
        sample: raw activations, for the norm search, the encoder bias and the report.
        tied: the encoder starts as the decoder's transpose. False: it is drawn independently, the same way.
        norm_search: scale the encoder so that the first reconstruction of `sample` has the smallest mean
            squared error. The first reconstruction is proportional to the scale, so the best scale has a
            closed form, the limit of a finer and finer grid over the norm (`asi_authors` uses the authors'
            grid). Without the search the scale is 1.
        overshoot: factor on that scale. Above 1 the first reconstruction is too large, by this factor, and
            fewer features die (`23_encoder_steps`).
        b_dec: "mean", the mean of the normalized input (zero if `center` subtracted it), or "zeros".
        center: subtract the mean from the input (`input_mean`). False: `input_mean` is zero.
        center_encoder_bias: b_enc = - mean pre-activation on `sample`, so that every feature starts with
            mean pre-activation zero. False: b_enc is zero.
        initial_l0: features that fire on a token of the sample, for activation functions with a threshold
            (`threshold.set_threshold`); by default the dictionary's k.
        seed: seed of the directions; by default the configuration's seed.
        mesh: the mesh, if `sae` holds the features of one of several ranks (`mesh.shard`). The features get
            the same weights as in the whole dictionary. Every rank gives the same spectrum and sample.
        subspace_of: spectrum whose active subspace is taken in place of that of `spectrum`, for example of
            another text. Mean and scale of the input stay those of `spectrum`.

    Raises OptionError, UnknownNameError, or DataError for a sample that is not finite or never varies.
    """
    mesh = mesh or Mesh()
    seed = sae.config.seed if seed is None else seed
    options = InitOptions(
        method, None, seed, tied, norm_search, float(overshoot), b_dec, center, center_encoder_bias
    )
    _check(sae, options, spectrum, sample, initial_l0, mesh)
    if subspace_of is not None:
        fits = find_start(method).subspace and subspace_of.d == sae.d_in
        allowed = f"of width d_in={sae.d_in}, for {starts_with(lambda start: start.subspace)}"
        require(fits, "subspace_of", f"of width {subspace_of.d} for {method!r}", allowed)
    active = active_subspace_of(method, spectrum if subspace_of is None else subspace_of, d_init, sae.d_in)
    options = replace(options, d_init=None if active is None else active.shape[1])
    mean = _set_input(sae, spectrum, sample, center)
    offset = (mean - sae.input_mean.double().cpu()) * sae.input_scale.double().cpu()
    sae.b_dec.copy_(offset if b_dec == "mean" else torch.zeros_like(offset))
    sae.b_enc.zero_()
    sae.activation.reset()
    total = sae.d_sae * mesh.config.model
    active = None if active is None else active.to(sae.W_dec.device)
    draw = Draw(seed, active, spectrum, sample, mesh.features(total)[0], total)
    norms = _draw_rows(sae, STARTS[method], draw, tied)
    _scale(sae, options, norms, sample, sae.k if initial_l0 is None else initial_l0, mesh)
    other = {} if subspace_of is None else {"subspace_of": subspace_of.fingerprint}
    sae.initialization = {**asdict(options), **other}
    return _report(sae, active, sample, mesh)


def _check(
    sae: SparseAutoencoder,
    options: InitOptions,
    spectrum: Spectrum | None,
    sample: Tensor | None,
    initial_l0: float | int | None,
    mesh: Mesh,
) -> None:
    """Raise OptionError (UnknownNameError) for options that do not fit each other or this dictionary, and
    DataError for a sample that never varies."""
    method, start, kind = options.method, find_start(options.method), sae.activation
    require(options.b_dec in ("mean", "zeros"), "b_dec", options.b_dec, "'mean' or 'zeros'")
    require_overshoot(options.overshoot)
    needy = [name for name in ("norm_search", "center_encoder_bias") if getattr(options, name)]
    require(sample is not None or not needy, "sample", sample, f"given for {' and '.join(needy)}=True")
    if spectrum is not None:
        if sample is not None:  # without a spectrum, the scale that it would give is refused
            require_varying(sample)
        require(spectrum.d == sae.d_in, "spectrum", f"of width {spectrum.d}", f"of width d_in={sae.d_in}")
    if not kind.has_threshold:
        require(initial_l0 is None, "initial_l0", initial_l0, "left out for an activation without thresholds")
    elif start.norm is not None:
        instead = starts_with(lambda other: other.norm is None and other.subspace == start.subspace)
        raise OptionError(
            f"method={method!r} is not allowed for activation={sae.config.activation!r}; method must be "
            f"{instead}"
        )
    whole = start.sharded or mesh.config.model == 1
    require(whole, "method", method, f"{starts_with(lambda other: other.sharded)} over several ranks")
    require(options.seed >= 0, "seed", options.seed, "at least 0")


def _draw_rows(sae: SparseAutoencoder, start: Start, draw: Draw, tied: bool) -> Float[Tensor, " d_sae"]:
    """Fill decoder and encoder with unit rows. Returns, for each feature, the product of the norms of its two
    rows before normalization."""
    norms = start.fill(sae.W_dec.data, draw)
    if tied:
        sae.encoder_rows.copy_(sae.W_dec.data)
        return norms.square()
    return norms * start.fill(sae.encoder_rows, replace(draw, seed=other_stream(draw.seed)))


def _scale(
    sae: SparseAutoencoder,
    options: InitOptions,
    norms: Float[Tensor, " d_sae"],
    sample: Tensor | None,
    l0: float | int,
    mesh: Mesh,
) -> None:
    """Set encoder bias, thresholds and norm of encoder rows, as far as the options and the sample allow."""
    search, own = options.norm_search and sample is not None, STARTS[options.method].norm
    if own is not None:
        # The authors' rows have norm n in encoder and decoder, which gives n^2 relu(x . w) w with unit w.
        scale: Tensor | float = norms.to(sae.W_dec).unsqueeze(1)
        if search and sample is not None:
            scale = own(*first_fit(sae, sample, mesh))
        sae.encoder_rows.mul_(scale)
    if options.center_encoder_bias and sample is not None:
        sae.b_enc.copy_(-_mean_pre(sae, sample))
    if own is None and sample is not None:
        fit_scale(sae, sample, l0, mesh, search=search)
    scale_encoder(sae, options.overshoot)


def _report(sae: SparseAutoencoder, active: Tensor | None, sample: Tensor | None, mesh: Mesh) -> InitReport:
    """Return the report, measured on the stored weights (scaling rounded the encoder once more)."""
    fvu = None
    if sample is not None:
        square, cross, power = first_fit(sae, sample, mesh)
        x = sae.normalize(sample).double()
        fvu = (square - 2 * cross + power) / (x - x.mean(0)).square().sum().item()
    decoder, encoder = (
        None if active is None else mesh.largest(largest_leak(weights, active))
        for weights in (sae.W_dec.data, sae.encoder_rows)
    )
    norm = torch.linalg.vector_norm(sae.encoder_rows, dim=1).double().sum()
    mean_norm = mesh.over_features(norm).item() / (sae.d_sae * mesh.config.model)
    return InitReport(dict(sae.initialization), decoder, encoder, mean_norm, fvu)


def active_subspace_of(
    method: str, spectrum: Spectrum | None, d_init: int | str | None, d_in: int
) -> Float[Tensor, "d_in d_init"] | None:
    """Return V_active, None for starts without a subspace. Raises OptionError if the options do not fit."""
    if not find_start(method).subspace:
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
    rank = spectrum.rank
    most = f"at most {rank}, the rank of {spectrum.name or 'the spectrum'} (from n={spectrum.n:,} rows)"
    require(d_init <= rank, "d_init", d_init, f"{most}: directions without variance are arbitrary")
    return spectrum.active_subspace(d_init)


def _set_input(
    sae: SparseAutoencoder, spectrum: Spectrum | None, sample: Tensor | None, center: bool
) -> Float[Tensor, " d_in"]:
    """Set mean and scale of the input. Returns the mean of the raw activations, float64."""
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


def largest_leak(rows: Float[Tensor, "n d"], active: Float[Tensor, "d r"]) -> float:
    """Return the largest share of a row's norm outside the subspace, computed in float64."""
    active, shares = active.to(rows.device), []
    for block in rows.split(DRAW_ROWS):
        exact = block.double()
        outside = exact - (exact @ active) @ active.T
        share = torch.linalg.vector_norm(outside, dim=1) / torch.linalg.vector_norm(exact, dim=1)
        shares.append(share.max())
    return torch.stack(shares).max().item()


def _mean_pre(sae: SparseAutoencoder, sample: Tensor) -> Float[Tensor, " d_sae"]:
    """Return each feature's mean pre-activation without bias over the sample."""
    return sae.centered(sample).mean(0) @ sae.W_enc.data
