"""Cards of features, drawn: `Browser` in a notebook, `write_page` as a file that opens without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from asi_lens.base.errors import require
from asi_lens.base.files import write_text
from asi_lens.sae.cards import Card
from asi_lens.sae.features import Features

_STATIC = (
    "This front end shows no widgets, so here is one feature as it is; al.browse(...).card(n) shows others."
)


class Browser:
    """Features of a dictionary behind a slider and a search box; what `asi_lens.browse` returns.

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
