"""Parts of all figures: panels, lines with bands, dots with bars, axes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from asi_lens.figures.hover import hover
from asi_lens.figures.style import GREY, TEMPLATE, color, label, marker, sites

_RIGHT, _LEVEL_MARGIN = 24, 92
# Smallest width of a panel in pixels; a narrower page scrolls sideways.
_PANEL_WIDTH = 220
# Space between panels with separate y axes: as a share of the plot, and in pixels.
_OWN_AXIS, _OWN_AXIS_WIDTH = 0.11, 84
# Heights in pixels above the plot: title and subtitle, a row of legend, a row of panel titles.
_HEAD, _LEGEND, _PANEL_TITLE = 76, 32, 24


def panels(
    title: str,
    subtitle: str,
    titles: Sequence[Sequence[str]],
    *,
    y: str = "",
    shared_y: bool = True,
    legend: int = 1,
    left: int = 76,
    bottom: int = 62,
    plot: int = 340,
) -> go.Figure:
    """Return a figure of empty panels; `titles` has a list per row. A single panel shows no title.

    Panels of a row have one y axis, unless `shared_y` is false. `legend` is the number of its lines, `left`
    and `bottom` are margins, `plot` is the height of a row, in pixels.
    """
    rows, cols = len(titles), max(len(row) for row in titles)
    alone = rows == cols == 1
    figure = make_subplots(
        rows=rows,
        cols=cols,
        shared_yaxes=shared_y,
        horizontal_spacing=0.06 / max(1, cols - 1) if shared_y else _OWN_AXIS,
        vertical_spacing=0.22 / rows,
        specs=None if shared_y else [[{} if i < len(row) else None for i in range(cols)] for row in titles],
        subplot_titles=None if alone else [t for row in titles for t in [*row, *[""] * (cols - len(row))]],
    )
    figure.update_annotations(font={"size": 14})
    top = _HEAD + _LEGEND * legend + _PANEL_TITLE * (not alone)
    figure.update_layout(
        template=TEMPLATE,
        title={"text": title, "subtitle": {"text": subtitle}, "x": 0.015, "xref": "container"},
        height=plot * rows + top + bottom,
        margin={"l": left, "r": _RIGHT, "t": top, "b": bottom},
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1 + (6 + _PANEL_TITLE * (not alone)) / (plot * rows),
            "yanchor": "bottom",
            "tracegroupgap": 0,
        },
        meta={
            "min_width": left + _RIGHT + _PANEL_WIDTH * cols + _OWN_AXIS_WIDTH * (cols - 1) * (not shared_y)
        },
    )
    figure.update_layout(title_y=1 - 24 / figure.layout.height)
    if y:
        figure.update_yaxes(title_text=y, col=1)
    return figure


def curve(
    figure: go.Figure,
    part: pd.DataFrame,
    x: str,
    y: str,
    site: str,
    row: int = 1,
    col: int = 1,
    *,
    dash: str = "solid",
    markers: bool = True,
    look: tuple[str, str] | None = None,
) -> None:
    """Add a site's line: mean of `y` at each `x`, with a band (range) if several rows share an `x`.

    With a single `x`, an error bar replaces the band, which would have no width. With a `look` (color and
    marker), `site` may be the name of a method or of anything else.
    """
    stats = part.groupby(x)[y].agg(["mean", "min", "max"]).reset_index()
    tone, symbol = look or (color(site), marker(site))
    where = {"row": row, "col": col}
    spread = dash == "solid" and (stats["max"] - stats["min"]).max() > 0
    if spread and len(stats) > 1:
        red, green, blue = (int(tone[i : i + 2], 16) for i in (1, 3, 5))
        figure.add_scatter(
            x=[*stats[x], *stats[x][::-1]],
            y=[*stats["max"], *stats["min"][::-1]],
            fill="toself",
            fillcolor=f"rgba({red},{green},{blue},0.13)",
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=site,
            **where,
        )
    told = in_legend(figure)
    text = hover(part, x, label(site))
    figure.add_scatter(
        x=stats[x],
        y=stats["mean"],
        mode="lines+markers" if markers and dash == "solid" else "lines",
        name=label(site),
        legendgroup=site,
        showlegend=label(site) not in told and dash == "solid",
        line={"color": tone, "dash": dash, "width": 2.2},
        marker={"symbol": symbol, "size": 7, "color": tone},
        error_y=range_bars(stats) if spread and len(stats) == 1 else None,
        customdata=text.customdata,
        hovertemplate=text.template,
        **where,
    )


def site_curves(
    figure: go.Figure, table: pd.DataFrame, x: str, y: str, row: int, col: int, **look: Any
) -> None:
    """Add the `curve` of every site of a table."""
    for site in sites(table):
        curve(figure, table[table.site == site], x, y, site, row, col, **look)


def legend_only(figure: go.Figure, name: str, **mark: Any) -> None:
    """Add an entry to the legend that has no points."""
    figure.add_scatter(x=[None], y=[None], name=name, showlegend=True, **mark)


def heatmap(
    figure: go.Figure, cells: pd.DataFrame, col: int, *, gap: int, what: str, numbers: bool = True
) -> None:
    """Add a grid of colored cells to a panel of the first row; `what` describes a cell, %{z:.3f} follows."""
    figure.add_heatmap(
        z=cells.to_numpy(),
        x=[str(name) for name in cells.columns],
        y=[str(name) for name in cells.index],
        coloraxis="coloraxis",
        texttemplate="%{z:.2f}" if numbers else None,
        xgap=gap,
        ygap=gap,
        hoverongaps=False,
        hovertemplate=f"{what}: %{{z:.3f}}<extra></extra>",
        row=1,
        col=col,
    )


def seed_dots(
    figure: go.Figure,
    rows: pd.DataFrame,
    y: str,
    x: float | int,
    look: tuple[str, str],
    size: int,
    width: float,
    **more: Any,
) -> None:
    """Add a dot per row around `x`, evenly over `width`; `look` is color and marker."""
    tone, symbol = look
    figure.add_scatter(
        x=[x + width * ((i + 0.5) / len(rows) - 0.5) for i in range(len(rows))],
        y=rows[y],
        mode="markers",
        marker={"symbol": symbol, "size": size, "color": tone, "line": {"width": 1, "color": "white"}},
        **more,
    )


def range_bars(stats: pd.DataFrame) -> dict:
    """Return the error bars of a trace, from the smallest to the largest value."""
    up, down = stats["max"] - stats["mean"], stats["mean"] - stats["min"]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1.5, "width": 4}


def bar(
    figure: go.Figure,
    x: float | int,
    y: float,
    number: str,
    tone: str,
    *,
    half: float = 0.26,
    right: bool = True,
    **where: int | str,
) -> None:
    """Add a thick bar around `x` at height `y`, with a number at its right (or left) end."""
    figure.add_scatter(
        x=[x - half, x + half],
        y=[y, y],
        mode="lines+text",
        line={"color": tone, "width": 3.5},
        text=["", f"\u00a0{number}"] if right else [f"{number}\u00a0", ""],
        textposition="middle right" if right else "middle left",
        cliponaxis=False,
        hovertemplate=f"mean: {number}<extra></extra>",
        showlegend=False,
        **where,
    )


def in_legend(figure: go.Figure) -> set[str]:
    """Return the names that stand in a figure's legend already."""
    return {trace.name for trace in figure.data if trace.showlegend}


def strips(
    figure: go.Figure, table: pd.DataFrame, y: str, looks: dict[str, tuple[str, str]], row: int, col: int
) -> None:
    """Add, for each method of `looks`, a dot per row (by seed), and a bar and a number at the mean."""
    told = in_legend(figure)
    for x, (method, look) in enumerate(looks.items()):
        rows = table[table.method == method].sort_values("seed")
        if rows.empty:
            continue
        mean = float(rows[y].mean())
        bar(figure, x, mean, f"{mean:.3g}", look[0], row=row, col=col, legendgroup=method)
        legend = {"name": method, "legendgroup": method, "showlegend": method not in told}
        text = hover(rows.assign(dot=range(len(rows))), "dot", method, x="")
        told_by = {"customdata": text.customdata, "hovertemplate": text.template}
        more = {**legend, **told_by, "row": row, "col": col}
        seed_dots(figure, rows, y, x, look, 9, 0.3, **more)
    figure.update_xaxes(
        tickvals=list(range(len(looks))),
        ticktext=[in_lines(method, among=len(looks)) for method in looks],
        range=[-0.5, len(looks) - 0.1],
        ticks="",
        showgrid=False,
        tickangle=0,
        row=row,
        col=col,
    )


def in_lines(method: str, among: int) -> str:
    """Return a method's name with line breaks between its parts, and within parts if `among` is large."""
    parts = method.replace(" + ", "\n+ ").replace(", ", ",\n").split("\n")
    width = 10 if among > 4 else 99
    lines = [line for part in parts for line in textwrap.wrap(part, width, break_long_words=False)]
    return "<br>".join(lines)


def root_y(figure: go.Figure, highest: float) -> None:
    """Set a y axis from 0 to `highest` percent for marks placed at the square roots of their values."""
    top = highest**0.5 or 1.0
    ticks = [0.0]
    for value in (0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 100):
        if value**0.5 - ticks[-1] ** 0.5 >= 0.07 * top and value**0.5 <= 1.1 * top:
            ticks.append(value)
    figure.update_yaxes(
        tickvals=[tick**0.5 for tick in ticks],
        ticktext=[f"{tick:g}" for tick in ticks],
        range=[-0.05 * top, 1.1 * top],
    )


def log_x(figure: go.Figure, title: str, values: pd.Series, *, among: pd.Series | None = None) -> list[float]:
    """Set a log x axis in every panel, with ticks at those `values` that fit; return the ends of the axis.

    The axis spans `values` and `among`.
    """
    places = sorted({math.log10(value) for value in values})
    every = [*places, *(math.log10(value) for value in (values if among is None else among))]
    span = max(every) - min(every)
    pad = 0.06 * span or 0.1
    ticks: list[float] = []
    for place in reversed(places):
        if not ticks or ticks[-1] - place >= 0.12 * span:
            ticks.append(place)
    ends = [min(every) - pad, max(every) + pad]
    figure.update_xaxes(
        type="log",
        title_text=title,
        range=ends,
        tickvals=[10**tick for tick in ticks],
        ticktext=[f"{round(10**tick):,}" if tick >= 0 else f"{10**tick:.3g}" for tick in ticks],
    )
    return [10**end for end in ends]


def level(figure: go.Figure, y: float, text: str, cols: int) -> None:
    """Add a dotted horizontal line to every panel of the first row, with its name in the right margin."""
    for col in range(1, cols + 1):
        figure.add_hline(y=y, line={"color": GREY, "dash": "dot", "width": 1.2}, row=1, col=col)
    axis = "" if cols == 1 else str(cols)
    figure.add_annotation(
        text=text,
        x=1,
        xref=f"x{axis} domain",
        xanchor="left",
        xshift=5,
        y=y,
        yref=f"y{axis}",
        align="left",
        showarrow=False,
        font={"size": 12, "color": "#555"},
    )
    # The wider margin narrows the panels, so the page's smallest width grows by the same number of pixels.
    more = _LEVEL_MARGIN - figure.layout.margin.r
    figure.layout.margin.r = _LEVEL_MARGIN
    figure.layout.meta = {**figure.layout.meta, "min_width": figure.layout.meta["min_width"] + more}


def color_scale(title: str, low: float | int, high: float | int, *, step: float | int = 0.1) -> dict:
    """Return a color axis from `low` to `high`, both rounded outward to a multiple of `step`."""
    bar = {
        "title": {"text": f"{title}<br> ", "font": {"size": 13}},
        "thickness": 14,
        "outlinewidth": 0,
        "len": 1,
    }
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    return {"colorscale": "Cividis", "cmin": low, "cmax": high, "colorbar": bar}
