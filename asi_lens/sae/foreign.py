"""Active Subspace Initialization of the dictionaries of other trainers, in place.

SAELens' `TrainingSAE` and sparsify's `SparseCoder` keep their sizes, options, parameters and training loops.
Only the values of their weights change. Neither library is imported here: an object is recognised by its
class, and read and written through its own attributes and its own forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import DataError, OptionError, require, require_whole
from asi_lens.base.products import exact_products
from asi_lens.sae.finite import require_varying
from asi_lens.sae.initialize import active_subspace_of, largest_leak
from asi_lens.sae.scale import best_scale, fit_sums, require_overshoot
from asi_lens.sae.starts import Draw, find_start

# Rows of a sample that one forward pass of the other library sees; it may hold a dense code.
_BLOCK = 1024


@dataclass(frozen=True)
class ForeignReport:
    """Options and measured results of one `initialize`.

    Attributes:
        library, kind: "SAELens" or "sparsify", and the name of the object's class.
        method, d_init, seed: as resolved; `d_init` is None for starts without a subspace.
        leak_decoder, leak_encoder: largest share of a row's norm outside the subspace, measured in float64
            on the stored weights; None for starts without a subspace.
        scale: factor on the encoder that gave the first reconstruction of the sample its smallest squared
            error; 1 without a sample or search.
        fvu: share of the sample's variance that the first reconstruction leaves unexplained, in the units of
            the sample; None without a sample.
    """

    library: str
    kind: str
    method: str
    d_init: int | None
    seed: int
    leak_decoder: float | None
    leak_encoder: float | None
    scale: float
    fvu: float | None


@dataclass
class _Coder:
    """A dictionary of another library, as tensors that share memory with it, and functions.

    Attributes:
        decoder, encoder: rows [n d].
        biases: the encoder's biases [n], each added to pre-activations.
        centers: whether the encoder reads x - b_dec.
        homogeneous: whether the code grows in proportion to encoder weights and biases.
        factor: the trainer's factor on raw rows.
        by_token: normalises every token, if the dictionary does; returns what encoder rows are multiplied by.
        forward: reconstruction of rows that the trainer has scaled, in their units.
    """

    library: str
    decoder: Float[Tensor, "n d"]
    encoder: Float[Tensor, "n d"]
    biases: list[Float[Tensor, " n"]]
    b_dec: Float[Tensor, " d"]
    centers: bool
    homogeneous: bool
    factor: float
    by_token: Callable[[Tensor], Tensor] | None
    forward: Callable[[Tensor], Tensor]


@exact_products()
@torch.no_grad()
def initialize(
    coder: Any,
    spectrum: Spectrum | None = None,
    d_init: int | str | None = None,
    sample: Float[Tensor, "n d_in"] | None = None,
    *,
    method: str = "asi",
    norm_search: bool = True,
    overshoot: float | int = 1.0,
    center: bool = True,
    seed: int = 0,
) -> ForeignReport:
    """Start a dictionary of SAELens or sparsify in the active subspace, in place. Returns a report.

    Decoder rows become the directions that `asi_lens.initialize` draws from the same seed, at the norms that
    the rows have (0.1 in SAELens by default, 1 in sparsify). Encoder rows get the same directions, at the
    mean of their norms. Parameters stay the same objects, so an optimizer made before keeps working.
    `spectrum` and `sample` are of the raw activations, before any scaling by trainer or dictionary.

    Args:
        coder: a `TrainingSAE` of SAELens (standard, topk, batchtopk, matryoshka, abstopk, gated, jumprelu) or
            a `SparseCoder` of sparsify that is not a transcoder.
        spectrum: spectrum of the activations; by default that of `sample`. Left out if the dictionary
            normalises each token (`layer_norm`, `constant_norm_rescale`): the subspace is then that of the
            normalised sample.
        d_init: dimensions of the active subspace, 1 to d_in, or "auto" (the default for starts with one).
        sample: raw activations, for the norm search and the report.
        method: a start in `sae.starts.STARTS` without a norm search of its own.
        norm_search: give the encoder the scale at which the first reconstruction of `sample` has the smallest
            squared error. Not for jumprelu, whose thresholds do not grow with the encoder.
        overshoot: factor on that scale, as in `asi_lens.initialize`; 1 without a sample, and for jumprelu.
        center: b_dec becomes the mean of what the encoder reads. False: b_dec is zero. (sparsify's trainer
            sets b_dec to the mean of its first batch in either case.)
        seed: seed of the directions.

    Raises OptionError for an object of another kind or one whose input ASI cannot know (a transcoder,
    whitening, hooks) and for options that do not fit, UnknownNameError, or DataError for an unusable sample.
    """
    found = _recognise(coder, sample)
    require_whole("seed", seed, 0)
    allowed = norm_search is False or sample is None or found.homogeneous
    require(allowed, "norm_search", norm_search, "False for jumprelu: its thresholds keep their scale")
    require_overshoot(overshoot)
    scales = sample is not None and found.homogeneous
    require(scales or overshoot == 1, "overshoot", overshoot, "1 without a sample, and for jumprelu")
    spectrum = _spectrum_read(found, spectrum, sample)
    active, directions = _directions(found, method, spectrum, d_init, sample, seed)
    directions = directions.to(found.decoder.device)
    found.decoder.copy_(directions * _norms(found.decoder))
    # One norm for all: rows of different norm would not compete for the top k as equals.
    found.encoder.copy_(directions * _norms(found.encoder).mean())
    mean = (spectrum.mean if center else torch.zeros_like(spectrum.mean)).to(found.encoder.device)
    found.b_dec.copy_(mean)
    for bias in found.biases:
        bias.copy_(torch.zeros_like(bias) if found.centers else -(found.encoder.double() @ mean))
    scale, fvu = (1.0, None) if sample is None else _scale(found, sample, norm_search, overshoot)
    decoder, encoder = (
        None if active is None else largest_leak(rows, active) for rows in (found.decoder, found.encoder)
    )
    d_init, kind = None if active is None else active.shape[1], type(coder).__name__
    return ForeignReport(found.library, kind, method, d_init, seed, decoder, encoder, scale, fvu)


def _recognise(coder: Any, sample: Tensor | None) -> _Coder:
    """Return the tensors and functions of `coder`. Raises OptionError for an object of another kind."""
    names = {f"{each.__module__.split('.')[0]}.{each.__name__}" for each in type(coder).__mro__}
    hooked = [name for name, module in _modules(coder) if module._forward_hooks or module._forward_pre_hooks]
    if hooked:
        raise OptionError(
            f"the dictionary has hooks on {hooked[0] or 'itself'}; remove them before it starts"
        )
    if sample is not None:
        _check_sample(sample)
    if "sae_lens.TrainingSAE" in names:
        return _of_saelens(coder, sample)
    if "sparsify.SparseCoder" in names:
        return _of_sparsify(coder)
    kind = f"{type(coder).__module__}.{type(coder).__qualname__}"
    raise OptionError(
        f"coder={kind} is not allowed; coder must be a TrainingSAE of SAELens or a SparseCoder of sparsify "
        "(for a dictionary of asi_lens: asi_lens.initialize; for your own trainer: docs/your_trainer.md)"
    )


def _modules(coder: Any) -> list[tuple[str, nn.Module]]:
    return list(coder.named_modules()) if isinstance(coder, nn.Module) else []


def _of_saelens(sae: Any, sample: Tensor | None) -> _Coder:
    """Return a `_Coder` of a `TrainingSAE`."""
    kind, normalization = type(sae).__name__, sae.cfg.normalize_activations
    biases = [getattr(sae, name) for name in ("b_enc", "b_gate", "b_mag") if hasattr(sae, name)]
    plain = isinstance(getattr(sae, "W_enc", None), nn.Parameter) and bool(biases)
    require(plain, "coder", kind, "a TrainingSAE with an encoder (W_enc and its biases)")
    if normalization == "covariance_whitening":
        raise OptionError(
            "normalize_activations='covariance_whitening' is not allowed; in whitened activations all "
            "directions have the same variance, so there is no active subspace to start in"
        )
    factor = 1.0
    if normalization == "expected_average_only_in":
        needed = "given for normalize_activations='expected_average_only_in', whose factor comes from it"
        require(sample is not None, "sample", sample, needed)
        assert sample is not None
        factor = math.sqrt(sae.cfg.d_in) / sample.double().norm(dim=1).mean().item()

    def by_token(rows: Tensor) -> Tensor:
        normalised = sae.run_time_activation_norm_fn_in(rows.to(sae.W_enc))
        # The way back drops what the way in has kept of the tokens.
        sae.run_time_activation_norm_fn_out(normalised)
        return normalised

    return _Coder(
        "SAELens",
        sae.W_dec.data,
        sae.W_enc.data.T,
        [bias.data for bias in biases],
        sae.b_dec.data,
        centers=bool(sae.cfg.apply_b_dec_to_input),
        homogeneous=not hasattr(sae, "threshold"),
        factor=factor,
        by_token=by_token if normalization in ("layer_norm", "constant_norm_rescale") else None,
        forward=sae,
    )


def _of_sparsify(coder: Any) -> _Coder:
    """Return a `_Coder` of a `SparseCoder`."""
    if coder.cfg.transcode or coder.W_dec is None:
        what = "transcode=True" if coder.cfg.transcode else "decoder=False"
        raise OptionError(
            f"{what} is not allowed; a start of one site is for autoencoders (for a transcoder of asi_lens: "
            "asi_lens.initialize_transcoder)"
        )
    return _Coder(
        "sparsify",
        coder.W_dec.data,
        coder.encoder.weight.data,
        [coder.encoder.bias.data],
        coder.b_dec.data,
        centers=True,
        homogeneous=True,
        factor=1.0,
        by_token=None,
        forward=lambda rows: coder(rows).sae_out,
    )


def _check_sample(sample: Tensor) -> None:
    """Raise DataError unless `sample` is finite rows that vary."""
    if not isinstance(sample, Tensor) or sample.ndim != 2 or len(sample) < 2:
        found = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
        raise DataError(f"a sample is rows [n d_in] with n at least 2, not {found}")
    if not bool(torch.isfinite(sample).all()):
        raise DataError("the sample holds NaN or infinity")
    require_varying(sample)


def _spectrum_read(found: _Coder, spectrum: Spectrum | None, sample: Tensor | None) -> Spectrum:
    """Return the spectrum of what the encoder's rows are multiplied by.

    Raises OptionError if neither spectrum nor sample is given, if a width differs, or for a spectrum of raw
    activations where every token is normalised.
    """
    d = found.decoder.shape[1]
    for name, given in (
        ("spectrum", spectrum and spectrum.d),
        ("sample", None if sample is None else sample.shape[1]),
    ):
        require(given in (None, d), name, f"of width {given}", f"of width d_in={d}")
    if spectrum is not None:
        why = "left out for a dictionary that normalises every token; its subspace is that of `sample`"
        require(found.by_token is None, "spectrum", "of raw activations", why)
        covariance = found.factor**2 * spectrum.covariance
        return Spectrum(
            found.factor**2 * spectrum.eigenvalues, found.factor * spectrum.mean, spectrum.n, covariance
        )
    require(sample is not None, "sample", sample, "given where spectrum is not")
    assert sample is not None
    rows = found.factor * sample.float()
    return Spectrum.of(rows if found.by_token is None else found.by_token(rows).float().cpu())


def _directions(
    found: _Coder,
    method: str,
    spectrum: Spectrum,
    d_init: int | str | None,
    sample: Tensor | None,
    seed: int,
) -> tuple[Float[Tensor, "d d_init"] | None, Float[Tensor, "n d"]]:
    """Return V_active (None for starts without a subspace) and unit directions, float64 on the CPU."""
    start = find_start(method)
    require(start.norm is None, "method", method, "a start without a norm search of its own")
    if start.subspace and d_init is None:
        d_init = "auto"
    active = active_subspace_of(method, spectrum, d_init, spectrum.d)
    directions = torch.empty(found.decoder.shape, dtype=torch.float64)
    # Rows that the CPU draws are the same for every device.
    start.fill(directions, Draw(seed, None if active is None else active.cpu(), spectrum, sample))
    return active, directions


def _norms(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n 1"]:
    return torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)


def _scale(found: _Coder, sample: Tensor, search: bool, overshoot: float) -> tuple[float, float]:
    """Scale the encoder as `initialize` says. Returns the factor, and the FVU of `sample` after it."""
    blocks = [found.factor * block.to(found.b_dec) for block in sample.split(_BLOCK)]
    weights = [found.encoder, *found.biases]
    kept = [weight.clone() for weight in weights]
    # Without an encoder no feature fires, and what is left is the reconstruction by b_dec alone.
    for weight in weights:
        weight.zero_()
    offsets = [found.forward(block).double() for block in blocks]
    for weight, value in zip(weights, kept, strict=True):
        weight.copy_(value)
    sides = ((x - base, found.forward(x).double() - base) for x, base in zip(blocks, offsets, strict=True))
    total, cross, power = fit_sums(sides)
    scale = overshoot * (best_scale(total, cross, power) if search else 1.0)
    for weight in weights:
        weight.mul_(scale)
    rows = torch.cat(blocks).double()
    left = sum((x.double() - found.forward(x).double()).square().sum().item() for x in blocks)
    return scale, left / (rows - rows.mean(0)).square().sum().item()
