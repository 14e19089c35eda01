"""Evaluation of dictionaries: reconstruction, losses of the language model, features that fire.

Every number is a ratio of sums over all evaluated tokens, not an average of batch averages, so it does not
depend on how the tokens are batched. Sums run in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.harvest_store import ActivationStore
from asi_lens.activations.moments import Moments
from asi_lens.activations.pairs import PairedStores
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, require, require_both
from asi_lens.base.facts import facts_html
from asi_lens.base.products import exact_products
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.same_origin import require_model_of
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.finite import require_sizes
from asi_lens.sae.splice import Hooks, Place, Spliced, SpliceLosses, hooked_losses
from asi_lens.sae.transcoder import Transcoder
from asi_lens.training.ledger import DeadnessLedger

_ROWS = 4096


@runtime_checkable
class Targets(Protocol):
    """Data that have the moments of the targets: `PairedStores`, `SequencePairs`."""

    @property
    def n(self) -> int: ...
    @property
    def output_moments(self) -> Moments: ...


@checked
@dataclass(frozen=True)
class Evaluation:
    """Numbers of one dictionary on held-out activations."""

    n_tokens: int
    """Number of rows behind `fvu`, `explained_variance`, `l0` and `dead_fraction`."""
    fvu: float
    """sum ||x - reconstruction||^2 / sum ||x - mean x||^2, with the mean of the evaluated rows."""
    explained_variance: float
    """1 - fvu; 0 for predicting the mean, negative for a worse reconstruction."""
    l0: float
    """Mean number of features with a value above zero."""
    dead_fraction: float
    """Share of features that fired on none of the `n_tokens`."""
    losses: SpliceLosses | None = None
    """Losses of the language model; None without a model."""

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {
            "rows": self.n_tokens,
            "FVU": self.fvu,
            "l0": self.l0,
            "silent features": f"{100 * self.dead_fraction:.2f} %",
        }
        if (losses := self.losses) is not None:
            error = losses.cross_entropy_delta_error
            give = "" if error is None else f" ± {error:.2g} (standard error)"
            facts |= {
                "loss of the model (nats / token)": losses.cross_entropy_clean,
                "with the reconstruction": losses.cross_entropy,
                "difference": f"{losses.cross_entropy_delta:.4g}{give}",
                "with the site at its mean": losses.cross_entropy_mean_ablated,
                "loss recovered": losses.loss_recovered,
                "KL": losses.kl,
                "predicted tokens": losses.n_predictions,
            }
        return facts_html("Evaluation", facts)


@checked
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


@checked
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
    """Evaluate dictionaries of one site on rows (raw activations) that none was trained on.

    The clean and the ablated model run once for all of them.

    Args:
        model: give model and tokens for the losses of the language model, or neither.
        tokens: text that no dictionary was trained on.
        where: (site, layer) of the dictionaries; by default that of their or the store's metadata.
        batch_tokens: tokens of a forward pass; the logits of all of them are held in memory.

    Raises OptionError for options that do not go together, weights that are not of the configuration's sizes,
    a store of another width or site than the dictionary's, or losses of another model than the store's.
    Raises DataError for rows that never vary or values that are not finite, UnsupportedModelError for a model
    that does not predict next tokens.
    """
    require(len(saes) > 0, "saes", [], "one or more")
    d_in = rows.d if isinstance(rows, ActivationStore) else rows.shape[1]
    for sae in saes:
        require_sizes(sae)
        require(
            not sae.is_transcoder, "saes", "a transcoder", "autoencoders (evaluate_transcoder evaluates it)"
        )
        require(sae.d_in == d_in, "rows", f"of width {d_in}", f"{sae.d_in} wide, as the dictionary")
        if isinstance(rows, ActivationStore):
            _require_same_site(sae.config.metadata, rows.metadata)
    place = None if where is None or model is None else Place.of(model, where)
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    return evaluate_at(saes, rows, model, tokens, place, **options)


@checked
def evaluate_transcoder(
    sae: Transcoder,
    store: PairedStores,
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> Evaluation:
    """Evaluate one transcoder; see `evaluate_transcoders`."""
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    return evaluate_transcoders([sae], store, model=model, tokens=tokens, **options)[0]


def evaluate_transcoders(
    saes: Sequence[Transcoder],
    store: PairedStores,
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> list[Evaluation]:
    """Evaluate transcoders of the same sites on tokens that none was trained on. The FVU is of the outputs.

    The clean and the ablated model run once for all transcoders.

    Args:
        model: give model and tokens for the losses of the language model, or neither. A transcoder reads the
            input site, and its output replaces the output site in the same forward pass.
        tokens: see `model`.

    Raises OptionError for options that do not go together, widths or sizes of weights that differ, losses on
    stores whose hooks are not known or of another model than theirs, or inputs of a later layer than the
    outputs. Raises as `evaluate_together` otherwise.
    """
    require(len(saes) > 0, "saes", [], "one or more")
    widths = (store.d, store.d_out)
    for sae in saes:
        require_sizes(sae)
        require(
            widths == (sae.d_in, sae.d_out),
            "store",
            f"of widths {widths}",
            f"of widths {(sae.d_in, sae.d_out)}",
        )
    return evaluate_at(saes, store, model, tokens, batch_tokens=batch_tokens, progress=progress)


@exact_products()
def evaluate_at(
    coders: Sequence[Spliced],
    data: Targets | ActivationStore | Tensor,
    model: nn.Module | None,
    tokens: Tokens | None,
    place: Place | None = None,
    *,
    batch_tokens: int,
    progress: bool,
) -> list[Evaluation]:
    """Evaluate coders of one place on their data, which are read once. Every kind of coder is evaluated here.

    `model` and `tokens` are given together, for the losses, or not at all. `place` is by default the place
    that the metadata of coders and data name. Raises DataError for targets that never vary, and as
    `Spliced.hooks` and `hooked_losses`.
    """
    require_both(model=model, tokens=tokens)
    n = len(data) if isinstance(data, Tensor) else data.n
    require(n >= 1, "rows", f"{n} rows", "at least one row")
    spliced: list[Hooks] = []
    if model is not None:
        of_data = getattr(data, "metadata", {})
        require_model_of("the data", of_data, model)
        about = [*(coder.config.metadata for coder in coders[1:]), of_data]
        place = coders[0].place(model, *about) if place is None else place
        spliced = [coder.hooks(model, place) for coder in coders]
    found = [_Tally(coder) for coder in coders]
    spread = _Spread()
    with torch.inference_mode():
        for block in _blocks(data):
            for one in found:
                one.add(block)
            if isinstance(block, Tensor):
                spread.add(block)
    # Data of pairs know the moments of their targets.
    mean, variance = _known_spread(data) if spread.n == 0 else spread.found()
    losses: Sequence[SpliceLosses | None] = [None] * len(coders)
    if place is not None and model is not None and tokens is not None:
        options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
        losses = hooked_losses(model, tokens, place, mean, spliced, **options)
    return [one.numbers(n, variance, loss) for one, loss in zip(found, losses, strict=True)]


def _blocks(data: Targets | ActivationStore | Tensor) -> Iterator[Any]:
    """Yield rows (pairs of rows) that are read from files in blocks, and data in memory as they are."""
    if isinstance(data, Tensor):
        return iter(data.split(_ROWS))
    return data.in_order(_ROWS) if isinstance(data, ActivationStore | PairedStores) else iter([data])


class _Tally:
    """Sums of one coder over the blocks of its data."""

    def __init__(self, coder: Spliced):
        self.coder = coder
        self.error: float | Tensor = 0.0  # on the coder's device
        self.ledger: DeadnessLedger | None = None

    def add(self, block: Any) -> None:
        """Count a block."""
        for target, reconstruction, code in self.coder.scan(block):
            self.ledger = self.ledger or DeadnessLedger(self.coder.d_sae, code.values.device)
            exact = target.double()
            self.error = self.error + (exact - reconstruction.to(exact)).square().sum()
            self.ledger.update(code)

    def numbers(self, n: int, variance: float, losses: SpliceLosses | None) -> Evaluation:
        """Return the evaluation over `n` rows whose targets have that variance (a sum, in raw units)."""
        assert self.ledger is not None  # there is a row
        fvu = float(self.error) / self.coder.target_scale**2 / variance
        l0 = self.ledger.counts.sum().item() / n
        return Evaluation(n, fvu, 1 - fvu, l0, self.ledger.silent_fraction, losses)


class _Spread:
    """Mean of rows, and the sum of their squared distances from the mean, over blocks of rows."""

    def __init__(self) -> None:
        self.n = 0
        self.shift: Tensor | None = None
        self.first = self.square = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, block: Float[Tensor, "n d"]) -> None:
        """Count a block."""
        x = block.double()
        if self.shift is None:
            # Sums around a point near the mean keep their precision where the mean is far from zero.
            self.shift = x.mean(0)
        self.n += len(x)
        self.first = self.first.to(x.device) + (x - self.shift).sum(0)
        self.square = self.square.to(x.device) + (x - self.shift).square().sum()

    def found(self) -> tuple[Float[Tensor, " d"], float]:
        """Return the mean and the sum. Raises DataError for rows that never vary."""
        shift, n = self.shift, self.n
        assert shift is not None  # there is a row
        variance = (self.square - self.first.square().sum() / n).item()
        if not variance > 1e-28 * (self.square + n * shift.square().sum()).item():
            raise DataError("the rows do not vary: the fraction of variance unexplained is not defined")
        return shift + self.first / n, variance


def _known_spread(data: Any) -> tuple[Float[Tensor, " d_out"], float]:
    """Return mean and spread of the targets, as `_Spread.found`, from the moments of the data."""
    moments = data.output_moments
    scatter = moments.scatter.trace().item()
    if not scatter > 1e-28 * moments.n * moments.mean.square().sum().item():
        raise DataError("the outputs do not vary: the fraction of variance unexplained is not defined")
    return moments.mean, scatter


def _require_same_site(sae: Mapping[str, Any], store: Mapping[str, Any]) -> None:
    for key in ("hook_name", "site", "layer"):
        mine, theirs = sae.get(key), store.get(key)
        if mine is not None and theirs is not None:
            if mine != theirs:
                raise OptionError(f"the store has {key} {theirs!r}, but the dictionary has {key} {mine!r}")
            if key == "hook_name":
                return
