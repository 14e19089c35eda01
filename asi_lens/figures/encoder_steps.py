"""Figure of the notebook on encoder steps: a table in, a plotly figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.panels import Panel, held_out_panels, subtitle_of
from asi_lens.figures.parts import panels, range_bars
from asi_lens.figures.style import left_margin, methods, need, over, single
from asi_lens.results.beyond_rows import EncoderStepRow

_ROW = 44
_CELL = ["overshoot", "encoder_lr"]
# Methods stand a little above and below each other.
_APART = 0.36


def encoder_steps(table: pd.DataFrame) -> go.Figure:
    """Draw silent features and FVU on held-out text: a row per first norm and rate of the encoder.

    Takes `EncoderStepRow`s of one model, text, site, layer and size. A column per number and learning rate. A
    mark is a method's mean over seeds, a bar their range.
    """
    need(table, EncoderStepRow)
    for column in ("model", "corpus", "site", "layer", "d_sae"):
        single(table, column, "encoder_steps")
    cells = [tuple(cell) for cell in table[_CELL].drop_duplicates().to_numpy()]
    names = ["norm {:g}, encoder rate {:g}".format(*cell) for cell in cells]
    shown = [panel for panel in held_out_panels(table, "encoder_steps") if panel.column in ("silent", "fvu")]
    columns = [(panel, rate) for panel in shown for rate in sorted(table.lr.unique())]
    figure = panels(
        "Steps of the encoder",
        subtitle_of(table, over(table, "seed")),
        [[f"rate {rate:g}" for _, rate in columns]],
        left=left_margin(names),
        bottom=84,
        plot=_ROW * max(len(names), 4),
    )
    for col, (panel, rate) in enumerate(columns, start=1):
        part = panel._replace(rows=panel.rows[panel.rows.lr == rate])
        _marks(figure, part, cells, methods(table), col)
        figure.update_xaxes(title_text=panel.y, title_font_size=12, row=1, col=col)
        same = [number for number, (other, _) in enumerate(columns, start=1) if other is panel]
        figure.update_xaxes(matches=None if col == same[0] else f"x{same[0] if same[0] > 1 else ''}", col=col)
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.4, -0.6], showgrid=True
    )
    return figure


def _marks(
    figure: go.Figure, panel: Panel, cells: list[tuple], looks: dict[str, tuple[str, str]], col: int
) -> None:
    """Add a mark for each method and cell at the mean over seeds, with a bar over their range."""
    for number, (method, (tone, symbol)) in enumerate(looks.items()):
        rows = panel.rows[panel.rows.method == method]
        stats = rows.groupby(_CELL)[panel.column].agg(["mean", "min", "max"]).reindex(cells)
        shift = _APART * ((number + 0.5) / len(looks) - 0.5)
        figure.add_scatter(
            x=stats["mean"],
            y=[place + shift for place in range(len(cells))],
            mode="markers",
            marker={"symbol": symbol, "size": 9, "color": tone},
            error_x={**range_bars(stats), "thickness": 1.4, "width": 3, "color": tone},
            name=method,
            legendgroup=method,
            showlegend=col == 1,
            hovertemplate=f"{method}: %{{x:.4g}}<extra></extra>",
            row=1,
            col=col,
        )
