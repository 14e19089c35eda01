"""Spectra behind controls: site, layer and d_init, with their numbers and their figure at once."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_whole
from asi_lens.base.facts import facts_html
from asi_lens.collapse.output_projection import CLOSED_FORMS, counterfactual_ranks
from asi_lens.collapse.spectra import Spectra
from asi_lens.figures.collapse import spectrum_cut
from asi_lens.figures.style import PLOTLY, label
from asi_lens.inputs import models
from asi_lens.results.rows import SpectrumRow
from asi_lens.results.tables import frame

_STATIC = "This front end shows no widgets, so here is one place as it is; al.explore(...).show(...) moves."


class Explorer:
    """Spectra behind a list of sites and sliders over layers and d_init; what `explore` returns.

    The last expression of a cell shows it. `show(site, layer, d_init)` moves the controls.
    """

    def __init__(self, model: nn.Module, spectra: Spectra, seed: int = 0):
        import ipywidgets as widgets

        self.model, self.spectra, self.seed = model, spectra, seed
        self._ranks: dict[int, dict[str, object]] = {}
        style, wide = {"description_width": "5em"}, widgets.Layout(width="32em")
        names = list(dict.fromkeys(site for site, _ in spectra))
        self.site = widgets.Dropdown(
            options=[(label(name), name) for name in names], description="site", style=style
        )
        layers = self._layers(names[0])
        self.layer = widgets.SelectionSlider(
            options=layers,
            value=layers[len(layers) // 2],
            description="layer",
            style=style,
            layout=wide,
            continuous_update=False,
        )
        d = self.spectrum.d
        self.d_init = widgets.IntSlider(
            d // 2, 1, d, description="d_init", style=style, layout=wide, continuous_update=False
        )
        self.facts, self.figure = widgets.HTML(), widgets.Output()
        controls = widgets.HBox([self.site, self.layer, self.d_init], layout={"flex_flow": "row wrap"})
        self.view = widgets.VBox([controls, self.figure, self.facts])
        self.site.observe(self._move, "value")
        for one in (self.layer, self.d_init):
            one.observe(self._draw, "value")
        self._draw()

    @property
    def spectrum(self) -> Any:
        """The spectrum at the chosen place."""
        return self.spectra[self.site.value, self.layer.value]

    def show(self, site: str | None = None, layer: int | None = None, d_init: int | None = None) -> None:
        """Move to a place. Raises OptionError for a place without a spectrum, or a d_init out of range."""
        site = self.site.value if site is None else site
        known = list(dict.fromkeys(name for name, _ in self.spectra))
        require(site in known, "site", site, f"one of {', '.join(known)}")
        layer = self.layer.value if layer is None else layer
        require((site, layer) in self.spectra, "layer", layer, f"one of {self._layers(site)}")
        d = self.spectra[site, layer].d
        if d_init is not None:
            require_whole("d_init", d_init, 1)
            require(d_init <= d, "d_init", d_init, f"from 1 to {d}")
        self.site.value, self.layer.value = site, layer
        self.d_init.value = min(self.d_init.value, d) if d_init is None else d_init

    def _layers(self, site: str) -> list[int]:
        return sorted(layer for name, layer in self.spectra if name == site)

    def _move(self, change: Any) -> None:
        """Let the sliders have the layers and the width of the new site."""
        layers, layer = self._layers(change["new"]), self.layer.value
        if list(self.layer.options) != layers:
            self.layer.options = layers
            self.layer.value = min(layers, key=lambda other: abs(other - layer))
        self.d_init.max = self.spectrum.d
        self._draw()

    def _draw(self, change: Any = None) -> None:
        site, layer, r = self.site.value, self.layer.value, min(self.d_init.value, self.spectrum.d)
        rows = [SpectrumRow(**row) for row in self.spectra.curve_records([layer])]  # type: ignore[arg-type]
        drawn = json.loads(spectrum_cut(frame(rows), site, r).to_json())
        output = {"output_type": "display_data", "data": {PLOTLY: drawn}, "metadata": {}}
        self.figure.outputs = (output,)
        self.facts.value = self._facts(site, layer, r)

    def _facts(self, site: str, layer: int, r: int) -> str:
        s, about = self.spectrum, self.spectra
        rank = f"{s.effective_rank_fraction:.3f} ({s.effective_rank:.0f} of {s.d})"
        told = facts_html(
            f"{label(site)}, layer {layer} of {about.model.name} on {about.corpus}",
            {
                "effective rank / width": rank,
                "directions for 99 % of the variance": f"{s.intrinsic_dimension(0.99)} of {s.d}",
                "participation ratio": s.participation_ratio,
                "stable rank": s.stable_rank,
                f"inside the first {r} directions": f"{s.explained_variance(r):.2%} of the variance",
            },
        )
        return told + facts_html(
            f"Effective rank / width of the attention output of layer {layer} under changes of W_O",
            self._counterfactuals(layer),
        )

    def _counterfactuals(self, layer: int) -> dict[str, object]:
        """Return ranks by variant, or why they are not known."""
        if layer not in self._ranks:
            self._ranks[layer] = {"not known": "z of this layer is not among the spectra"}
            if ("z", layer) in self.spectra:
                W_O = models.output_projection(self.model, layer)
                ranks = counterfactual_ranks(W_O, self.spectra["z", layer].covariance, seed=self.seed)
                self._ranks[layer] = {name: f"{ranks[name]:.3f}" for name in CLOSED_FORMS}
        return self._ranks[layer]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Return the widget, and the numbers alone for a front end that has no widgets."""
        bundle = dict(self.view._repr_mimebundle_())
        return bundle | {"text/html": f"<p>{_STATIC}</p>{self.facts.value}"}


@checked
def explore(model: nn.Module, spectra: Spectra, *, seed: int = 0) -> Explorer:
    """Return spectra behind controls, for the last line of a cell in JupyterLab or VS Code.

    A list of sites and sliders over the layers there are and over d_init; below them the singular values of
    the layer, the ranks of the place, the variance inside its first d_init directions, and the ranks of the
    attention output under changes of W_O (`counterfactual_ranks`, with `seed`; they need spectra of z).

    Raises OptionError for no spectra.
    """
    require(len(spectra) > 0, "spectra", "none", "of one place at least")
    require_whole("seed", seed, 0)
    return Explorer(model, spectra, seed)
