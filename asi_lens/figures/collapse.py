"""One builder per figure: a table as its CSV has it in, a plotly figure out.

Builders only draw: no numbers are made here beyond means and ranges over what the table holds.
`save` writes a figure to disk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from asi_lens.base.errors import DataError, unknown_name
from asi_lens.figures.parts import curve, level, panels
from asi_lens.figures.style import (
    COLORS,
    GREY,
    SITE_LABELS,
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
from asi_lens.results.figure_files import SavedFigure, save
from asi_lens.results.rows import VARIANTS, HeadOverlapRow, LossRow, OutputProjectionRow, RankRow, SpectrumRow

__all__ = [
    "COLORS",
    "SITE_LABELS",
    "VARIANT_LABELS",
    "SavedFigure",
    "downstream_loss",
    "head_overlap",
    "rank_curves",
    "rank_heatmap",
    "rank_vs_tokens",
    "save",
    "spectra",
    "wo_ablation",
]

VARIANT_LABELS = {
    "z": "z, before W<sub>O</sub>",
    "attn_out": "attention output, z W<sub>O</sub>",
    "flat_spectrum": "W<sub>O</sub>, spectrum made flat",
    "random_orthogonal": "W<sub>O</sub> random orthogonal",
    "gaussian": "W<sub>O</sub> random Gaussian",
    "rotated_input": "z rotated at random",
    "isotropic_z": "z made white noise",
    "orthogonal_heads": "heads made orthogonal",
    "sum_of_heads": "sum of the heads' ranks",
}
# What each group of rows changes; a gap parts them.
_GROUPS = (
    ("z", "attn_out"),
    ("flat_spectrum", "random_orthogonal", "gaussian"),
    ("rotated_input", "isotropic_z"),
    ("orthogonal_heads", "sum_of_heads"),
)
# Loss recovered below this is off the figure: far worse than ablation is all the same.
_LOWEST = -0.5


def rank_curves(table: pd.DataFrame) -> go.Figure:
    """Effective rank / width over layers, a line per site, a panel per model (C1, C2).

    Takes `RankRow`s. Lines are means over corpora, bands their range.
    """
    need(table, RankRow)
    models = order(table, "model")
    subtitle = setting(table, what=over(table, "corpus"))
    figure = panels("Effective rank by layer", subtitle, [models], y="effective rank / width")
    for col, model in enumerate(models, start=1):
        part = table[table.model == model]
        for site in sites(part):
            curve(figure, part[part.site == site], "layer", "effective_rank_fraction", site, 1, col)
    level(figure, 0.6, "paper:<br>attention 0.6", len(models))
    level(figure, 0.9, "paper: MLP,<br>residual 0.9", len(models))
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(range=[0, 1.02])
    return figure


def spectra(table: pd.DataFrame, layers: Sequence[int] | None = None) -> go.Figure:
    """Relative singular values on a log axis against i / d, a panel per layer, a row per model (C1).

    Takes `SpectrumRow`s of one corpus; `layers` are those to show of each model that has them, else
    up to four spread over its depth.
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
            for site in sites(part):
                line = part[part.site == site]
                curve(
                    figure, line, "index_fraction", "relative_singular_value", site, row, col, markers=False
                )
    # Numerically zero directions would stretch the axis over many empty decades.
    lowest = max(1e-6, float(table.relative_singular_value[table.relative_singular_value > 0].min()))
    bottom = math.floor(math.log10(lowest) * 2) / 2
    decades = range(math.floor(bottom), 1)
    names = [f"{10.0**n:g}" for n in decades]
    figure.update_yaxes(type="log", range=[bottom, 0.08], tickvals=[10.0**n for n in decades], ticktext=names)
    figure.update_xaxes(range=[0, 1], dtick=0.5)
    figure.update_xaxes(title_text="i / d", row=len(models))
    return figure


def rank_heatmap(table: pd.DataFrame) -> go.Figure:
    """Effective rank / width, mean over layers, of models (rows) on corpora; a panel per site (C2).

    Takes `RankRow`s. Pairs that were not measured stay empty.
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
        grid = means[site].unstack().reindex(index=models, columns=corpora)
        figure.add_heatmap(
            z=grid.to_numpy(),
            x=corpora,
            y=models,
            coloraxis="coloraxis",
            texttemplate="%{z:.2f}",
            xgap=2,
            ygap=2,
            hoverongaps=False,
            hovertemplate="%{y} on %{x}: %{z:.3f}<extra></extra>",
            row=1,
            col=col,
        )
    scale = _color_scale("effective<br>rank / width", means.min(), means.max())
    figure.update_layout(coloraxis=scale, margin_r=110)
    figure.update_xaxes(showgrid=False, ticks="", showline=False, tickangle=-38)
    figure.update_yaxes(showgrid=False, ticks="", showline=False, autorange="reversed")
    return figure


def rank_vs_tokens(table: pd.DataFrame) -> go.Figure:
    """Effective rank / width against tokens in the covariance, a line per site, a panel per model.

    Takes `RankRow`s at several `n_tokens`: shows how far a rank is from its large-sample limit. The
    dotted line is n = 20 d. Lines are means over layers and corpora, bands their range.
    """
    need(table, RankRow)
    models = order(table, "model")
    layers = sorted({int(layer) for layer in table.layer})
    what = over(table, "layer", "corpus") or f"layer {layers[0]}"
    subtitle = setting(table, tokens=False, what=what)
    figure = panels("Effective rank against sample size", subtitle, [models], y="effective rank / width")
    for col, model in enumerate(models, start=1):
        part = table[table.model == model]
        for site in sites(part):
            curve(figure, part[part.site == site], "n_tokens", "effective_rank_fraction", site, 1, col)
        enough = 20 * int(part.d.min())
        line = {"color": GREY, "dash": "dot", "width": 1.2}
        figure.add_vline(x=enough, line=line, row=1, col=col)
        figure.add_annotation(
            x=math.log10(enough),  # plotly places annotations of a log axis by the exponent
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
    """Loss recovered against the share of directions kept, a line per site, a panel per model (C3).

    Takes `LossRow`s. Solid: principal directions; dashed: as many random ones. Lines are means over
    layers, bands (principal only) their range. What lies below -0.5 is cut off and counted below.
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
            line = {"color": "#444", "dash": dash, "width": 2}
            nothing = {"x": [None], "y": [None], "mode": "lines"}
            figure.add_scatter(**nothing, line=line, name=subspace, showlegend=True, row=1, col=1)
    lowest = max(_LOWEST, float(table.loss_recovered.min()))
    figure.update_yaxes(range=[min(0, lowest) - 0.06, 1.1])
    ticks = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    names = [f"{tick:g}" for tick in ticks]
    figure.update_xaxes(type="log", title_text="directions kept / width", tickvals=ticks, ticktext=names)
    return figure


def wo_ablation(table: pd.DataFrame) -> go.Figure:
    """Effective rank of what attention writes under each change to W_O, its input or its heads (C4, C5).

    Takes `OutputProjectionRow`s. A row per variant in the order that tells the story, a dot per layer
    (mean over draws; its color is the depth), a bar and a number at the mean; dashed lines mark the
    means before and after W_O. A panel per model.
    """
    need(table, OutputProjectionRow)
    for variant in table.variant.unique():
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
    models = order(table, "model")
    groups = [[v for v in group if (table.variant == v).any()] for group in _GROUPS]
    variants = [(v, -gap) for gap, group in enumerate(filter(None, groups)) for v in group]
    place = {variant: 0.5 * gap - row for row, (variant, gap) in enumerate(variants)}
    figure = panels(
        "What makes the collapse: the output projection and the overlap of heads",
        setting(table, what="a dot per layer, a bar at the mean"),
        [models],
        legend=False,
        left=left_margin(VARIANT_LABELS[variant] for variant in place),
        plot=round(30 - 38 * min(place.values())),
    )
    for col, model in enumerate(models, start=1):
        dots = table[table.model == model].groupby(["variant", "layer"]).effective_rank_fraction.mean()
        for variant in place:
            if variant in dots.index.get_level_values("variant"):
                _strip(figure, dots[variant], place[variant], col, color=COLORS.get(variant))
    figure.update_yaxes(
        tickvals=list(place.values()),
        ticktext=[VARIANT_LABELS[variant] for variant in place],
        range=[min(place.values()) - 0.6, 0.6],
        showgrid=False,
        ticks="",
    )
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    figure.update_xaxes(title_text="effective rank / width", range=[0, 1.12], tickvals=ticks)
    scale = _color_scale("layer", 0, max(1, int(table.layer.max())), step=1)
    figure.update_layout(coloraxis=scale, margin_r=90)
    return figure


def head_overlap(table: pd.DataFrame, layers: Sequence[int] | None = None) -> go.Figure:
    """Mean cosine of the principal angles between heads' output subspaces, a panel per layer (C5).

    Takes `HeadOverlapRow`s of one model; `layers` are those to show, else up to four spread over its
    depth. The diagonal (a head with itself) is left out; the subtitle gives the level of chance.
    """
    need(table, HeadOverlapRow)
    single(table, "model", "head_overlap")
    shown = pick(table.layer, layers)
    off = table[table.head_a != table.head_b]
    if off.empty:
        raise DataError("head_overlap: a model with one head has no overlap to draw")
    chance = float(off.random_mean_cosine.mean())
    figure = panels(
        "Overlap of the heads' output subspaces",
        setting(table, what=f"random subspaces: {chance:.2f}"),
        [[f"layer {layer}" for layer in shown]],
        y="head",
        legend=False,
        left=60,
        plot=max(180, round(860 / len(shown))) if len(shown) > 2 else 340,
    )
    heads = sorted({*off.head_a, *off.head_b})
    names = [str(head) for head in heads]
    mirrored = pd.concat([off, off.rename(columns={"head_a": "head_b", "head_b": "head_a"})])
    means = mirrored.groupby(["layer", "head_a", "head_b"]).mean_cosine.mean()
    for col, layer in enumerate(shown, start=1):
        figure.add_heatmap(
            z=means[layer].unstack().reindex(index=heads, columns=heads).to_numpy(),
            x=names,
            y=names,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            hovertemplate="heads %{x} and %{y}: %{z:.3f}<extra></extra>",
            texttemplate="%{z:.2f}" if len(heads) <= 4 else None,
            row=1,
            col=col,
        )
    plain = {"showgrid": False, "type": "category", "ticks": "", "showline": False}
    figure.update_xaxes(title_text="head", **plain)
    figure.update_yaxes(autorange="reversed", **plain)
    scale = _color_scale("mean<br>cosine", min(chance, means.min()), means.max(), step=0.05)
    figure.update_layout(coloraxis=scale, margin_r=100)
    return figure


def _strip(figure: go.Figure, dots: pd.Series, y: float, col: int, *, color: str | None) -> None:
    """Dots by layer in a row at height `y`, a bar at their mean; a line down the panel in `color`."""
    where = {"row": 1, "col": col}
    mean = float(dots.mean())
    # A fixed spread by depth keeps the dots of 30 layers apart: random jitter would differ per run.
    depth = dots.index.to_numpy()
    figure.add_scatter(
        x=dots.to_numpy(),
        y=y + 0.34 * (0.5 - depth / max(1, depth.max())),
        mode="markers",
        marker={
            "size": 7,
            "color": depth,
            "coloraxis": "coloraxis",
            "line": {"width": 0.5, "color": "white"},
        },
        customdata=depth,
        hovertemplate="layer %{customdata}: %{x:.3f}<extra></extra>",
        showlegend=False,
        **where,
    )
    figure.add_scatter(
        x=[mean, mean],
        y=[y - 0.36, y + 0.36],
        mode="lines",
        line={"color": "black", "width": 3},
        hovertemplate=f"mean over layers: {mean:.3f}<extra></extra>",
        showlegend=False,
        **where,
    )
    figure.add_annotation(x=1.11, xanchor="right", y=y, text=f"{mean:.2f}", showarrow=False, **where)
    if color is not None:
        line = {"color": color, "width": 1.5, "dash": "dash"}
        figure.add_vline(x=mean, line=line, layer="below", **where)


def _color_scale(title: str, low: float | int, high: float | int, *, step: float | int = 0.1) -> dict:
    """A color axis from `low` to `high`, both moved out to a multiple of `step`."""
    bar = {
        "title": {"text": f"{title}<br> ", "font": {"size": 13}},
        "thickness": 14,
        "outlinewidth": 0,
        "len": 1,
    }
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return {"colorscale": "Cividis", "cmin": low, "cmax": high, "colorbar": bar}
