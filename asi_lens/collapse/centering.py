"""The mean of activations as a cause of dead features (Simon, Adams and Zou, arXiv 2605.31518).

A pre-activation w . x = w . mean + w . (x - mean) has a constant part. Features whose row points against the
mean never reach the top k. With gamma = |mean| / |sigma|, sigma^2 the trace of the covariance, N tokens and n
features of independent random rows, the paper predicts the share of features that never fire at the start:

    Phi(t_k - C / gamma),  t_k = Phi^-1(1 - k / n),  C = Phi^-1(1 - 1 / N)

Its gamma is measured after a LayerNorm of each token; here it is of the raw activations that a dictionary
reads. Subtracting the mean makes gamma zero. The paper subtracts the geometric median, which a few huge
tokens do not move.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import DataError, require, require_whole

_NORMAL = NormalDist()
# Rows whose features are scored at a time.
_ROWS = 2048


def gamma(spectrum: Spectrum, center: Float[Tensor, " d"] | None = None) -> float:
    """Return |mean - center| / sqrt(sum of eigenvalues), without units; `center` is zero by default.

    Raises DataError for activations that never vary, OptionError for a center of another width.
    """
    variance = spectrum.eigenvalues.sum().item()
    if not variance > 0:
        raise DataError(
            f"{spectrum.name or 'the activations'} do not vary: their sigma is zero, so gamma is not defined"
        )
    mean = spectrum.mean
    if center is not None:
        require(center.shape == mean.shape, "center", tuple(center.shape), f"of shape {tuple(mean.shape)}")
        mean = mean - center.to(mean)
    return torch.linalg.vector_norm(mean).item() / math.sqrt(variance)


def predicted_dead(gamma: float | int, k: int, n_features: int, n_tokens: int) -> float:
    """Return the predicted share of features that never fire at a random start, 0 to 1 (formula above).

    Raises OptionError for a gamma below zero, a `k` that is not below `n_features`, or fewer than 2 tokens.
    """
    require(math.isfinite(gamma) and gamma >= 0, "gamma", gamma, "finite and at least 0")
    require_whole("n_features", n_features, 2)
    require_whole("k", k, 1)
    require(k < n_features, "k", k, f"below n_features={n_features}")
    require_whole("n_tokens", n_tokens, 2)
    if gamma == 0:
        return 0.0
    threshold, reach = _NORMAL.inv_cdf(1 - k / n_features), _NORMAL.inv_cdf(1 - 1 / n_tokens)
    return _NORMAL.cdf(threshold - reach / gamma)


def dead_at_start(
    rows: Float[Tensor, "n d"],
    k: int,
    n_features: int,
    *,
    center: Float[Tensor, " d"] | None = None,
    seed: int = 0,
) -> float:
    """Return the measured share of `n_features` random unit rows that never fire on `rows`, 0 to 1.

    A feature fires if its product with `row - center` is among the k largest of the row and above zero.
    `center` is zero by default. Raises OptionError for a `k` out of range, DataError for no rows.
    """
    require_whole("n_features", n_features, 1)
    require_whole("k", k, 1)
    require(k <= n_features, "k", k, f"from 1 to n_features={n_features}")
    if len(rows) == 0:
        raise DataError("no rows to fire on")
    generator = torch.Generator().manual_seed(seed)
    # A row's length does not change its own sign, but its rank among the others: rows are of unit length.
    drawn = torch.randn(n_features, rows.shape[1], generator=generator, dtype=torch.float32, device="cpu")
    features = torch.nn.functional.normalize(drawn).to(rows.device)
    fired = torch.zeros(n_features, dtype=torch.bool, device=rows.device)
    for block in rows.split(_ROWS):
        centered = block.float() if center is None else block.float() - center.to(block.device).float()
        top = (centered @ features.T).topk(k, dim=1)
        fired[top.indices[top.values > 0]] = True
    return 1 - fired.float().mean().item()


def geometric_median(
    rows: Float[Tensor, "n d"], *, tolerance: float = 1e-7, max_steps: int = 500
) -> Float[Tensor, " d"]:
    """Return the point with the smallest sum of distances to the rows, float64 (Weiszfeld's steps).

    A step that lands on a row uses the correction of Vardi and Zhang (2000). The steps end when one moves
    less than `tolerance` times the median distance. Raises DataError for no rows, rows that are not finite,
    or steps that do not end.
    """
    require(0 < tolerance < 1, "tolerance", tolerance, "between 0 and 1")
    require_whole("max_steps", max_steps, 1)
    points = rows.double()
    if len(points) == 0 or not torch.isfinite(points).all():
        raise DataError("the geometric median needs rows, all finite")
    here = points.median(0).values
    for _ in range(max_steps):
        distances = torch.linalg.vector_norm(points - here, dim=1)
        away = distances > 0
        if not away.any():
            return here
        weights = 1 / distances[away]
        pull = (weights.unsqueeze(1) * (points[away] - here)).sum(0)
        length = torch.linalg.vector_norm(pull).item()
        # Rows at this point hold it with the force of one each.
        held = int((~away).sum())
        if length <= held:
            return here
        step = pull / weights.sum() * (1 - held / length)
        here = here + step
        if torch.linalg.vector_norm(step).item() <= tolerance * distances.median().item():
            return here
    raise DataError(f"the geometric median did not settle in {max_steps} steps; raise tolerance or max_steps")
