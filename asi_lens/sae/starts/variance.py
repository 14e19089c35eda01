"""Directions drawn with the variances of the data: ASI without a cut."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import require
from asi_lens.kernels.draws import draw_gaussian
from asi_lens.sae.starts.start import Draw, start, to_unit_norm


@start("variance")
def variance(rows: Float[Tensor, "n d"], draw: Draw) -> Float[Tensor, " n"]:
    """Fill `rows` with what `random` draws from the same seed, times the root of the covariance.

    Their coordinate along a principal direction has that direction's standard deviation. Returns the norms
    before normalization. Raises OptionError without a spectrum.
    """
    spectrum = draw.spectrum
    require(spectrum is not None, "spectrum", spectrum, "given for method='variance'")
    assert spectrum is not None
    V, deviations = spectrum.eigenvectors.cpu(), spectrum.eigenvalues.cpu().clamp_min(0).sqrt()
    root: Tensor = (V * deviations) @ V.T
    draw_gaussian(rows, draw.seed)
    return to_unit_norm(rows, lambda drawn: drawn @ root.to(drawn))
