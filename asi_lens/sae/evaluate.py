"""What a dictionary reconstructs, what that does to the language model, which features fire.

Every number is a ratio of sums over all evaluated tokens, never an average of batch averages, so that it
does not depend on how the tokens are batched. Sums run in float64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.harvest_store import ActivationStore
from asi_lens.activations.moments import Moments
from asi_lens.base.errors import DataError, OptionError, require, require_both
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.splice import SpliceLosses, splice_losses
from asi_lens.training.ledger import DeadnessLedger

_ROWS = 4096


@dataclass(frozen=True)
class Evaluation:
    """Numbers of one dictionary on held-out activations."""

    n_tokens: int
    """Rows that the next four are over."""
    fvu: float
    """sum ||x - reconstruction||^2 / sum ||x - mean x||^2, with the mean of the evaluated rows."""
    explained_variance: float
    """1 - fvu; 0 for predicting the mean, negative for worse."""
    l0: float
    """Mean number of features with a value above zero."""
    dead_fraction: float
    """Share of features that fired on none of the `n_tokens`."""
    losses: SpliceLosses | None = None
    """None where no model was given."""


def evaluate(
    sae: SparseAutoencoder,
    rows: ActivationStore | Float[Tensor, "n d_in"],
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    where: SiteLayer | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> Evaluation:
    """Evaluate one dictionary; see `evaluate_together`."""
    return evaluate_together(
        [sae],
        rows,
        model=model,
        tokens=tokens,
        where=where,
        batch_tokens=batch_tokens,
        progress=progress,
    )[0]


def evaluate_together(
    saes: Sequence[SparseAutoencoder],
    rows: ActivationStore | Float[Tensor, "n d_in"],
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    where: SiteLayer | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> list[Evaluation]:
    """Evaluate dictionaries of one site on rows (raw activations) that they were not trained on.

    The clean and the ablated model run once for all of them.

    Args:
        model, tokens: both or none: for the losses of the language model, on text it was not trained on.
        where: (site, layer) of the dictionaries; by default what their metadata or the store's say.
        batch_tokens: tokens of a forward pass; logits of all of them are held.

    Raises OptionError for options that do not belong together, a store of another site than the
    dictionary's, or a width that differs; DataError for rows that never vary or are not finite, or a loss
    that is not; UnsupportedModelError for a model that does not predict next tokens.
    """
    require(len(saes) > 0, "saes", [], "one or more")
    require_both(model=model, tokens=tokens)
    d_in = rows.d if isinstance(rows, ActivationStore) else rows.shape[1]
    for sae in saes:
        require(not sae.is_transcoder, "saes", "a transcoder", "autoencoders; there is evaluate_transcoder")
        require(sae.d_in == d_in, "rows", f"of width {d_in}", f"{sae.d_in} wide, as the dictionary")
        if isinstance(rows, ActivationStore):
            _require_same_site(sae.config.metadata, rows.metadata)
    mean, found = _reconstruct(saes, rows)
    losses: Sequence[SpliceLosses | None] = [None] * len(saes)
    if model is not None and tokens is not None:
        known = rows.metadata if isinstance(rows, ActivationStore) else {}
        site, layer = where or _where(model, [*(sae.config.metadata for sae in saes), known])
        losses = splice_losses(
            saes, model, tokens, site, layer, mean, batch_tokens=batch_tokens, progress=progress
        )
    return [Evaluation(**numbers, losses=loss) for numbers, loss in zip(found, losses, strict=True)]


def scatter_of(outputs: Moments) -> float:
    """Sum of squared distances from the mean. Raises DataError where the outputs never vary."""
    scatter = outputs.scatter.trace().item()
    if not scatter > 1e-28 * outputs.n * outputs.mean.square().sum().item():
        raise DataError("the outputs never vary: the fraction of variance unexplained is not defined")
    return scatter


@torch.inference_mode()
def _reconstruct(
    saes: Sequence[SparseAutoencoder], rows: ActivationStore | Tensor
) -> tuple[Float[Tensor, " d_in"], list[dict[str, Any]]]:
    """The rows' mean, and for each dictionary the fields of `Evaluation` that come from the rows."""
    n = len(rows)
    require(n >= 1, "rows", n, "at least one")
    shift: Tensor | None = None
    first = square = torch.zeros((), dtype=torch.float64)
    errors, fired = [0.0] * len(saes), [0] * len(saes)
    ledgers = [DeadnessLedger(sae.d_sae, sae.W_dec.device) for sae in saes]
    for block in rows.in_order(_ROWS) if isinstance(rows, ActivationStore) else rows.split(_ROWS):
        x = block.double()
        if shift is None:
            # Sums around a point near the mean: nothing is lost where the mean is far from zero.
            shift = x.mean(0)
        first = first.to(x.device) + (x - shift).sum(0)
        square = square.to(x.device) + (x - shift).square().sum()
        for k, sae in enumerate(saes):
            code = sae.encode(block)
            errors[k] += (x - sae.decode(code).to(x)).square().sum().item()
            fired[k] += int((code.values > 0).sum())
            ledgers[k].update(code)
    assert shift is not None
    variance = (square - first.square().sum() / n).item()
    if not variance > 1e-28 * (square + n * shift.square().sum()).item():
        raise DataError("the rows never vary: the fraction of variance unexplained is not defined")
    found = []
    for error, count, ledger in zip(errors, fired, ledgers, strict=True):
        found.append(
            {
                "n_tokens": n,
                "fvu": error / variance,
                "explained_variance": 1 - error / variance,
                "l0": count / n,
                "dead_fraction": ledger.silent_fraction,
            }
        )
    return shift + first / n, found


def _where(model: nn.Module, about: Sequence[Mapping[str, Any]]) -> SiteLayer:
    """(site, layer) that all who know it agree on."""
    known = {models.hook_name(model, *found): found for each in about if (found := _site_layer(each))}
    if len(known) != 1:
        what = f"differ ({', '.join(known)})" if known else "are not known"
        raise OptionError(f"site and layer of the dictionaries {what}; give where=(site, layer)")
    return next(iter(known.values()))


def _site_layer(metadata: Mapping[str, Any]) -> SiteLayer | None:
    site, layer, hook = (metadata.get(key) for key in ("site", "layer", "hook_name"))
    if site is not None and layer is not None:
        return str(site), int(layer)
    # SAELens names the hook alone.
    match = re.match(r"blocks\.(\d+)\.", str(hook))
    return (str(hook), int(match[1])) if match else None


def _require_same_site(sae: Mapping[str, Any], store: Mapping[str, Any]) -> None:
    for key in ("hook_name", "site", "layer"):
        mine, theirs = sae.get(key), store.get(key)
        if mine is not None and theirs is not None:
            if mine != theirs:
                raise OptionError(f"a dictionary of {key} {mine!r} and a store of {key} {theirs!r}")
            if key == "hook_name":
                return
