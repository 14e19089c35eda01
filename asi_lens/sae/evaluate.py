"""Evaluation of dictionaries: reconstruction, losses of the language model, features that fire.

Every number is a ratio of sums over all evaluated tokens, not an average of batch averages, so it does not
depend on how the tokens are batched. Sums run in float64.
"""

from __future__ import annotations

import re
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
from asi_lens.base.errors import DataError, OptionError, require, require_both
from asi_lens.collapse.interventions import mean_ablate, skip_outliers
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.kernels.codes import SparseCode
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.splice import Hooks, SpliceLosses, hooked_losses, splice_through
from asi_lens.sae.transcoder import Transcoder
from asi_lens.training.ledger import DeadnessLedger

_ROWS = 4096


@dataclass(frozen=True)
class Place:
    """The hooks of a language model that coders read and write."""

    read: str
    """Name of the hook that coders read."""
    write: str
    """Name of the hook that coders write; an autoencoder writes the hook that it reads."""
    layer: int
    """First block with one of the hooks."""
    site: str
    """Name of the written site, for the progress bar and errors."""


@runtime_checkable
class Targets(Protocol):
    """Data that have the moments of the targets: `PairedStores`, `SequencePairs`."""

    @property
    def n(self) -> int: ...
    @property
    def output_moments(self) -> Moments: ...


@runtime_checkable
class Coder(Protocol):
    """A model that can be evaluated: an autoencoder, a transcoder, a Lorsa."""

    @property
    def d_sae(self) -> int: ...
    @property
    def target_scale(self) -> float:
        """Factor on raw targets in `scan`."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor:
        """Return reconstructed raw targets from raw inputs."""
        ...

    def scan(self, data: Any) -> Iterator[tuple[Tensor, Tensor, SparseCode]]:
        """Yield targets, reconstructions and codes [n k] of all `data`; values above zero fired."""
        ...


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
    """Evaluate dictionaries of one site on rows (raw activations) that none was trained on.

    The clean and the ablated model run once for all of them.

    Args:
        model, tokens: give both for the losses of the language model, or neither. The tokens are text that
            no dictionary was trained on.
        where: (site, layer) of the dictionaries; by default that of their or the store's metadata.
        batch_tokens: tokens of a forward pass; the logits of all of them are held in memory.

    Raises OptionError for options that do not go together, a store of another site than the dictionary's, or
    a width that differs. Raises DataError for rows that never vary or are not finite, or a loss that is not
    finite. Raises UnsupportedModelError for a model that does not predict next tokens.
    """
    require(len(saes) > 0, "saes", [], "one or more")
    require_both(model=model, tokens=tokens)
    d_in = rows.d if isinstance(rows, ActivationStore) else rows.shape[1]
    for sae in saes:
        require(not sae.is_transcoder, "saes", "a transcoder", "autoencoders; there is evaluate_transcoder")
        require(sae.d_in == d_in, "rows", f"of width {d_in}", f"{sae.d_in} wide, as the dictionary")
        if isinstance(rows, ActivationStore):
            _require_same_site(sae.config.metadata, rows.metadata)
    place = None
    if model is not None:
        known = rows.metadata if isinstance(rows, ActivationStore) else {}
        site, layer = where or _where(model, [*(sae.config.metadata for sae in saes), known])
        place = _place(saes, model, site, layer)
    return evaluate_at(saes, rows, place, model, tokens, batch_tokens=batch_tokens, progress=progress)


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
        model, tokens: give both for the losses of the language model, or neither. A transcoder reads the
            input site, and its output replaces the output site in the same forward pass.

    Raises OptionError for options that do not go together, widths that differ, losses on stores whose hooks
    are not known, or inputs of a later layer than the outputs. Raises DataError for outputs that never vary,
    and for values or losses that are not finite. Raises UnsupportedModelError for a model that does not
    predict next tokens.
    """
    require(len(saes) > 0, "saes", [], "one or more")
    require_both(model=model, tokens=tokens)
    widths = (store.d, store.d_out)
    for sae in saes:
        require(widths == (sae.d_in, sae.d_out), "store", f"of widths {widths}", f"{(sae.d_in, sae.d_out)}")
    place = None if model is None else _place_of_pairs(model, store.metadata)
    return evaluate_at(saes, store, place, model, tokens, batch_tokens=batch_tokens, progress=progress)


def evaluate_at(
    coders: Sequence[Coder],
    data: Targets | ActivationStore | Tensor,
    place: Place | None,
    model: nn.Module | None,
    tokens: Tokens | None,
    *,
    batch_tokens: int,
    progress: bool,
) -> list[Evaluation]:
    """Evaluate coders of one place on their data. Every kind of coder is evaluated here.

    `place`, `model` and `tokens` are given together, for the losses, or not at all. Raises DataError for
    targets that never vary, and as `hooked_losses`.
    """
    n = len(data) if isinstance(data, Tensor) else data.n
    require(n >= 1, "rows", n, "at least one")
    found = [_scanned(coder, data) for coder in coders]
    mean, variance = _spread(data)
    losses: Sequence[SpliceLosses | None] = [None] * len(coders)
    if place is not None and model is not None and tokens is not None:
        spliced = [splice_through(coder, place.read, place.write) for coder in coders]
        ablated: Hooks = {place.write: skip_outliers(mean_ablate(mean))}
        options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
        losses = hooked_losses(model, tokens, place.layer, ablated, spliced, site=place.site, **options)
    return [
        Evaluation(n, error / variance, 1 - error / variance, fired / n, silent, loss)
        for (error, fired, silent), loss in zip(found, losses, strict=True)
    ]


@torch.inference_mode()
def _scanned(coder: Coder, data: Any) -> tuple[float, int, float]:
    """Return squared error in raw units, number of firings, and share of features that never fired."""
    error, fired, ledger = 0.0, 0, None
    for target, reconstruction, code in coder.scan(data):
        ledger = ledger or DeadnessLedger(coder.d_sae, code.values.device)
        exact = target.double()
        error += (exact - reconstruction.to(exact)).square().sum().item()
        fired += int((code.values > 0).sum())
        ledger.update(code)
    assert ledger is not None  # there is a row
    return error / coder.target_scale**2, fired, ledger.silent_fraction


def _spread(data: Targets | ActivationStore | Tensor) -> tuple[Float[Tensor, " d_out"], float]:
    """Return the mean of the targets, and the sum of their squared distances from the mean.

    Raises DataError for targets that never vary.
    """
    if not isinstance(data, ActivationStore | Tensor):
        moments = data.output_moments
        scatter = moments.scatter.trace().item()
        if not scatter > 1e-28 * moments.n * moments.mean.square().sum().item():
            raise DataError("the outputs never vary: the fraction of variance unexplained is not defined")
        return moments.mean, scatter
    shift: Tensor | None = None
    first = square = torch.zeros((), dtype=torch.float64)
    for block in data.in_order(_ROWS) if isinstance(data, ActivationStore) else data.split(_ROWS):
        x = block.double()
        if shift is None:
            # Sums around a point near the mean keep their precision where the mean is far from zero.
            shift = x.mean(0)
        first = first.to(x.device) + (x - shift).sum(0)
        square = square.to(x.device) + (x - shift).square().sum()
    assert shift is not None  # there is a row
    variance = (square - first.square().sum() / len(data)).item()
    if not variance > 1e-28 * (square + len(data) * shift.square().sum()).item():
        raise DataError("the rows never vary: the fraction of variance unexplained is not defined")
    return shift + first / len(data), variance


def _place(saes: Sequence[SparseAutoencoder], model: nn.Module, site: str, layer: int) -> Place:
    """Return the place of a site of the model. Raises OptionError for a dictionary of another width."""
    hook, width = models.hook_name(model, site, layer), models.site_width(model, site, layer)
    for sae in saes:
        name = models.model_info(model, fingerprint=False).name
        require(sae.d_in == width, "sae", f"d_in={sae.d_in}", f"{width} wide, as {site} of {name}")
    return Place(hook, hook, layer, site)


def _place_of_pairs(model: nn.Module, about: Mapping[str, Any]) -> Place:
    """Return the place of the two sites of `PairedStores`, from their metadata."""
    reads = about.get("reads", {})
    for side in (reads, about):
        for key in ("site", "layer"):
            if side.get(key) is None:
                raise OptionError(f"the {key} of these stores is not known: their metadata do not say")
    read = models.hook_name(model, str(reads["site"]), int(reads["layer"]))
    write = models.hook_name(model, str(about["site"]), int(about["layer"]))
    require(read != write, "output site", write, "another than the input site")
    first = int(reads["layer"])
    require(first <= int(about["layer"]), "layer of the inputs", first, f"at most {about['layer']}")
    return Place(read, write, first, str(about["site"]))


def _where(model: nn.Module, about: Sequence[Mapping[str, Any]]) -> SiteLayer:
    """Return the (site, layer) of the metadata. Raises OptionError if they differ or none has a site."""
    known = {models.hook_name(model, *found): found for each in about if (found := _site_layer(each))}
    if len(known) != 1:
        what = f"differ ({', '.join(known)})" if known else "are not known"
        raise OptionError(f"site and layer of the dictionaries {what}; give where=(site, layer)")
    return next(iter(known.values()))


def _site_layer(metadata: Mapping[str, Any]) -> SiteLayer | None:
    site, layer, hook = (metadata.get(key) for key in ("site", "layer", "hook_name"))
    if site is not None and layer is not None:
        return str(site), int(layer)
    # SAELens records only the hook.
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
