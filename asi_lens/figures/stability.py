"""Figures of stability: overlaps of subspaces, dictionaries off their text, features of several seeds."""

from __future__ import annotations

from typing import get_args

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.parts import curve, in_legend, legend_only, panels, seed_dots
from asi_lens.figures.style import GREY, methods, need, order, setting, single
from asi_lens.results.stability_rows import Inputs, OverlapRow, SeedMatchRow, TransferRow

_FLOOR = "same text, next part"
_RANDOM = "random subspaces"
_TEXTS = (
    ("#1b6ca8", "circle"),
    ("#c0392b", "square"),
    ("#1e8449", "diamond"),
    ("#8e44ad", "triangle-up"),
    ("#E69F00", "cross"),
    ("#56B4E9", "x"),
)
_INPUTS = get_args(Inputs)
_OWN = "own text"
# Entries in a row of the legend of `subspace_overlaps`, and pixels of a row.
_IN_A_ROW, _LEGEND_ROW = 5, 30


def subspace_overlaps(table: pd.DataFrame) -> go.Figure:
    """Draw the Projection Kernel over layers: other texts (left), one layer of the same text (right).

    Takes `OverlapRow`s of one site. Random subspaces have the dotted line.
    """
    need(table, OverlapRow)
    single(table, "site", "subspace_overlaps")
    layers = table[table.against == "layer"]
    right = f"same text, against {order(layers, 'other')[0]}" if len(layers) else "same text, other layers"
    what = f"top {int(table.r.max())} of {int(table.width.max())} directions"
    figure = panels(
        "Does the active subspace stay put?",
        setting(table, what=what),
        [["other texts, same layer", right]],
        y="Projection Kernel / dimensions",
    )
    curve(figure, table[table.against == "half"], "layer", "kernel", _FLOOR, look=("#222222", "circle-open"))
    texts = table[table.against == "text"]
    for i, name in enumerate(order(texts, "other")):
        curve(figure, texts[texts.other == name], "layer", "kernel", name, look=_TEXTS[i % len(_TEXTS)])
    if len(layers):
        curve(figure, layers, "layer", "kernel", "another layer", col=2, look=("#7f6000", "square-open"))
    for col in (1, 2):
        curve(
            figure,
            table,
            "layer",
            "random_kernel",
            _RANDOM,
            col=col,
            dash="dot",
            look=(GREY, "circle"),
        )
    legend_only(figure, _RANDOM, mode="lines", line={"color": GREY, "dash": "dot"})
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(range=[0, 1.03])
    _make_room(figure, sum(bool(trace.showlegend) for trace in figure.data))
    return figure


def _make_room(figure: go.Figure, entries: int) -> None:
    """Raise the head of a figure by the rows that its legend takes beyond the first."""
    more = _LEGEND_ROW * ((entries - 1) // _IN_A_ROW)
    height = figure.layout.height + more
    figure.update_layout(height=height, margin_t=figure.layout.margin.t + more, title_y=1 - 24 / height)


def off_its_text(table: pd.DataFrame) -> go.Figure:
    """Draw the FVU on each text: as it is, with its own mean, and rotated; a panel per method.

    Takes `TransferRow`s of one training text; a dot is a seed.
    """
    need(table, TransferRow)
    single(table, "corpus", "off_its_text")
    names = order(table, "method")
    figure = panels(
        "A dictionary off its text",
        setting(table, tokens=False, what="a mark is a seed"),
        [names],
        y="FVU, held out",
        bottom=120,
    )
    texts = order(table, "text")
    looks = {name: _TEXTS[i] for i, name in enumerate(_INPUTS)} | {_OWN: ("#222222", "circle-open")}
    told = table.assign(shown=table.inputs.where(table.text != table.corpus, _OWN))
    for col, method in enumerate(names, start=1):
        for place, text in enumerate(texts):
            here = told[(told.method == method) & (told.text == text)]
            kinds = [name for name in looks if name in set(here.shown)]
            for i, kind in enumerate(kinds):
                x = place + (i - (len(kinds) - 1) / 2) * 0.24
                more = {"name": kind, "legendgroup": kind, "showlegend": kind not in in_legend(figure)}
                seed_dots(
                    figure, here[here.shown == kind], "fvu", x, looks[kind], 9, 0.12, **more, row=1, col=col
                )
        figure.update_xaxes(tickvals=list(range(len(texts))), ticktext=texts, tickangle=35, row=1, col=col)
    figure.update_yaxes(rangemode="tozero")
    return figure


def seed_matches(table: pd.DataFrame) -> go.Figure:
    """Draw how far features of two seeds agree, at the start and after training, a line per method.

    Takes `SeedMatchRow`s. Left: mean cosine of features matched one to one, dashed the mean best cosine; then
    the same over pairs that fire; right: share of pairs of a cosine of 0.7 or more. Bands are the range over
    pairs of seeds.
    """
    need(table, SeedMatchRow)
    shown = table.assign(
        moment=(table.tokens > 0).astype(int),
        percent=100 * table.alike,
        matched_alive=table.matched_alive.astype(float),
    )
    seeds = sorted({*table.seed, *table.other_seed})
    titles = ["one to one (dashed: best)", "pairs that fire on held-out text"]
    figure = panels(
        "Do two seeds find the same features?",
        setting(table.drop(columns="seed"), tokens=False, what=f"seeds {', '.join(map(str, seeds))}"),
        [[*titles, "pairs of a cosine of 0.7 or more"]],
        shared_y=False,
    )
    looks = methods(table)
    for name in order(table, "method"):
        own = shown[shown.method == name]
        for col, column in enumerate(("matched", "matched_alive", "percent"), start=1):
            curve(figure, own.dropna(subset=[column]), "moment", column, name, col=col, look=looks[name])
        curve(figure, own, "moment", "best", name, look=looks[name], dash="dash")
    figure.update_xaxes(tickvals=[0, 1], ticktext=["start", "end"], range=[-0.15, 1.15])
    for col, title in enumerate(("mean cosine", "mean cosine", "share of pairs (%)"), start=1):
        figure.update_yaxes(title_text=title, rangemode="tozero", row=1, col=col)
    return figure
