"""One builder per figure of the notebooks beyond the paper: a table in, a plotly figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.parts import curve, panels
from asi_lens.figures.style import GREY, color, label, marker, need, order, setting, sites
from asi_lens.results.rows import InputRow, StartRow

_LOOKS = {"random": ("#8a8a8a", "circle"), "ASI": ("#1b6ca8", "diamond")}


def death_at_start(table: pd.DataFrame) -> go.Figure:
    """Draw features that never fire at a random start against gamma (raw) and against rank (centered).

    Takes `StartRow`s; means over seeds, a mark per layer. The line on the left is the prediction of arXiv
    2605.31518 from gamma alone.
    """
    need(table, StartRow)
    keys = ["site", "layer", "input"]
    means = (
        table.groupby(keys)[["gamma", "effective_rank_fraction", "predicted", "dead"]].mean().reset_index()
    )
    names = ["raw inputs", "mean subtracted"]
    figure = panels("Features that never fire at a random start", setting(table), [names], y="never fire (%)")
    shown = ((1, "raw", "gamma", "gamma = |mean| / |σ|"), (2, "mean", "effective_rank_fraction", ""))
    for col, name, x, title in shown:
        part = means[means.input == name]
        if col == 1:
            line = part.sort_values("gamma")
            figure.add_scatter(
                x=line.gamma,
                y=100 * line.predicted,
                mode="lines",
                line={"color": GREY, "dash": "dot"},
                name="predicted from gamma",
                row=1,
                col=1,
            )
        for site in sites(part):
            own = part[part.site == site]
            figure.add_scatter(
                x=own[x],
                y=100 * own.dead,
                mode="markers",
                name=label(site),
                legendgroup=site,
                showlegend=col == 1,
                marker={"symbol": marker(site), "size": 8, "color": color(site)},
                customdata=own.layer,
                hovertemplate=f"{label(site)} %{{customdata}}<br>%{{x:.3f}}: %{{y:.2f}} %<extra></extra>",
                row=1,
                col=col,
            )
        figure.update_xaxes(title_text=title or "effective rank / width", row=1, col=col)
    return figure


def inputs_and_starts(table: pd.DataFrame) -> go.Figure:
    """Draw silent features and FVU on held-out text by treatment of the inputs, a line per start.

    Takes `InputRow`s. A column of panels per (site, layer); lines are means over seeds, bands their range.
    """
    need(table, InputRow)
    held = table[table.split == "held_out"].assign(silent=100 * table.dead_fraction)
    places = list(dict.fromkeys(zip(held.site, held.layer, strict=True)))
    titles = [f"{label(site)}, layer {layer}" for site, layer in places]
    figure = panels(
        "Centering, whitening, and the start", setting(held, tokens=False), [titles, titles], shared_y=False
    )
    names = order(held, "input")
    for col, (site, layer) in enumerate(places, start=1):
        here = held[(held.site == site) & (held.layer == layer)]
        here = here.assign(x=here.input.map(names.index))
        for row, column in ((1, "silent"), (2, "fvu")):
            for start in order(here, "start"):
                line = here[here.start == start]
                curve(figure, line, "x", column, start, row, col, look=_LOOKS.get(start))
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, tickangle=-38)
    figure.update_yaxes(title_text="silent features,<br>held out (%)", row=1, col=1)
    figure.update_yaxes(title_text="fraction of variance<br>unexplained", row=2, col=1)
    return figure
