"""Evaluation of Lorsas on held-out sequences: reconstruction, losses of the language model, firing units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from asi_lens.base.doors import checked
from asi_lens.base.errors import OptionError, require
from asi_lens.inputs.corpora import Tokens
from asi_lens.lorsa.attention import layer_place
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.sae.evaluate import Evaluation, evaluate_at


@checked
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
        layer: layer of the Lorsas; by default the layer in the metadata of Lorsas and pairs.
        batch_tokens: tokens of a forward pass; the logits of all of them are held in memory.

    Raises OptionError for options that do not go together, or for pairs of another width, layer or model.
    Raises DataError for outputs that never vary, for values or losses that are not finite, and for sequences
    longer than the context. Raises UnsupportedModelError for a model that does not predict next tokens.
    """
    require(len(lorsas) > 0, "lorsas", [], "one or more")
    for lorsa in lorsas:
        require(pairs.d == lorsa.d_in, "pairs", f"of width {pairs.d}", f"{lorsa.d_in} wide, as the Lorsa")
        mine, theirs = (about.get("hook_name") for about in (lorsa.config.metadata, pairs.metadata))
        if None not in (mine, theirs) and mine != theirs:
            raise OptionError(f"the pairs have hook_name {theirs!r}, but the Lorsa has hook_name {mine!r}")
    place = None if layer is None or model is None else layer_place(model, layer)
    return evaluate_at(lorsas, pairs, model, tokens, place, batch_tokens=batch_tokens, progress=progress)
