"""Methods compared on the same text, sequence by sequence, with their dictionaries in the language model.

Losses of two dictionaries rise and fall together from sequence to sequence, so the error of their paired
difference is far below that of each loss alone. Dictionaries of several layers can be in their places at
once, which makes the loss of the language model large enough to resolve.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asi_lens.base.errors import DataError, require
from asi_lens.experiments.runs import TrainedRun
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.fingerprint import cached_numbers, number_key
from asi_lens.inputs.float32 import loss_dtype
from asi_lens.inputs.models import model_info, resolve_device
from asi_lens.results.rows import PairedLossRow
from asi_lens.sae.splice import sequence_losses

# Raise it when a change to the code changes the numbers.
_FORMAT = 2
_Group = tuple[str, int]


def paired_rows(
    runs: Sequence[TrainedRun],
    model: nn.Module,
    tokens: Tokens,
    *,
    reference: str = "random",
    progress: bool = True,
) -> list[PairedLossRow]:
    """Return each method's losses, and their paired differences from those of `reference`, for each seed.

    All dictionaries of a method and seed are in their places in one pass. Measurements are cached.

    Args:
        runs: runs of autoencoders of two methods or more, of the same places and seeds each.
        tokens: text that none was trained on, two sequences or more.

    Raises OptionError if methods differ in their places, or one has two dictionaries for a place, if
    `reference` is missing, or for fewer than two sequences; DataError for losses that are not finite, and as
    `sequence_losses`.
    """
    require(len(tokens) >= 2, "tokens", f"{len(tokens)} sequences", "two sequences or more")
    groups: dict[_Group, list[TrainedRun]] = defaultdict(list)
    for run in runs:
        groups[run.recipe.name, run.seed].append(run)
    methods = list(dict.fromkeys(method for method, _ in groups))
    require(reference in methods, "reference", reference, f"one of {', '.join(methods)}")
    places = _places(groups)
    found = dict(zip(groups, _measured(list(groups.values()), model, tokens, progress), strict=True))
    info = model_info(model, fingerprint=False)
    out = []
    for (method, seed), (clean, loss, kl) in found.items():
        if method == reference:
            continue
        _, other_loss, other_kl = found[reference, seed]
        loss_difference, loss_error = _pair(loss, other_loss)
        kl_difference, kl_error = _pair(kl, other_kl)
        out.append(
            PairedLossRow(
                model=info.name,
                corpus=tokens.corpus,
                n_tokens=tokens.n_tokens,
                n_sequences=len(tokens),
                places=", ".join(places),
                n_places=len(places),
                method=method,
                reference=reference,
                seed=seed,
                cross_entropy_delta=(loss - clean).mean().item(),
                cross_entropy_difference=loss_difference,
                cross_entropy_error=loss_error,
                kl=kl.mean().item(),
                kl_difference=kl_difference,
                kl_error=kl_error,
            )
        )
    return out


def _places(groups: dict[_Group, list[TrainedRun]]) -> list[str]:
    """Return the places that every method and seed has dictionaries for, one each."""
    each = [
        [f"{run.config.metadata['site']} {run.config.metadata['layer']}" for run in own]
        for own in groups.values()
    ]
    for names in each:
        require(
            len(set(names)) == len(names), "runs", f"several of a method for {names}", "one for each place"
        )
    alike = all(set(names) == set(each[0]) for names in each)
    require(alike, "runs", "of different places", "of the same places for every method and seed")
    return each[0]


def _pair(own: Tensor, other: Tensor) -> tuple[float, float]:
    """Return mean and standard error of the differences."""
    difference = own - other
    return difference.mean().item(), difference.std().item() / math.sqrt(len(difference))


def _measured(
    groups: Sequence[Sequence[TrainedRun]], model: nn.Module, tokens: Tokens, progress: bool
) -> list[tuple[Tensor, ...]]:
    """Return clean losses, losses and KL of each sequence, for each group of dictionaries."""

    def measure(missing: list[int]) -> list[dict[str, list[float]]]:
        device, edits, first = resolve_device("auto"), [], None
        for position in missing:
            hooks: dict[str, Any] = {}
            for run in groups[position]:
                sae = run.sae().to(device)
                place = sae.place(model)
                first = place.layer if first is None else min(first, place.layer)
                hooks |= sae.hooks(model, place)
            edits.append(hooks)
        assert first is not None  # there is a run
        losses = sequence_losses(model, tokens, edits, first, progress=progress, what="paired")
        if not all(bool(torch.isfinite(part).all()) for part in losses):
            raise DataError("a loss with dictionaries in their places is not finite")
        return [
            {"clean": losses.clean.tolist(), "loss": loss.tolist(), "kl": kl.tolist()}
            for loss, kl in zip(losses.cross_entropy, losses.kl, strict=True)
        ]

    info = model_info(model)
    shared = number_key(info.fingerprint, loss_dtype(info.dtype), tokens.fingerprint, format=_FORMAT)
    keys = [{**shared, "runs": sorted(run.folder.name for run in own)} for own in groups]
    return [
        tuple(torch.tensor(one[name], dtype=torch.float64) for name in ("clean", "loss", "kl"))
        for one in cached_numbers("paired", keys, measure)
    ]
