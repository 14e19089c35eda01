"""Evaluation of Lorsas on held-out sequences: reconstruction, losses of the language model, firing units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from asi_lens.base.errors import OptionError, require, require_both
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.lorsa.attention import READ_SITE, write_site
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.sae.evaluate import Evaluation, Place, evaluate_at


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
    options: dict[str, Any] = {"layer": layer, "batch_tokens": batch_tokens, "progress": progress}
    return evaluate_lorsas([lorsa], pairs, model=model, tokens=tokens, **options)[0]


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
    """Evaluate Lorsas of one layer on sequences that none was trained on, at all positions but the first.

    In the returned `Evaluation`s a feature is a unit, and `n_tokens` is the number of positions counted. The
    clean and the ablated model run once for all Lorsas.

    Args:
        model, tokens: give both for the losses of the language model, or neither. A Lorsa reads the layer's
            input, and its reconstruction replaces the layer's output in the same forward pass.
        layer: layer of the Lorsas; by default the layer in their metadata.
        batch_tokens: tokens of a forward pass; the logits of all of them are held in memory.

    Raises OptionError for options that do not go together, or for pairs of another width or layer. Raises
    DataError for outputs that never vary, for values or losses that are not finite, and for sequences longer
    than the context. Raises UnsupportedModelError for a model that does not predict next tokens.
    """
    require(len(lorsas) > 0, "lorsas", [], "one or more")
    require_both(model=model, tokens=tokens)
    for lorsa in lorsas:
        require(pairs.d == lorsa.d_in, "pairs", f"of width {pairs.d}", f"{lorsa.d_in} wide, as the Lorsa")
        mine, theirs = (about.get("hook_name") for about in (lorsa.config.metadata, pairs.metadata))
        if None not in (mine, theirs) and mine != theirs:
            raise OptionError(f"a Lorsa of {mine} and pairs of {theirs}")
    place = None if model is None else _place(lorsas, model, layer)
    return evaluate_at(lorsas, pairs, place, model, tokens, batch_tokens=batch_tokens, progress=progress)


def _place(lorsas: Sequence[Lorsa], model: nn.Module, layer: int | None) -> Place:
    known = {lorsa.config.metadata.get("layer") for lorsa in lorsas} if layer is None else {layer}
    layer = known.pop() if len(known) == 1 else None
    if layer is None:
        raise OptionError("the layer of these Lorsas is not known, or not one; give layer=...")
    width = models.model_info(model, fingerprint=False).d_model
    for lorsa in lorsas:
        require(lorsa.d_in == width, "lorsa", f"d_in={lorsa.d_in}", f"{width} wide, as the model")
    read = models.hook_name(model, READ_SITE, layer)
    return Place(read, write_site(model, layer), layer, "the attention")
