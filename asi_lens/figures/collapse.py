"""One builder per figure of the collapse: takes a table as in its CSV, returns a plotly figure.

Builders only draw: they compute only means and ranges of the table's numbers. `save` writes a figure to disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from asi_lens.base.errors import DataError
from asi_lens.figures.parts import color_scale, curve, heatmap, legend_only, level, panels, site_curves
from asi_lens.figures.style import (
    GREY,
    color,
    label,
    left_margin,
    need,
    order,
    over,
    pick,
    setting,
    single,
    sites,
)
from asi_lens.results.rows import LossRow, RankRow, SpectrumRow

# Values of loss recovered below this are not drawn: how far a value is below ablation does not matter.
_LOWEST = -0.5
# Sites in a line of the legend.
_SITES_OF_A_LINE = 5


def rank_curves(table: pd.DataFrame) -> go.Figure:
    """Draw effective rank / width over layers, a line per site, a panel per model (C1, C2).

    Takes `RankRow`s. Lines are means over corpora, bands their range. A dashed line shows the rank with
    massive activations of a site that has them.
    """
    figure = _by_layer(table, "effective_rank_fraction", "Effective rank by layer", "effective rank / width")
    models = order(table, "model")
    whole = table.rank_with_massive.astype(float)
    table = table.assign(whole=whole.fillna(table.effective_rank_fraction))[
        whole.notna().groupby([table.model, table.site]).transform("any")
    ]
    for col, model in enumerate(models, start=1):
        site_curves(figure, table[table.model == model], "layer", "whole", 1, col, dash="dash")
    level(figure, 0.6, "paper:<br>attention 0.6", len(models))
    level(figure, 0.9, "paper: MLP,<br>residual 0.9", len(models))
    return figure


def dimension_curves(table: pd.DataFrame) -> go.Figure:
    """Draw the share of the directions that hold 99 % of the variance over layers (C1, versions 1 and 2).

    Takes `RankRow`s. A line per site, a panel per model. Lines are means over corpora, bands their range.
    """
    need(table, RankRow)
    shares = table.assign(share=table.intrinsic_dimension_99 / table.d)
    figure = _by_layer(
        shares, "share", "Directions that hold 99 % of the variance", "directions for<br>99 % / width"
    )
    level(figure, 0.6, "paper v1:<br>attention 0.6", table.model.nunique())
    return figure


def _by_layer(table: pd.DataFrame, column: str, title: str, y: str) -> go.Figure:
    """Return a figure of `column` over layers, a line per site, a panel per model."""
    need(table, RankRow)
    models = order(table, "model")
    legend = 1 if table.site.nunique() <= _SITES_OF_A_LINE else 2
    figure = panels(title, setting(table, what=over(table, "corpus")), [models], y=y, legend=legend)
    for col, model in enumerate(models, start=1):
        part = table[table.model == model]
        site_curves(figure, part, "layer", column, 1, col)
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(range=[0, 1.02])
    return figure


def spectra(table: pd.DataFrame, layers: Sequence[int] | None = None) -> go.Figure:
    """Draw relative singular values (log axis) against i / d, a panel per layer, a row per model (C1).

    Takes `SpectrumRow`s of one corpus. `layers` are the layers to draw of each model that has them; by
    default up to four layers are spread over the model's depth.
    """
    need(table, SpectrumRow)
    single(table, "corpus", "spectra")
    models = order(table, "model")
    shown = {model: pick(table[table.model == model].layer, layers) for model in models}
    titles = [[f"{m}, layer {n}" if len(models) > 1 else f"layer {n}" for n in shown[m]] for m in models]
    figure = panels(
        "Singular values of the centered activations",
        setting(table),
        titles,
        y="s<sub>i</sub> / s<sub>1</sub>",
        left=92,
    )
    for row, model in enumerate(models, start=1):
        for col, layer in enumerate(shown[model], start=1):
            part = table[(table.model == model) & (table.layer == layer)]
            site_curves(figure, part, "index_fraction", "relative_singular_value", row, col, markers=False)
    # Singular values that are numerically zero would stretch the axis over many empty decades.
    lowest = max(1e-6, float(table.relative_singular_value[table.relative_singular_value > 0].min()))
    bottom = math.floor(math.log10(lowest) * 2) / 2
    decades = range(math.floor(bottom), 1)
    names = [f"{10.0**n:g}" for n in decades]
    figure.update_yaxes(type="log", range=[bottom, 0.08], tickvals=[10.0**n for n in decades], ticktext=names)
    figure.update_xaxes(range=[0, 1], dtick=0.5)
    figure.update_xaxes(title_text="i / d", row=len(models))
    return figure


def spectrum_cut(table: pd.DataFrame, site: str, r: int) -> go.Figure:
    """Draw `spectra` of one layer, with a dotted line at the first `r` directions of one site.

    Takes `SpectrumRow`s of one layer. Raises DataError for a site that the table does not have.
    """
    figure = spectra(table)
    single(table, "layer", "spectrum_cut")
    own = table[table.site == site]
    if own.empty:
        raise DataError(f"spectrum_cut: the table has no site {site!r}; it has {', '.join(sites(table))}")
    figure.add_vline(
        x=r / own.d.iloc[0],
        line={"color": color(site), "dash": "dot", "width": 2},
        annotation={"text": f"{r} of {own.d.iloc[0]}", "yanchor": "top"},
    )
    return figure


def rank_heatmap(table: pd.DataFrame) -> go.Figure:
    """Draw effective rank / width, mean over layers, models (rows) x corpora, a panel per site (C2).

    Takes `RankRow`s. Cells of pairs that were not measured are empty.
    """
    need(table, RankRow)
    shown, models, corpora = sites(table), order(table, "model"), order(table, "corpus")
    figure = panels(
        "Effective rank over models and texts",
        setting(table, what="mean over layers"),
        [[label(site) for site in shown]],
        legend=False,
        left=left_margin(models),
        bottom=round(20 + 0.62 * left_margin(corpora)),
        plot=20 + 56 * len(models),
    )
    means = table.groupby(["site", "model", "corpus"]).effective_rank_fraction.mean()
    for col, site in enumerate(shown, start=1):
        cells = means[site].unstack().reindex(index=models, columns=corpora)
        heatmap(figure, cells, col, gap=2, what="%{y} on %{x}")
    scale = color_scale("effective<br>rank / width", means.min(), means.max())
    figure.update_layout(coloraxis=scale, margin_r=110)
    figure.update_xaxes(showgrid=False, ticks="", showline=False, tickangle=-38)
    figure.update_yaxes(showgrid=False, ticks="", showline=False, autorange="reversed")
    return figure


def rank_vs_tokens(table: pd.DataFrame) -> go.Figure:
    """Draw effective rank / width against tokens in the covariance, a line per site, a panel per model.

    Takes `RankRow`s at several `n_tokens`. The figure shows how far a rank is from its large-sample limit.
    The dotted line is n = 20 d. Lines are means over layers and corpora, bands their range.
    """
    need(table, RankRow)
    models = order(table, "model")
    layers = sorted({int(layer) for layer in table.layer})
    what = over(table, "layer", "corpus") or f"layer {layers[0]}"
    subtitle = setting(table, tokens=False, what=what)
    figure = panels("Effective rank against sample size", subtitle, [models], y="effective rank / width")
    for col, model in enumerate(models, start=1):
        part = table[table.model == model]
        site_curves(figure, part, "n_tokens", "effective_rank_fraction", 1, col)
        enough = 20 * int(part.d.min())
        line = {"color": GREY, "dash": "dot", "width": 1.2}
        figure.add_vline(x=enough, line=line, row=1, col=col)
        figure.add_annotation(
            x=math.log10(enough),  # on a log axis, plotly takes the exponent as an annotation's position
            y=0.02,
            text=f"20 d = {enough:,}",
            xanchor="left",
            yanchor="bottom",
            xshift=4,
            showarrow=False,
            font={"size": 12, "color": "#555"},
            row=1,
            col=col,
        )
    ticks = [10**i * j for i in range(1, 10) for j in (1, 2, 5)]
    names = [f"{t // 10**6} M" if t >= 10**6 else f"{t // 1000} k" if t >= 1000 else str(t) for t in ticks]
    figure.update_xaxes(type="log", title_text="tokens", tickvals=ticks, ticktext=names)
    figure.update_yaxes(range=[0, 1.02])
    return figure


def downstream_loss(table: pd.DataFrame) -> go.Figure:
    """Draw loss recovered against the share of directions kept, a line per site, a panel per model (C3).

    Takes `LossRow`s. Solid lines: principal directions; dashed lines: as many random directions. Lines are
    means over layers, bands (principal only) their range. Values below -0.5 are cut off and counted below.
    """
    need(table, LossRow)
    table = table[table.loss_recovered.notna()]
    if table.empty:
        raise DataError("downstream_loss: loss_recovered is empty in every row")
    models = order(table, "model")
    below = int((table.loss_recovered < _LOWEST).sum())
    what = [over(table, "layer", "corpus"), f"{below} points below −{-_LOWEST} not shown" if below else ""]
    subtitle = setting(table, what=" · ".join(text for text in what if text))
    figure = panels("Loss recovered from a site's top directions", subtitle, [models], y="loss recovered")
    dashes = {"principal": "solid", "random": "dash"}
    for col, model in enumerate(models, start=1):
        part = table[table.model == model]
        for site in sites(part):
            for subspace, dash in dashes.items():
                line = part[(part.site == site) & (part.subspace == subspace)]
                if len(line):
                    curve(figure, line, "rank_fraction", "loss_recovered", site, 1, col, dash=dash)
    level(figure, 1.0, "untouched<br>model", len(models))
    level(figure, 0.0, "site at<br>its mean", len(models))
    for subspace, dash in dashes.items():
        if (table.subspace == subspace).any():
            legend_only(figure, subspace, mode="lines", line={"color": "#444", "dash": dash, "width": 2})
    lowest = max(_LOWEST, float(table.loss_recovered.min()))
    figure.update_yaxes(range=[min(0, lowest) - 0.06, 1.1])
    ticks = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    names = [f"{tick:g}" for tick in ticks]
    figure.update_xaxes(type="log", title_text="directions kept / width", tickvals=ticks, ticktext=names)
    return figure
