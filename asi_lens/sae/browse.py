"""Cards of features, drawn: `browse` in a notebook, `write_page` as a file that opens without a server.

`python -m asi_lens.sae.browse DICTIONARY --model MODEL --corpus CORPUS` writes such a page of a dictionary's
most frequent, median and rarest features. The dictionary is a folder of asi_lens, SAELens or sparsify.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.harvest_store import harvest_store, harvest_stores
from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.doors import checked
from asi_lens.base.errors import AsiLensError, OptionError, require
from asi_lens.base.files import write_text
from asi_lens.inputs.corpora import Tokens, load_tokens
from asi_lens.inputs.models import load_model
from asi_lens.sae.cards import Card
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.features import Features
from asi_lens.sae.read_site import site_read

_STATIC = (
    "This front end shows no widgets, so here is one feature as it is; al.browse(...).card(n) shows others."
)


class Browser:
    """Features of a dictionary behind a slider and a search box; what `browse` returns.

    The last expression of a cell shows it. `show(n)` moves to a feature, `card(n)` returns its facts.
    """

    def __init__(self, features: Features):
        import ipywidgets as widgets

        self.features = features
        order = features.firings.counts.argsort(descending=True, stable=True).tolist()
        last = features.d_sae - 1
        style = {"description_width": "7em"}
        wide = widgets.Layout(width="32em")
        self.number = widgets.IntSlider(
            order[0], 0, last, description="feature", style=style, layout=wide, continuous_update=False
        )
        self.rank = widgets.IntSlider(
            0, 0, last, description="by frequency", style=style, layout=wide, continuous_update=False
        )
        self.box = widgets.Text(
            description="fires on", placeholder="text of a token", style=style, continuous_update=False
        )
        self.found = widgets.Dropdown(options=[], description="found", style=style, disabled=True)
        self.out = widgets.HTML()
        self.view = widgets.VBox(
            [widgets.HBox([self.number, self.rank]), widgets.HBox([self.box, self.found]), self.out]
        )
        self.number.observe(self._draw, "value")
        self.rank.observe(lambda change: self.show(order[change["new"]]), "value")
        self.box.observe(self._search, "value")
        self.found.observe(self._choose, "value")
        self._draw()

    def show(self, feature: int) -> None:
        """Move to a feature. Raises OptionError for one that does not exist."""
        require(0 <= feature < self.features.d_sae, "feature", feature, f"from 0 to {self.number.max}")
        self.number.value = feature

    def card(self, feature: int) -> Card:
        """Return the facts of a feature."""
        return self.features.card(feature)

    def _draw(self, change: Any = None) -> None:
        self.out.value = card_html(self.features.card(self.number.value))

    def _choose(self, change: Any) -> None:
        if change["new"] is not None:
            self.show(change["new"])

    def _search(self, change: Any) -> None:
        hits = self.features.search(change["new"]) if change["new"] else []
        self.found.options = hits
        self.found.disabled = not hits
        self.box.description = "fires on" if hits or not change["new"] else "nothing on"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Return the widget, and the card alone for a front end that has no widgets."""
        bundle = dict(self.view._repr_mimebundle_())
        return bundle | {"text/html": f"<p>{_STATIC}</p>{self.out.value}"}


@checked
def browse(
    sae: SparseAutoencoder,
    store_or_tokens: ActivationStore | PairedStores | Tokens,
    model: nn.Module,
    tokens: Tokens | None = None,
    **options: Any,
) -> Browser:
    """Return a browser of the features of `sae`, for the last line of a cell in JupyterLab or VS Code.

    Args:
        store_or_tokens: a store of the dictionary's site, with `tokens`, or the text itself, whose
            activations are then harvested at the site that the dictionary says it is of.
        options: of `Features`.

    Raises OptionError for a store without tokens, and for text with a dictionary that does not say its site.
    """
    if isinstance(store_or_tokens, Tokens):
        return Browser(
            Features(sae, _harvested(sae, store_or_tokens, model), store_or_tokens, model, **options)
        )
    if tokens is None:
        raise OptionError(
            "tokens=None is not allowed with a store; tokens must be what it was harvested from"
        )
    return Browser(Features(sae, store_or_tokens, tokens, model, **options))


def _harvested(sae: SparseAutoencoder, tokens: Tokens, model: nn.Module) -> ActivationStore | PairedStores:
    """Return the activations of `tokens` at the dictionary's site, from the cache where they are there."""

    def where(about: Mapping[str, Any]) -> SiteLayer:
        found = site_read(model, about)
        if found is None:
            raise OptionError(
                "this dictionary does not say its site and layer; give a store of its site, and the tokens"
            )
        return found

    about = sae.config.metadata
    if "reads" not in about:
        return harvest_store(model, tokens, *where(about))
    both = [where(about["reads"]), where(about)]
    return PairedStores(*harvest_stores(model, tokens, both).values())


def card_html(card: Card) -> str:
    """Return a card as HTML with its own style."""
    module = _template().module
    return str(module.style()) + str(module.card(card))


def write_page(
    path: Path | str, features: Features, groups: Mapping[str, Sequence[int]], title: str, caption: str
) -> Path:
    """Write the cards of groups of features as one page that opens from disk. Returns its path.

    `groups` maps headings to numbers of features (`Features.choice`).
    """
    cards = {name: [features.card(number) for number in numbers] for name, numbers in groups.items()}
    shown = {number for numbers in groups.values() for number in numbers}
    page = {"title": title, "caption": caption, "groups": cards, "shown": shown}
    path = Path(path)
    write_text(path, _template().render(page=page))
    return path


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asi_lens.sae", "templates"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = lambda text: text.replace("\n", "↵")
    return environment.get_template("features.html.j2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 1 after printing the error."""
    return write_cards("python -m asi_lens.sae.browse", __doc__ or "", look, arguments)


def look(given: argparse.Namespace) -> Features:
    """Return the features of the dictionary in the command's folder, on its text."""
    sae = SparseAutoencoder.load(given.dictionary)
    model = load_model(given.model)
    tokens = load_tokens(given.corpus, model, given.tokens, context=given.context)
    return Features(sae, _harvested(sae, tokens, model), tokens, model)


def write_cards(
    program: str,
    about: str,
    look: Callable[[argparse.Namespace], Features],
    arguments: Sequence[str] | None,
) -> int:
    """Run a command that writes a page of what `look` returns. Returns 0, or 1 after printing the error."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program, description=about, formatter_class=form)
    parser.add_argument("dictionary", type=Path, help="folder of the dictionary")
    parser.add_argument("--model", required=True, help="as `load_model`")
    parser.add_argument("--corpus", required=True, help="as `load_tokens`")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens of the corpus to look at")
    parser.add_argument("--context", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--features", type=int, default=8, help="features per group")
    parser.add_argument("--output", type=Path, default=Path("features.html"), help="file to write")
    given = parser.parse_args(arguments)
    try:
        features = look(given)
        caption = f"{features.site}, {features.tokens.ids.numel():,} tokens{features.trained_elsewhere}"
        groups = features.choice(given.features)
        print(write_page(given.output, features, groups, f"Features of {given.dictionary.name}", caption))
    except (AsiLensError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
