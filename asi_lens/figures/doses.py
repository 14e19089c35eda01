"""Figures of the notebook on doses: a table in, a plotly figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.parts import curve, panels
from asi_lens.figures.style import GREY, METHODS, need, order, over, setting
from asi_lens.results.beyond_rows import DoseRow, KnownFeatureRow
from asi_lens.results.dictionary_verdicts import PLACE, RANKS
from asi_lens.results.dose_verdicts import OTHER, dose_points, falling_curve


def dose_response(table: pd.DataFrame) -> go.Figure:
    """Draw silent features against three measures of rank, for changed spectra and for sites as they are.

    Takes `DoseRow`s of a random start. Marks are means over seeds, bars their range. The line is the falling
    curve through the doses of the first place (`falling_curve`).
    """
    need(table, DoseRow)
    held = table[table.split == "held_out"]
    points = dose_points(table)
    keys = [*PLACE, "shape"]
    range_of = held.groupby(keys, sort=False).dead_fraction.agg(["min", "max"]).reset_index()
    points = points.merge(range_of, on=keys)
    power = points["shape"].str.startswith("power") | (points["shape"] == "measured")
    kinds = {
        "powers": (points.dosed & power, "circle", "#c0392b"),
        "leading tenth flat": (points.dosed & (points["shape"] == "flat head"), "square", "#8e44ad"),
        "last half lifted": (points.dosed & (points["shape"] == "lifted tail"), "triangle-up", "#1b6ca8"),
        "other sites, unchanged": (points["shape"] == OTHER, "circle-open", GREY),
    }
    for site, layer in points[points.changed & ~points.dosed][PLACE].drop_duplicates().to_numpy():
        here = points.changed & (points.site == site) & (points.layer == layer)
        kinds[f"{site} {layer}, changed"] = (here, "diamond-open", "#009E73")
    figure = panels(
        "Dose and response: the spectrum changed, all else equal",
        setting(held, tokens=False, what=over(held, "seed")),
        [list(RANKS.values())],
        y="silent features, held out (%)",
    )
    for col, measure in enumerate(RANKS, start=1):
        if points.dead_fraction.notna().all():
            fit = falling_curve(points, measure)
            figure.add_scatter(
                x=fit.x,
                y=100 * fit.y,
                mode="lines",
                name="falling curve",
                showlegend=col == 1,
                line={"color": "#c0392b", "width": 1.6},
                hoverinfo="skip",
                row=1,
                col=col,
            )
        for name, (chosen, symbol, tone) in kinds.items():
            _marks(figure, points[chosen], measure, name, symbol, tone, col)
    figure.update_xaxes(title_text="share of the width")
    return figure


def _marks(
    figure: go.Figure, part: pd.DataFrame, measure: str, name: str, symbol: str, tone: str, col: int
) -> None:
    up, down = part["max"] - part.dead_fraction, part.dead_fraction - part["min"]
    bars = {"array": 100 * up, "arrayminus": 100 * down, "thickness": 1.3, "width": 3}
    figure.add_scatter(
        x=part[measure],
        y=100 * part.dead_fraction,
        mode="markers",
        name=name,
        legendgroup=name,
        showlegend=col == 1 and len(part) > 0,
        marker={"symbol": symbol, "size": 9, "color": tone},
        error_y={"type": "data", "symmetric": False, **bars} if (up > 0).any() else None,
        customdata=part[["site", "layer", "shape"]],
        hovertemplate="%{customdata[0]} %{customdata[1]}, %{customdata[2]}: %{y:.2f}<extra></extra>",
        row=1,
        col=col,
    )


def known_features(table: pd.DataFrame) -> go.Figure:
    """Draw what dictionaries find of known features: by rank, beside the silent share, and by frequency.

    Takes `KnownFeatureRow`s. Lines are means, bands ranges: over seeds on the left and in the middle, over
    ranks and seeds on the right.
    """
    need(table, KnownFeatureRow)
    shares = table.assign(found=100 * table.recovered, dead=100 * table.silent)
    whole, fifths = shares[shares.fifth.isna()], shares[shares.fifth.notna()]
    width, n = int(table.width.max()), int(whole.n_features.max())
    figure = panels(
        "Known features: are the right ones lost?",
        setting(table.assign(corpus=f"{n} features in {width} dimensions"), what=over(whole, "seed")),
        [["true features recovered", "silent features", "recovered, by frequency"]],
        shared_y=False,
    )
    for method in order(whole, "method"):
        own, look = whole[whole.method == method], METHODS.get(method, (GREY, "square"))
        curve(figure, own, "r", "found", method, 1, 1, look=look)
        curve(figure, own, "r", "dead", method, 1, 2, look=look)
        curve(figure, fifths[fifths.method == method], "fifth", "found", method, 1, 3, look=look)
    for col, title in ((1, "recovered (%)"), (2, "silent, held out (%)"), (3, "recovered (%)")):
        figure.update_yaxes(title_text=title, rangemode="tozero", row=1, col=col)
        figure.update_xaxes(title_text="rank of the subspace", row=1, col=col)
    figure.update_xaxes(
        title_text="fifths of the true features",
        tickvals=[1, 2, 3, 4, 5],
        ticktext=["frequent", "2", "3", "4", "rare"],
        row=1,
        col=3,
    )
    return figure
