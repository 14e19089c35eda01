"""Cards of a dictionary's features or of a Lorsa's units: `browse`, and the command `asi-lens browse`.

`python -m asi_lens.lorsa.browse DICTIONARY --model MODEL --corpus CORPUS` writes a page of the most frequent,
median and rarest features. The dictionary is a folder of asi_lens, SAELens or sparsify, or the `.safetensors`
file of a Lorsa.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.harvest_store import harvest_store, harvest_stores
from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.doors import checked
from asi_lens.base.errors import AsiLensError, OptionError
from asi_lens.inputs.corpora import Tokens, load_tokens
from asi_lens.inputs.models import load_model
from asi_lens.lorsa.data import SequencePairs, harvest_pairs
from asi_lens.lorsa.features import UnitFeatures
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.sae.browse import Browser, write_page
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.features import Features
from asi_lens.sae.read_site import site_read


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
    return Browser(_features(sae, store_or_tokens, model, tokens, **options))


def _features(
    sae: Any, given: Any, model: nn.Module, tokens: Tokens | None = None, **options: Any
) -> Features:
    of_lorsa = isinstance(sae, Lorsa)
    if isinstance(given, Tokens):
        given, tokens = _harvested(sae, given, model, options.get("progress", True)), given
    elif of_lorsa and (tokens is None or not isinstance(given, SequencePairs)):
        raise OptionError("a Lorsa takes pairs (harvest_pairs) with the tokens they are of, or a text alone")
    elif not of_lorsa and isinstance(given, SequencePairs):
        raise OptionError("pairs of sequences are of a Lorsa; an autoencoder takes a store of its site")
    elif tokens is None:
        raise OptionError(
            "tokens=None is not allowed with a store; tokens must be what it was harvested from"
        )
    return (UnitFeatures if of_lorsa else Features)(sae, given, tokens, model, **options)


def _harvested(
    sae: Any, tokens: Tokens, model: nn.Module, progress: bool
) -> ActivationStore | PairedStores | SequencePairs:
    """Return the activations of `tokens` at the place that `sae` says it is of."""
    about = sae.config.metadata
    if isinstance(sae, Lorsa):
        if about.get("layer") is None:
            raise OptionError("this Lorsa does not say its layer; give pairs of its layer, and the tokens")
        return harvest_pairs(model, tokens, int(about["layer"]), progress=progress)

    def where(about: Mapping[str, Any]) -> SiteLayer:
        found = site_read(model, about)
        if found is None:
            raise OptionError(
                "this dictionary does not say its site and layer; give a store of its site, and the tokens"
            )
        return found

    if "reads" not in about:
        return harvest_store(model, tokens, *where(about))
    both = [where(about["reads"]), where(about)]
    return PairedStores(*harvest_stores(model, tokens, both).values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 1 after printing the error."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m asi_lens.lorsa.browse", description=__doc__, formatter_class=form
    )
    parser.add_argument("dictionary", type=Path, help="folder of the dictionary, or file of the Lorsa")
    parser.add_argument("--model", required=True, help="as `load_model`")
    parser.add_argument("--corpus", required=True, help="as `load_tokens`")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of the corpus to look at")
    parser.add_argument("--context", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--features", type=int, default=8, help="features per group")
    parser.add_argument("--output", type=Path, default=Path("features.html"), help="file to write")
    given = parser.parse_args(arguments)
    path = given.dictionary
    try:
        sae = Lorsa.load(path) if path.suffix == ".safetensors" else SparseAutoencoder.load(path)
        model = load_model(given.model)
        tokens = load_tokens(given.corpus, model, given.tokens, context=given.context)
        features = _features(sae, tokens, model)
        caption = f"{features.site}, {tokens.ids.numel():,} tokens{features.trained_elsewhere}"
        groups = features.choice(given.features)
        print(write_page(given.output, features, groups, f"Features of {path.name}", caption))
    except (AsiLensError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
