"""Figure of the last steps before death: a table in, a plotly figure out."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.parts import curve, legend_only, panels
from asi_lens.figures.style import GREY, need, over, setting
from asi_lens.results.beyond_rows import LastStepRow

_SHOWN = (
    ("bias", "encoder bias"),
    ("norm", "norm of the encoder row"),
    ("mean_cosine", "cosine with the mean"),
)
_TONES = ("#56B4E9", "#0072B2", "#CC79A7", "#882255", "#E69F00", "#8C6D00", "#009E73", "#444444")
_LONG = 5
"""Cases from which the legend takes two lines."""


def last_steps(table: pd.DataFrame) -> go.Figure:
    """Draw bias, norm and angle of encoder rows around the last firing of features that die.

    Takes `LastStepRow`s of one site. A solid line per optimizer and learning rate, dashed for features that
    are alive at the end, at the same time; means over seeds, bands their range.
    """
    need(table, LastStepRow)
    cases = table[["optimizer", "lr"]].drop_duplicates().sort_values(["optimizer", "lr"]).to_numpy()
    figure = panels(
        "The last steps before features die",
        setting(table, what=over(table, "seed")),
        [[title for _, title in _SHOWN]],
        shared_y=False,
        legend=1 if len(cases) < _LONG else 2,
    )
    for i, (optimizer, lr) in enumerate(cases):
        own = table[(table.optimizer == optimizer) & (table.lr == lr)]
        name, look = f"{optimizer}, lr {lr:g}", (_TONES[i % len(_TONES)], "circle")
        for col, (column, _) in enumerate(_SHOWN, start=1):
            for group, dash in (("died", "solid"), ("alive", "dash")):
                part = own[own.group == group]
                curve(figure, part, "tokens", column, name, 1, col, dash=dash, markers=False, look=look)
    legend_only(figure, "alive at the end", mode="lines", line={"color": GREY, "dash": "dash"})
    for col in (1, 2, 3):
        figure.add_vline(x=0, line={"color": GREY, "dash": "dot", "width": 1.2}, row=1, col=col)
    figure.update_xaxes(title_text="training tokens after the last firing", tickformat="~s")
    return figure
