"""One builder per figure of other kinds of dictionaries: takes a table as in its CSV, returns a figure.

The rules are those of `dead_features`. Here methods differ in the activation function or its schedule, and
in the start.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from asi_lens.base.errors import DataError
from asi_lens.figures.panels import (
    Panel,
    check,
    dead_panel,
    grid,
    held_out_panels,
    in_training,
    over_training,
    subtitle_of,
)
from asi_lens.figures.parts import seed_dots
from asi_lens.figures.style import METHOD_COLORS, order, over
from asi_lens.results.rows import DictionaryRow, DriftRow

_STARTS = {"random": ("random", "circle"), "asi": ("ASI", "diamond")}


def jumprelu_schedule(table: pd.DataFrame) -> go.Figure:
    """Draw dead features, l0 and drift over training, and each schedule's held-out numbers (C12).

    Takes `DriftRow`s of one model, text, site, layer and size. Lines are means over seeds, bands their range.
    The lower row has a dot per seed, and a bar and a number at the mean. Drift is a mean over features, in
    the same subspace for all schedules.
    """
    name = "jumprelu_schedule"
    check(table, DriftRow, name, "model", "corpus", "site", "layer", "d_sae", "d_active")
    full, once, window = in_training(table)
    r = int(table.d_active.iloc[0])
    inside = f"squared norm in the top {r}<br>directions (%, mean over features)"
    shown = [
        dead_panel(full, window),
        Panel("Features per token, training", "features that fire on a token", once, "l0"),
        Panel("Decoder rows inside", inside, once.assign(inside=100 * once.decoder_inside), "inside"),
    ]
    held = held_out_panels(table, name)
    figure = over_training("JumpReLU from low and from high l0", table, shown, held)
    low = 100 * once.decoder_inside.min()
    figure.update_yaxes(range=[low - 0.06 * (100 - low) - 0.1, 100 + 0.06 * (100 - low)], row=1, col=3)
    return figure


def dictionaries(table: pd.DataFrame) -> go.Figure:
    """Draw silent features, FVU and loss on held-out text of every kind of dictionary, random start and ASI.

    Takes `DictionaryRow`s of one model, text, site, layer and size. Each seed has a dot, each mean a bar and
    a number.
    """
    name = "dictionaries"
    check(table, DictionaryRow, name, "model", "corpus", "site", "layer", "d_sae")
    held = held_out_panels(table, name)
    if not held:
        raise DataError(f"{name}: the table has no measured held_out row")
    kinds = order(held[0].rows, "dictionary")
    subtitle = subtitle_of(table, over(table, "seed"))
    figure, place = grid("ASI in every dictionary", subtitle, [[panel] for panel in held])
    for panel in held:
        row, col = place[panel.title]
        values = panel.rows[panel.column]
        low = min(0, values.min()) if panel.column != "fvu" else values.min()
        room = (values.max() - low) or 1
        # The range leaves space for the numbers above the dots.
        figure.update_yaxes(range=[low - 0.05 * room, values.max() + 0.18 * room], row=row, col=col)
        for x, kind in enumerate(kinds):
            for side, (start, (said, symbol)) in zip((-1, 1), _STARTS.items(), strict=True):
                rows = panel.rows[(panel.rows.dictionary == kind) & (panel.rows.init == start)]
                if len(rows):
                    where = {"row": row, "col": col, "legendgroup": start}
                    _dots(figure, rows.sort_values("seed"), panel.column, x + 0.2 * side, said, symbol, where)
    ticks = {"tickvals": list(range(len(kinds))), "ticktext": kinds, "tickangle": 0, "showgrid": False}
    figure.update_xaxes(**ticks, ticks="", range=[-0.6, len(kinds) - 0.4])
    return figure


def _dots(
    figure: go.Figure, rows: pd.DataFrame, y: str, x: float, name: str, symbol: str, where: dict[str, Any]
) -> None:
    """Add a dot per seed around `x`, and a bar and a number at the mean."""
    tone, mean = METHOD_COLORS[name], float(rows[y].mean())
    quiet: dict[str, Any] = {"showlegend": False, "hoverinfo": "skip", **where}
    line = {"color": tone, "width": 4}
    figure.add_scatter(x=[x - 0.13, x + 0.13], y=[mean, mean], mode="lines", line=line, **quiet)
    # The number is above the dots: beside the dots it would overlap the next kind's number.
    number = {"text": [f"{mean:.3g}<br>\u00a0"], "textposition": "top center", "textfont": {"size": 11}}
    figure.add_scatter(x=[x], y=[float(rows[y].max())], mode="text", **number, **quiet)
    first = not any(trace.name == name for trace in figure.data)
    hover = f"%{{customdata}}, {name}, seed %{{text}}: %{{y:.4g}}<extra></extra>"
    told = {"text": rows.seed, "customdata": rows.dictionary, "hovertemplate": hover}
    seed_dots(figure, rows, y, x, (tone, symbol), 8, 0.16, name=name, showlegend=first, **told, **where)
