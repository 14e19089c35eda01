"""Cards of a dictionary's features or of a Lorsa's units: `browse`, and the command `asi-lens browse`.

`python -m asi_lens.lorsa.browse DICTIONARY --model MODEL --corpus CORPUS` writes a page of the most frequent,
median and rarest features. The dictionary is a folder of asi_lens, SAELens or sparsify, or the `.safetensors`
file of a Lorsa.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from torch import nn

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.doors import checked
from asi_lens.base.errors import OptionError
from asi_lens.inputs.corpora import Tokens, load_tokens
from asi_lens.inputs.models import load_model
from asi_lens.lorsa.data import SequencePairs, harvest_pairs
from asi_lens.lorsa.features import UnitFeatures
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.sae import browse as of_dictionaries
from asi_lens.sae.browse import Browser
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.features import Features


@checked
def browse(
    sae: SparseAutoencoder | Lorsa,
    store_or_tokens: ActivationStore | PairedStores | SequencePairs | Tokens,
    model: nn.Module,
    tokens: Tokens | None = None,
    **options: Any,
) -> Browser:
    """Return a browser of the features of `sae`, for the last line of a cell in JupyterLab or VS Code.

    Args:
        sae: an autoencoder, a transcoder, or a Lorsa, whose units are shown with the positions they read.
        store_or_tokens: a store of the dictionary's site (pairs of a Lorsa's layer), with `tokens`, or the
            text itself, whose activations are then harvested at the site that the dictionary says it is of.
        options: of `Features` (of `UnitFeatures` for a Lorsa).

    Raises OptionError for a store without tokens, for text with a dictionary that does not say its site, and
    for a store of the wrong kind.
    """
    if isinstance(sae, Lorsa):
        return Browser(_units(sae, store_or_tokens, model, tokens, **options))
    if isinstance(store_or_tokens, SequencePairs):
        raise OptionError("pairs of sequences are of a Lorsa; an autoencoder takes a store of its site")
    return of_dictionaries.browse(sae, store_or_tokens, model, tokens, **options)


def _units(
    lorsa: Lorsa, pairs: Any, model: nn.Module, tokens: Tokens | None = None, **options: Any
) -> UnitFeatures:
    if isinstance(pairs, Tokens):
        layer = lorsa.config.metadata.get("layer")
        if layer is None:
            raise OptionError("this Lorsa does not say its layer; give pairs of its layer, and the tokens")
        text = pairs
        pairs = harvest_pairs(model, text, int(layer), progress=options.get("progress", True))
        return UnitFeatures(lorsa, pairs, text, model, **options)
    if not isinstance(pairs, SequencePairs) or tokens is None:
        raise OptionError("a Lorsa takes pairs (harvest_pairs) with the tokens they are of, or a text alone")
    return UnitFeatures(lorsa, pairs, tokens, model, **options)


def _look(given: argparse.Namespace) -> Features:
    if given.dictionary.suffix != ".safetensors":
        return of_dictionaries.look(given)
    lorsa, model = Lorsa.load(given.dictionary), load_model(given.model)
    return _units(lorsa, load_tokens(given.corpus, model, given.tokens, context=given.context), model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 1 after printing the error."""
    program = "python -m asi_lens.lorsa.browse"
    return of_dictionaries.write_cards(program, __doc__ or "", _look, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
