"""What a Lorsa reconstructs on held-out sequences, what that does to the language model, which units fire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asi_lens.base.errors import OptionError, require, require_both
from asi_lens.collapse.interventions import mean_ablate, skip_first
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.kernels.codes import SparseCode
from asi_lens.lorsa.attention import READ_SITE, write_site
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.initialize import codes
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.sae.evaluate import Evaluation, scatter_of
from asi_lens.sae.splice import Hooks, SpliceLosses, hooked_losses, splice_through
from asi_lens.training.ledger import DeadnessLedger


def evaluate_lorsa(
    lorsa: Lorsa,
    pairs: SequencePairs,
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    layer: int | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> Evaluation:
    """Evaluate one Lorsa; see `evaluate_lorsas`."""
    return evaluate_lorsas(
        [lorsa],
        pairs,
        model=model,
        tokens=tokens,
        layer=layer,
        batch_tokens=batch_tokens,
        progress=progress,
    )[0]


@torch.inference_mode()
def evaluate_lorsas(
    lorsas: Sequence[Lorsa],
    pairs: SequencePairs,
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    layer: int | None = None,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> list[Evaluation]:
    """Numbers of Lorsas of one layer on sequences that they were not trained on, all over the positions but
    the first.

    In the results a feature is a unit and `n_tokens` the positions counted. The clean and the ablated model
    run once for all.

    Args:
        model, tokens: both or none: for the losses of the language model with the reconstruction in place of
            what the attention layer writes.
        layer: of the Lorsas; by default what their metadata say.
        batch_tokens: tokens of a forward pass; logits of all of them are held.

    Raises OptionError for options that do not belong together or pairs of another width or layer; DataError
    for outputs that never vary, values or losses that are not finite, or sequences longer than the context;
    UnsupportedModelError for a model that does not predict next tokens.
    """
    require(len(lorsas) > 0, "lorsas", [], "one or more")
    require_both(model=model, tokens=tokens)
    for lorsa in lorsas:
        require(pairs.d == lorsa.d_in, "pairs", f"of width {pairs.d}", f"{lorsa.d_in} wide, as the Lorsa")
        mine, theirs = (about.get("hook_name") for about in (lorsa.config.metadata, pairs.metadata))
        if None not in (mine, theirs) and mine != theirs:
            raise OptionError(f"a Lorsa of {mine} and pairs of {theirs}")
    moments = pairs.output_moments
    variance = scatter_of(moments)
    losses: Sequence[SpliceLosses | None] = [None] * len(lorsas)
    if model is not None and tokens is not None:
        known = {lorsa.config.metadata.get("layer") for lorsa in lorsas} if layer is None else {layer}
        layer = known.pop() if len(known) == 1 else None
        if layer is None:
            raise OptionError("the layer of these Lorsas is not known, or not one; give layer=...")
        losses = splice_lorsas(
            lorsas,
            model,
            tokens,
            layer,
            moments.mean,
            batch_tokens=batch_tokens,
            progress=progress,
        )
    return [
        Evaluation(**_numbers(lorsa, pairs, variance), losses=loss)
        for lorsa, loss in zip(lorsas, losses, strict=True)
    ]


def _numbers(lorsa: Lorsa, pairs: SequencePairs, variance: float) -> dict[str, Any]:
    """The fields of `Evaluation` that come from the pairs."""
    ledger = DeadnessLedger(lorsa.n_ov, lorsa.W_O.device)
    error, fired = 0.0, 0
    for target, code in codes(lorsa, pairs):
        error += (target.double() - lorsa.decode_normalized(code).double()).square().sum().item()
        fired += int((code.values != 0).sum())
        ledger.update(SparseCode(code.indices.flatten(0, 1), code.values.abs().flatten(0, 1)))
    fvu = error / lorsa.output_scale.double().item() ** 2 / variance
    return {
        "n_tokens": pairs.n,
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0": fired / pairs.n,
        "dead_fraction": ledger.silent_fraction,
    }


def splice_lorsas(
    lorsas: Sequence[Lorsa],
    model: nn.Module,
    tokens: Tokens,
    layer: int,
    mean: Tensor,
    *,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> list[SpliceLosses]:
    """Losses with each Lorsa's output in place of the attention layer's, position 0 left as it is.

    A Lorsa reads what the layer reads in the same forward pass. `mean [d_in]` is what ablation writes.
    """
    width = models.model_info(model).d_model
    for lorsa in lorsas:
        require(lorsa.d_in == width, "lorsa", f"d_in={lorsa.d_in}", f"{width} wide, as the model")
    read, write = models.hook_name(model, READ_SITE, layer), write_site(model, layer)
    ablated: Hooks = {write: skip_first(mean_ablate(mean))}
    return hooked_losses(
        model,
        tokens,
        layer,
        ablated,
        [splice_through(lorsa, read, write) for lorsa in lorsas],
        site="the attention",
        batch_tokens=batch_tokens,
        progress=progress,
    )
