"""Figure of dictionaries that others have trained."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.parts import legend_only, panels, root_y
from asi_lens.figures.style import GREY, color, label, marker, need, setting, single, sites
from asi_lens.results.beyond_rows import ReleasedRow

# Sizes of marks in pixels: of the smallest and of the largest dictionary.
_MARKS = (8, 17)


def released_dictionaries(table: pd.DataFrame) -> go.Figure:
    """Draw dead features of dictionaries against the effective rank of the site that they read (C6).

    Takes `ReleasedRow`s of one model and text: a mark per dictionary, larger for more features, open where
    the folder says that its start was not random. Left panel: fired on none of all tokens; right: silent on
    the held-out ones. The axis shows square roots, so both 0.1 % and 10 % can be read.
    """
    need(table, ReleasedRow)
    for column in ("model", "corpus"):
        single(table, column, "released_dictionaries")
    many, few = (int(table[name].max()) for name in ("n_tokens", "n_tokens_held_out"))
    titles = [f"fired on none of {many:,} tokens", f"on none of {few:,} held-out tokens"]
    figure = panels(
        "Dead features of dictionaries trained elsewhere",
        setting(table, what="a mark per dictionary"),
        [titles],
        y="features without a firing (%, √ axis)",
        left=92,
        plot=400,
    )
    shares = ("dead_fraction", "silent_fraction")
    known = sorted(table.d_sae.unique())
    step = (_MARKS[1] - _MARKS[0]) / max(1, len(known) - 1)
    for col, share in enumerate(shares, start=1):
        for site in sites(table):
            rows = table[table.site == site]
            other = rows.start.notna() & (rows.start != "random")
            figure.add_scatter(
                x=rows.effective_rank_fraction,
                y=(100 * rows[share]) ** 0.5,
                mode="markers",
                name=label(site),
                legendgroup=site,
                showlegend=col == 1,
                marker={
                    "symbol": [marker(site) + "-open" * one for one in other],
                    "size": [_MARKS[0] + step * known.index(size) for size in rows.d_sae],
                    "color": color(site),
                    "line": {"width": 1, "color": ["white" if not one else color(site) for one in other]},
                },
                opacity=0.85,
                customdata=rows[["dictionary", "layer", "d_sae", "fvu", "l0"]].assign(y=100 * rows[share]),
                hovertemplate=(
                    f"%{{customdata[0]}}<br>{label(site)}, layer %{{customdata[1]}}<br>%{{customdata[2]:,}} "
                    "features, FVU %{customdata[3]:.3f}, l0 %{customdata[4]:.1f}<br>rank %{x:.3f}: "
                    "%{customdata[5]:.2f} %<extra></extra>"
                ),
                row=1,
                col=col,
            )
    if (table.start.notna() & (table.start != "random")).any():
        mark = {"mode": "markers", "marker": {"symbol": "circle-open", "size": 10, "color": GREY}}
        legend_only(figure, "start not random", **mark)
    root_y(figure, 100 * float(table[[*shares]].max(axis=None)))
    figure.update_xaxes(title_text="effective rank / width of the site")
    return figure
