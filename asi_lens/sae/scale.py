"""The scale of a first reconstruction, in closed form, for every coder.

The first reconstruction of a coder is proportional to the scale of the rows that read, so the scale with the
smallest squared error follows from three sums over a sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.pairs import Pair
from asi_lens.base.errors import require
from asi_lens.kernels import devices
from asi_lens.kernels.gradients import decode_sum
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.threshold import set_threshold
from asi_lens.training.mesh import Mesh


def best_scale(total: float, cross: float, power: float) -> float:
    """Return the factor on reconstructions r that minimizes the squared error to targets t.

    `total`, `cross`, `power` are sums of |t|^2, t . r and |r|^2. The factor is 1 if every factor increases
    the error.
    """
    return cross / power if cross > 0 else 1.0


def fit_sums(sides: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
    """Return sums of |t|^2, t . r and |r|^2 over batches of targets t and reconstructions r, in float64.

    They are summed on the device, and read once.
    """
    sums: Tensor | None = None
    for target, reconstruction in sides:
        t, r = target.double(), reconstruction.double()
        found = torch.stack([t.square().sum(), (t * r).sum(), r.square().sum()])
        sums = found if sums is None else sums + found
    total, cross, power = [0.0] * 3 if sums is None else devices.read(sums)
    return total, cross, power


def first_fit(
    sae: SparseAutoencoder, sample: Tensor | Pair, mesh: Mesh | None = None
) -> tuple[float, float, float]:
    """Return `fit_sums` of centered targets and the features' reconstructions of them."""
    mesh = mesh or Mesh()
    return fit_sums((sae.sides(block)[1], _written(sae, block, mesh)) for block in sample.split(2048))


def require_overshoot(overshoot: float | int) -> None:
    """Raise OptionError for an `overshoot` that no scale is multiplied by."""
    require(0 < overshoot < math.inf, "overshoot", overshoot, "finite and above 0")


@torch.no_grad()
def scale_encoder(sae: SparseAutoencoder, factor: float) -> None:
    """Multiply all values of features by `factor`: the same features fire."""
    sae.encoder_rows.mul_(factor)
    sae.b_enc.mul_(factor)
    sae.activation.rescale(factor)


@torch.no_grad()
def fit_scale(
    sae: SparseAutoencoder,
    sample: Tensor | Pair,
    l0: float | int | None = None,
    mesh: Mesh | None = None,
    *,
    search: bool = True,
) -> None:
    """Set thresholds for `l0` (the dictionary's k by default), if the kind has any, and the encoder's scale.

    The scale minimizes the squared error of the first reconstruction. `search=False` keeps the scale.
    """
    if sae.activation.has_threshold:
        set_threshold(sae, sample.x if isinstance(sample, Pair) else sample, sae.k if l0 is None else l0)
    if search:
        scale_encoder(sae, best_scale(*first_fit(sae, sample, mesh)))


def _written(sae: SparseAutoencoder, block: Tensor | Pair, mesh: Mesh) -> Float[Tensor, "n d_out"]:
    code = sae.encode(block.x if isinstance(block, Pair) else block)
    return mesh.over_features(decode_sum(mesh.pick(code, sae.k), sae.W_dec.data))
