"""Figures of the notebook on architectures: a table in, a plotly figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.parts import legend_only, panels
from asi_lens.figures.style import GREY, METHOD_COLORS, need, order, setting
from asi_lens.results.architecture_verdicts import cross_named, of_cross_attention
from asi_lens.results.rows import DeadFeatureRow, HeadOverlapRow

_MEASURES = (("dead_fraction", "silent features, held out (%)", 100), ("fvu", "FVU, held out", 1))


def starts_by_architecture(table: pd.DataFrame) -> go.Figure:
    """Draw silent features and FVU on held-out data of every method, a row per number, models side by side.

    Takes `DeadFeatureRow`s, of which the held-out rows are drawn. A dot is a seed, a bar the mean over seeds.
    A decoder's cross-attention stands beside its other site.
    """
    need(table, DeadFeatureRow)
    held = cross_named(table[table.split == "held_out"])
    models, methods = order(held, "model"), order(held, "method")
    figure = panels(
        "A random start and ASI on other architectures",
        setting(table, tokens=False, what="a dot per seed, a bar at the mean"),
        [[title] for _, title, _ in _MEASURES],
        shared_y=False,
        plot=250,
    )
    for row, (column, _, factor) in enumerate(_MEASURES, start=1):
        for place, method in enumerate(methods):
            shift = 0.5 * (place - (len(methods) - 1) / 2) / len(methods)
            part = held[held.method == method]
            color = METHOD_COLORS.get(method, GREY)
            xs = part.model.map(models.index) + shift
            means = factor * part.groupby("model", sort=False)[column].mean()
            for marker, x, y, what in (
                ({"size": 8, "color": color}, xs, factor * part[column], part.seed.map("seed {}".format)),
                (
                    {"symbol": "line-ew", "size": 22, "line": {"width": 3, "color": color}},
                    [models.index(model) + shift for model in means.index],
                    means,
                    ["mean"] * len(means),
                ),
            ):
                figure.add_scatter(
                    x=list(x),
                    y=list(y),
                    mode="markers",
                    marker=marker,
                    customdata=list(what),
                    name=method,
                    hovertemplate=f"{method}, %{{customdata}}: %{{y:.4g}}<extra></extra>",
                    showlegend=False,
                    row=row,
                    col=1,
                )
        figure.update_yaxes(rangemode="tozero", row=row, col=1)
    for method in methods:
        color = METHOD_COLORS.get(method, GREY)
        legend_only(figure, method, mode="markers", marker={"size": 9, "color": color})
    figure.update_xaxes(
        tickvals=list(range(len(models))),
        ticktext=[model.replace(" ", "<br>") for model in models],
        tickangle=0,
        range=[-0.6, len(models) - 0.4],
        showgrid=False,
    )
    figure.update_xaxes(showticklabels=False, row=1)
    return figure


def with_cross(own: pd.DataFrame, cross: pd.DataFrame) -> pd.DataFrame:
    """Return a table of decoders' self-attention and cross-attention, each with a panel in `wo_ablation` and
    `overlap_by_layer`.

    `own` holds `OutputProjectionRow`s or `HeadOverlapRow`s of any models, `cross` those of cross-attention.
    """
    decoders = own[own.model.isin(cross.model)]
    return pd.concat([decoders, of_cross_attention(cross)])


def overlap_by_layer(table: pd.DataFrame) -> go.Figure:
    """Draw the mean cosine between heads' output subspaces over layers, a panel per model (C5).

    Takes `HeadOverlapRow`s. A line is the mean over pairs of heads, the dashed line that of random subspaces
    of the same size.
    """
    need(table, HeadOverlapRow)
    models = order(table, "model")
    figure = panels(
        "Overlap of the heads' output subspaces",
        setting(table, what="mean over pairs of heads"),
        [models],
        y="mean cosine of<br>principal angles",
    )
    lines = (("mean_cosine", "heads", "solid"), ("random_mean_cosine", "random subspaces", "dash"))
    for col, model in enumerate(models, start=1):
        for column, name, dash in lines:
            means = table[table.model == model].groupby("layer")[column].mean()
            figure.add_scatter(
                x=list(means.index),
                y=list(means),
                mode="lines+markers" if dash == "solid" else "lines",
                line={"color": "#0072B2" if dash == "solid" else GREY, "dash": dash},
                name=name,
                legendgroup=name,
                showlegend=col == 1,
                hovertemplate=f"layer %{{x}}: %{{y:.3f}}<extra>{name}</extra>",
                row=1,
                col=col,
            )
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(range=[0, 1])
    return figure
