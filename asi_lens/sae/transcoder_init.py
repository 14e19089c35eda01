"""Initialization of transcoders: the directions that features write, and the directions they read.

Decoder directions are those of `initialize`: random, or in the active subspace of the *outputs* (ASI). A
feature that writes w should fire on tokens whose output has a large part along w, so the encoder should
predict that part from the inputs. The encoder has three starts:

- `regression`: x_n -> M x_n is the best linear prediction of the output (ridge regression on the store). A
  feature reads M^T w, so that its reading is the predicted output along w.
- `active`: drawn independently in the active subspace of the *inputs*.
- `random`: drawn independently, isotropically.

Encoder rows get unit norm. Then one factor on all rows minimizes the error of the first reconstruction.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.pairs import PairedStores
from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_known
from asi_lens.base.products import exact_products
from asi_lens.kernels.draws import other_stream, unit_rows_
from asi_lens.sae.initialize import InitReport, active_subspace_of, auto_d_init, largest_leak
from asi_lens.sae.scale import first_fit, fit_scale, require_overshoot, scale_encoder
from asi_lens.sae.starts import STARTS, Draw, find_start
from asi_lens.sae.transcoder import Transcoder

TRANSCODER_METHODS = tuple(name for name, start in STARTS.items() if start.transcoders)
"""Methods for the initial decoder: Gaussian, or in the active subspace of the outputs."""
READERS = ("random", "active", "regression")
"""Starts of the encoder."""

# Ridge, as a share of the inputs' mean variance per direction (1 in normalized units).
_RIDGE = 1e-2
_SAMPLE = 8192


@checked
@exact_products()
@torch.no_grad()
def initialize_transcoder(
    sae: Transcoder,
    store: PairedStores,
    method: str = "asi",
    reader: str = "regression",
    d_init: int | str | None = None,
    *,
    overshoot: float | int = 1.0,
    initial_l0: float | int | None = None,
    seed: int | None = None,
) -> InitReport:
    """Set every weight of `sae` and the normalization of both sides, in place. Returns a report.

    In its options, `d_reads` is the dimension of the inputs' active subspace, None except for the reader
    "active".

    Args:
        store: the training data, for means, scales, subspaces, the regression and the norm.
        method: one of `TRANSCODER_METHODS`. reader: one of `READERS`.
        d_init: dimensions of the outputs' active subspace, 1 to d_out, or "auto" (`auto_d_init`). ASI only.
        overshoot, initial_l0: as in `initialize`.
        seed: seed of the directions; by default the configuration's seed.

    Raises OptionError, UnknownNameError, or DataError for rows that never vary.
    """
    start = find_start(method, TRANSCODER_METHODS)
    require_known([reader], READERS, "reader")
    require(store.d == sae.d_in, "store", f"with inputs {store.d} wide", f"with inputs {sae.d_in} wide")
    wide = "with outputs {} wide".format
    require(store.d_out == sae.d_out, "store", wide(store.d_out), wide(sae.d_out))
    if not sae.activation.has_threshold:
        require(initial_l0 is None, "initial_l0", initial_l0, "left out for an activation without thresholds")
    written = store.outputs.spectrum if start.subspace else None
    active = active_subspace_of(method, written, d_init, sae.d_out)
    seed = sae.config.seed if seed is None else seed
    require(seed >= 0, "seed", seed, "at least 0")
    require_overshoot(overshoot)

    sae.set_normalization(store.inputs.mean, store.inputs.scale)
    sae.set_output_normalization(store.outputs.mean, store.outputs.scale)
    sae.b_enc.zero_()
    sae.activation.reset()
    sae.b_dec.zero_()
    sample = store.sample(min(_SAMPLE, store.n))
    active = None if active is None else active.to(sae.W_dec.device)
    start.fill(sae.W_dec.data, Draw(seed, active, written, sample.y))
    linear_fvu, reads = None, None
    if reader == "regression":
        guess, linear_fvu = linear_guess(sae, store)
        for w_enc, w_dec in zip(sae.encoder_rows.split(4096), sae.W_dec.data.split(4096), strict=True):
            w_enc.copy_(w_dec.double() @ guess.to(w_dec.device))
        unit_rows_(sae.encoder_rows)
    else:
        if reader == "active":
            spectrum = store.inputs.spectrum
            reads = active_subspace_of("asi", spectrum, auto_d_init(spectrum), sae.d_in)
            reads = None if reads is None else reads.to(sae.W_dec.device)
        drawn = STARTS["random" if reads is None else "asi"]
        drawn.fill(sae.encoder_rows, Draw(other_stream(seed), reads))

    fit_scale(sae, sample, initial_l0)
    scale_encoder(sae, overshoot)
    total, cross, power = first_fit(sae, sample)
    sae.initialization = {
        "method": method,
        "reader": reader,
        "d_init": None if active is None else active.shape[1],
        "d_reads": None if reads is None else reads.shape[1],
        "seed": seed,
        "overshoot": float(overshoot),
    }
    return InitReport(
        dict(sae.initialization),
        leak_decoder=None if active is None else largest_leak(sae.W_dec.data, active),
        leak_encoder=None if reads is None else largest_leak(sae.encoder_rows, reads),
        encoder_norm=torch.linalg.vector_norm(sae.encoder_rows, dim=1).mean().item(),
        fvu=(total - 2 * cross + power) / total,
        linear_fvu=linear_fvu,
    )


def linear_guess(sae: Transcoder, store: PairedStores) -> tuple[Float[Tensor, "d_out d_in"], float]:
    """Return M of the ridge regression y_n ~ M x_n over the whole store, float64, and the fraction of the
    outputs' variance that M x_n leaves unexplained."""
    device = sae.W_dec.device
    outer = torch.zeros(sae.d_out, sae.d_in, dtype=torch.float64, device=device)
    power = torch.zeros(sae.d_in, sae.d_in, dtype=torch.float64, device=device)
    total = 0.0
    for pair in store.in_order(8192):
        x, y = sae.normalize(pair.x).double(), sae.normalize_output(pair.y).double()
        outer += y.T @ x
        power += x.T @ x
        total += y.square().sum().item()
    ridge = power + _RIDGE * store.n * torch.eye(sae.d_in, dtype=torch.float64, device=device)
    guess = torch.linalg.solve(ridge, outer.T).T
    explained = 2 * (guess * outer).sum() - ((guess @ power) * guess).sum()
    return guess, 1 - explained.item() / total
