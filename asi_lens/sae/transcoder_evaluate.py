"""What a transcoder writes on held-out tokens, what that does to the language model, which features fire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asi_lens.activations.pairs import PairedStores
from asi_lens.base.errors import OptionError, require, require_both
from asi_lens.collapse.interventions import mean_ablate, skip_first
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.sae.evaluate import Evaluation, scatter_of
from asi_lens.sae.splice import Hooks, SpliceLosses, hooked_losses, splice_through
from asi_lens.sae.transcoder import Transcoder
from asi_lens.training.ledger import DeadnessLedger

_ROWS = 4096


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
    return evaluate_transcoders(
        [sae], store, model=model, tokens=tokens, batch_tokens=batch_tokens, progress=progress
    )[0]


@torch.inference_mode()
def evaluate_transcoders(
    saes: Sequence[Transcoder],
    store: PairedStores,
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> list[Evaluation]:
    """Numbers of transcoders of the same sites on tokens that none was trained on; FVU of the outputs.

    The clean and the ablated model run once for
    all.

    Args:
        model, tokens: both or none: for the losses of the language model with what a transcoder writes in
            place of the output site, reading the input site of the same forward pass.

    Raises OptionError for options that do not belong together, widths that differ, or stores whose hooks are
    not known where losses are asked for; DataError for outputs that never vary, or values or losses that are
    not finite; UnsupportedModelError for a model that does not predict next tokens.
    """
    require(len(saes) > 0, "saes", [], "one or more")
    require_both(model=model, tokens=tokens)
    widths = (store.d, store.d_out)
    for sae in saes:
        require(widths == (sae.d_in, sae.d_out), "store", f"of widths {widths}", f"{(sae.d_in, sae.d_out)}")
    moments = store.outputs.moments
    variance = scatter_of(moments)
    losses: Sequence[SpliceLosses | None] = [None] * len(saes)
    if model is not None and tokens is not None:
        losses = splice_transcoders(
            saes,
            model,
            tokens,
            store.metadata,
            moments.mean,
            batch_tokens=batch_tokens,
            progress=progress,
        )
    return [
        Evaluation(**_numbers(sae, store, variance), losses=loss)
        for sae, loss in zip(saes, losses, strict=True)
    ]


def _numbers(sae: Transcoder, store: PairedStores, variance: float) -> dict[str, Any]:
    """The fields of `Evaluation` that come from the store."""
    ledger = DeadnessLedger(sae.d_sae, sae.W_dec.device)
    error, fired = 0.0, 0
    for pair in store.in_order(_ROWS):
        code = sae.encode(pair.x)
        error += (pair.y.double() - sae.decode(code).double()).square().sum().item()
        fired += int((code.values > 0).sum())
        ledger.update(code)
    return {
        "n_tokens": store.n,
        "fvu": error / variance,
        "explained_variance": 1 - error / variance,
        "l0": fired / store.n,
        "dead_fraction": ledger.silent_fraction,
    }


def splice_transcoders(
    saes: Sequence[Transcoder],
    model: nn.Module,
    tokens: Tokens,
    about: Mapping[str, Any],
    mean: Tensor,
    *,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> list[SpliceLosses]:
    """Losses with what each transcoder writes in place of the output site, position 0 left as it is.

    `about` is the metadata of `PairedStores`; `mean [d_out]` is what ablation writes. Raises OptionError if a
    site is not known or the inputs are of a later layer than the outputs.
    """
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
    ablated: Hooks = {write: skip_first(mean_ablate(mean))}
    return hooked_losses(
        model,
        tokens,
        first,
        ablated,
        [splice_through(sae, read, write) for sae in saes],
        site=str(about["site"]),
        batch_tokens=batch_tokens,
        progress=progress,
    )
