"""Figure of the notebook on starts: a table in, a plotly figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.panels import ends, subtitle_of
from asi_lens.figures.parts import legend_only, panels, range_bars
from asi_lens.figures.style import GREY, METHOD_COLORS, left_margin, need, order, over, single
from asi_lens.results.beyond_rows import TriedStartRow

_ROW = 30
# Column, its title, and the factor on its values.
_MEASURES = (
    ("dead_fraction", "silent features,<br>held out (%)", 100),
    ("fvu", "FVU, held out", 1),
    ("kl", "KL, held out<br>(nats / token)", 1),
    ("inside", "decoder inside the<br>subspace (%)", 100),
    ("encoder_norm", "encoder norm<br>at the start", 1),
)


def starts_side_by_side(table: pd.DataFrame) -> go.Figure:
    """Draw the numbers of every start at the end of training: a row per start, a column per number.

    Takes `TriedStartRow`s of one site and size. A mark is the mean over seeds, a bar their range. Starts are
    ordered by their silent share. The share inside the subspace has a hollow mark at the start of training
    and a full mark at its end. Numbers that were not measured have no column.
    """
    need(table, TriedStartRow)
    for column in ("site", "layer", "d_sae"):
        single(table, column, "starts_side_by_side")
    held = ends(table[table.split == "held_out"]).assign(inside=lambda rows: rows.decoder_inside_end)
    names = list(held.groupby("method", sort=False).dead_fraction.mean().sort_values().index)
    shown = [measure for measure in _MEASURES if held[measure[0]].notna().any()]
    figure = panels(
        "Starts side by side",
        subtitle_of(held, over(held, "seed")),
        [[""] * len(shown)],
        left=left_margin(names),
        bottom=84,
        plot=_ROW * max(len(names), 4),
    )
    looks = {name: METHOD_COLORS.get(name, GREY) for name in order(held, "method")}
    for col, (column, title, factor) in enumerate(shown, start=1):
        _dots(figure, held, column, factor, names, looks, col)
        if column == "inside":
            _dots(figure, held, "decoder_inside_start", factor, names, looks, col, hollow=True)
        figure.update_xaxes(title_text=title, row=1, col=col)
        if column != "fvu":  # FVU differs little between starts; the other axes include zero
            most = factor * held[[column, *["decoder_inside_start"] * (column == "inside")]].max().max() or 1
            least = min(0.0, factor * held[column].min())
            room = 0.05 * (most - least)
            figure.update_xaxes(range=[least - room, most + room], row=1, col=col)
    for name, symbol in (("at the end", "circle"), ("at the start", "circle-open")):
        legend_only(figure, name, mode="markers", marker={"symbol": symbol, "size": 9, "color": GREY})
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, range=[-0.6, len(names) - 0.4], showgrid=True
    )
    return figure


def _dots(
    figure: go.Figure,
    held: pd.DataFrame,
    column: str,
    factor: int,
    names: list[str],
    looks: dict[str, str],
    col: int,
    *,
    hollow: bool = False,
) -> None:
    """Add a mark per start at the mean of `column`, with a bar over its range."""
    stats = factor * held.groupby("method")[column].agg(["mean", "min", "max"]).reindex(names)
    tones = [looks[name] for name in names]
    figure.add_scatter(
        x=stats["mean"],
        y=list(range(len(names))),
        mode="markers",
        marker={"symbol": "circle-open" if hollow else "circle", "size": 13 if hollow else 9, "color": tones},
        error_x={**range_bars(stats), "thickness": 1.4, "width": 3, "color": GREY},
        customdata=names,
        hovertemplate="%{customdata}: %{x:.4g}<extra></extra>",
        showlegend=False,
        row=1,
        col=col,
    )
