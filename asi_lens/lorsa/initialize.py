"""Initial weights of a Lorsa: an exact copy of a layer, or units drawn at random or by ASI.

Queries and keys always come from the layer. ASI (arXiv 2508.16929, claim C10) computes, for each head of the
layer, the top `d_init` principal directions U [d_head d_init] of the head's centered values v = x W_V. Each
unit of that head draws a direction u = U c with isotropic c. The unit reads u (w_v = W_V u) and writes the
layer's output for u (w_o = u W_O). Rows w_v and w_o get unit norm.
Subspaces and projections are computed in float64. (The authors take the principal directions in the residual
stream, of x W_V W_V^T, with d_init = d_head, and write w_v W_V W_O.)

Unlike an autoencoder's, rows w_v have norm 1 by default, as the authors' have under ASI. (Their random start
has norm sqrt(d_in / n_ov), llamascopium 2.0.0b34.) The norm decides how many units live, more than the
subspace does: at the one with the smallest first error, 0.04 for random directions, nearly all die
(`09_lorsa`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from asi_lens.activations.moments import Moments
from asi_lens.activations.precision import few_threads
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, require
from asi_lens.base.products import exact_products
from asi_lens.kernels.draws import draw_gaussian, unit_rows_
from asi_lens.lorsa.attention import AttentionLayer, origin, read_attention
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.lorsa import Lorsa, config_for
from asi_lens.sae.initialize import InitReport, largest_leak
from asi_lens.sae.scale import best_scale, fit_sums
from asi_lens.sae.starts import STARTS, Start, find_start

LORSA_METHODS = tuple(name for name, start in STARTS.items() if start.lorsas)
"""Methods for the initial units: Gaussian, or in the active subspace of the values of the unit's head."""


@checked
@torch.no_grad()
def from_attention(
    model: nn.Module, layer: int, context: int, *, dtype: torch.dtype = torch.float32
) -> Lorsa:
    """Return the Lorsa that equals an attention layer: a unit per query head and value dimension, all active.

    It takes sequences of up to `context` positions. Raises as `read_attention`.
    """
    source = read_attention(model, layer, context)
    n_ov = source.n_heads * source.d_head
    config = config_for(source, n_ov=n_ov, k=n_ov, rectify=False, metadata=origin(model, layer))
    lorsa = Lorsa(config, dtype=dtype)
    source.fill(lorsa.heads, torch.zeros(source.d_in), 1.0)
    W_O = source.W_O.flatten(0, 1)
    norms = W_O.norm(dim=1, keepdim=True)
    # A direction that is never written keeps its row of zeros.
    norms = torch.where(norms > 0, norms, 1.0)
    lorsa.W_O.copy_(W_O / norms)
    lorsa.W_V.copy_(source.W_V.mT.flatten(0, 1) * norms)
    lorsa.b_V.copy_(source.b_V.flatten() * norms.squeeze(1))
    lorsa.b_O.copy_(source.b_O)
    lorsa.initialization = {"method": "from_attention"}
    return lorsa


@checked
@exact_products()
@torch.no_grad()
def initialize_lorsa(
    lorsa: Lorsa,
    model: nn.Module,
    layer: int,
    sample: SequencePairs,
    method: str = "asi",
    d_init: int | None = None,
    *,
    seed: int | None = None,
    norm: float | int | str = 1.0,
) -> InitReport:
    """Set every weight of `lorsa` and its normalization of inputs and outputs, in place. Returns a report.

    The means of inputs and outputs are subtracted (buffers). A unit writes the direction that it reads,
    mapped by its head's W_O: u W_O for ASI, (w_v W_V) W_O for `random`.

    Args:
        model: the model of the attention layer.
        layer: number of the layer. Its queries and keys are copied; ASI uses its values and outputs.
        sample: data of that layer, for the means, the scales, the subspaces and the norm.
        method: one of `LORSA_METHODS`. `random` draws w_v isotropically in the stream.
        d_init: dimensions of the active subspace of a head, 1 to d_qk. ASI only.
        seed: seed of the units; by default the configuration's seed.
        norm: of the rows w_v. "search": the one that gives the first reconstruction of `sample` its smallest
            mean squared error, in closed form.

    In the report, a leak is the share of a w_v (w_o) outside the image of its head's active subspace in the
    stream.

    Raises OptionError, UnknownNameError, DataError for a sample that is not finite or never varies and for a
    head that reads or writes nothing, and the errors of `read_attention`.
    """
    start = find_start(method, LORSA_METHODS)
    config = lorsa.config
    source = read_attention(model, layer, config.pattern.context)
    shape = (source.d_in, source.d_head, source.pattern)
    if (config.d_in, config.d_qk, config.pattern) != shape or config.n_qk_heads % source.n_heads:
        raise OptionError(
            f"layer {layer} has d_in={source.d_in}, d_qk={source.d_head}, {source.n_heads} heads and "
            f"{source.pattern}; this Lorsa was made for another (d_in={config.d_in}, d_qk={config.d_qk}, "
            f"n_qk_heads={config.n_qk_heads}, {config.pattern}). LorsaConfig.of takes them from a layer"
        )
    require(sample.d == config.d_in, "sample", f"of width {sample.d}", f"of width d_in={config.d_in}")
    _check_d_init(start, d_init, source.d_head)
    seed = config.seed if seed is None else seed
    require(seed >= 0, "seed", seed, "at least 0")
    require_norm(norm)

    _set_normalization(lorsa, sample)
    source.fill(lorsa.heads, lorsa.input_mean, lorsa.input_scale.item())
    lorsa.b_V.zero_()
    lorsa.b_O.zero_()
    active = None if d_init is None else active_values(source, sample.input_moments.covariance, d_init)
    _draw_units(lorsa, layer, source, active, seed)
    # The biases are zero, so scaling all w_v by s scales the first reconstruction by s.
    scans = ((target, found) for target, found, _ in lorsa.scan(sample))
    lorsa.W_V.mul_(best_scale(*fit_sums(scans)) if isinstance(norm, str) else norm)
    lorsa.initialization = {"method": method, "d_init": d_init, "seed": seed, "norm": norm}
    reads, writes = (None, None) if active is None else _leaks(lorsa, source, active)
    return InitReport(
        dict(lorsa.initialization),
        leak_decoder=writes,
        leak_encoder=reads,
        encoder_norm=lorsa.W_V.norm(dim=1).mean().item(),
        fvu=squared_error(lorsa, sample) / sample.output_moments.scatter.trace().item(),
    )


def active_values(
    source: AttentionLayer, input_covariance: Float[Tensor, "d_in d_in"], d_init: int
) -> Float[Tensor, "head d_head d_init"]:
    """Return the top principal directions of each head's values, as orthonormal columns, float64."""
    C = input_covariance.double().cpu()
    with few_threads(source.d_head):
        vectors = torch.linalg.eigh(source.W_V.mT @ C @ source.W_V).eigenvectors
    return vectors[:, :, -d_init:].flip(-1)


@torch.no_grad()
def squared_error(lorsa: Lorsa, pairs: SequencePairs) -> float:
    """Return the sum of squared errors at the positions that count, in raw units."""
    total = torch.zeros((), dtype=torch.float64, device=lorsa.W_V.device)
    for target, reconstruction, _ in lorsa.scan(pairs):
        total += (target.double() - reconstruction.double()).square().sum()
    return total.item() / lorsa.output_scale.item() ** 2


def require_norm(norm: float | int | str) -> None:
    """Raise OptionError for a norm that `initialize_lorsa` does not take."""
    given = norm == "search" if isinstance(norm, str) else not isinstance(norm, bool) and 0 < norm < math.inf
    require(given, "norm", norm, "finite and above 0, or 'search'")


def _check_d_init(start: Start, d_init: int | None, d_head: int) -> None:
    if not start.subspace:
        require(d_init is None, "d_init", d_init, f"left out for method={start.name!r}")
        return
    whole = isinstance(d_init, int) and not isinstance(d_init, bool)
    allowed = f"a whole number from 1 to d_qk={d_head} for method={start.name!r}"
    require(whole and 1 <= (d_init or 0) <= d_head, "d_init", d_init, allowed)


def _set_normalization(lorsa: Lorsa, sample: SequencePairs) -> None:
    """Set means and scales from `sample`, so that normalized rows have mean square norm d_in."""
    sides: dict[str, Moments] = {"input": sample.input_moments, "output": sample.output_moments}
    for side, moments in sides.items():
        size = moments.covariance.trace().item()
        require(0 < size < math.inf, f"variance of the {side}s", size, "finite and above 0")
        getattr(lorsa, f"{side}_mean").copy_(moments.mean)
        getattr(lorsa, f"{side}_scale").fill_(math.sqrt(lorsa.d_in / size))


def _draw_units(lorsa: Lorsa, layer: int, source: AttentionLayer, active: Tensor | None, seed: int) -> None:
    """Fill w_v and w_o with rows of unit norm, a group of rows for each query-key head, on their device.

    Raises DataError for rows of zeros.
    """
    width, device = lorsa.d_in if active is None else active.shape[2], lorsa.W_V.device
    drawn = torch.empty(lorsa.n_ov, width, dtype=torch.float64, device=device)
    draw_gaussian(drawn, seed)
    for head, rows in _groups(lorsa, source):
        W_V, W_O = source.W_V[head].to(device), source.W_O[head].to(device)
        if active is not None:
            value = drawn[rows] @ active[head].T.to(device)
            w_v, w_o = value @ W_V.T, value @ W_O
        else:
            w_v = drawn[rows]
            w_o = w_v @ W_V @ W_O
        if not (w_v.any(1) & w_o.any(1)).all():
            raise DataError(
                f"head {head} of layer {layer} reads or writes nothing (its W_V or W_O is zero, as of an "
                "ablated head), so no unit can start in it; from_attention copies such a layer"
            )
        lorsa.W_V[rows] = unit_rows_(w_v.clone()).to(lorsa.W_V)
        lorsa.W_O[rows] = unit_rows_(w_o.clone()).to(lorsa.W_O)


def _groups(lorsa: Lorsa, source: AttentionLayer) -> Iterator[tuple[int, slice]]:
    """Yield, for each query-key head, its head of the layer and the slice of its units."""
    heads = lorsa.config.n_qk_heads
    copies, group = heads // source.n_heads, lorsa.n_ov // heads
    for head in range(heads):
        yield head // copies, slice(head * group, (head + 1) * group)


def _leaks(lorsa: Lorsa, source: AttentionLayer, active: Tensor) -> tuple[float, float]:
    """Return the largest share of a row's norm outside the span of W_V U (w_v) and of U^T W_O (w_o)."""
    largest = [0.0, 0.0]
    for head, rows in _groups(lorsa, source):
        spans = (source.W_V[head] @ active[head], (active[head].T @ source.W_O[head]).T)
        for side, (span, weights) in enumerate(zip(spans, (lorsa.W_V, lorsa.W_O), strict=True)):
            leak = largest_leak(weights.data[rows], torch.linalg.qr(span).Q)
            largest[side] = max(largest[side], leak)
    return largest[0], largest[1]
