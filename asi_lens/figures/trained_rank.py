"""Figures of small transformers trained from nothing: rank of attention and loss, by variant."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from asi_lens.figures.parts import curve, panels
from asi_lens.figures.style import GREY, need, order, over, setting, single
from asi_lens.results.rows import RankRow
from asi_lens.results.trained_rank_rows import TrainedRankRow
from asi_lens.results.trained_rank_verdicts import differences_to_baseline, final_numbers

_LOOKS = (
    ("#000000", "circle"),
    ("#D55E00", "diamond"),
    ("#56B4E9", "triangle-down"),
    ("#0072B2", "triangle-up"),
    ("#009E73", "square"),
    ("#CC79A7", "cross"),
    ("#8C6D00", "x"),
    ("#777777", "pentagon"),
)
_RANK = "effective rank / width"


def rank_over_training(table: pd.DataFrame, packaged: pd.DataFrame | None = None) -> go.Figure:
    """Draw loss, its difference to the baseline of the same seed, and rank over training, a line per variant.

    Takes `TrainedRankRow`s, and optionally `RankRow`s of a released model's attention outputs, whose mean
    over layers is the dotted line. Ranks are means over layers; bands are the range over seeds.
    """
    need(table, TrainedRankRow)
    single(table, "corpus", "rank_over_training")
    keys = ["variant", "seed", "tokens"]
    means = (
        table.groupby(keys, sort=False)[["validation_loss", "effective_rank_fraction"]].mean().reset_index()
    )
    base = means[means.variant == "baseline"].set_index(["seed", "tokens"]).validation_loss
    # At the start the loss is that of equal guesses, and would flatten all that follows.
    trained = means[means.tokens > 0].join(base.rename("base"), on=["seed", "tokens"])
    trained = trained.assign(difference=trained.validation_loss - trained.base).dropna(subset=["difference"])
    told = [over(table, "seed"), "" if packaged is None else f"dotted: {order(packaged, 'model')[0]}"]
    figure = panels(
        "Does a higher rank of attention help the model?",
        setting(table, what=" · ".join(filter(None, told))),
        [["validation loss", "less the baseline's, same seed", "rank of attention, mean over layers"]],
        shared_y=False,
    )
    looks = dict(zip(order(means, "variant"), _LOOKS * len(means), strict=False))
    for name, look in looks.items():
        shown = ((means[means.tokens > 0], "validation_loss"), (trained, "difference"))
        for col, (part, column) in enumerate(shown, start=1):
            line = part[part.variant == name]
            if len(line):
                curve(figure, line, "tokens", column, name, col=col, look=look)
        curve(
            figure, means[means.variant == name], "tokens", "effective_rank_fraction", name, col=3, look=look
        )
    if packaged is not None:
        need(packaged, RankRow)
        single(packaged, "model", "rank_over_training")
        figure.add_hline(
            y=packaged.effective_rank_fraction.mean(),
            line={"color": GREY, "dash": "dot"},
            row=1,
            col=3,
        )
    figure.update_xaxes(title_text="training tokens", rangemode="tozero")
    for col, title in enumerate(("nats per token", "nats per token", _RANK), start=1):
        figure.update_yaxes(title_text=title, row=1, col=col)
    return figure


def final_rank_and_loss(table: pd.DataFrame) -> go.Figure:
    """Draw the final loss against the final rank of attention, a mark per variant and seed.

    Takes `TrainedRankRow`s. Left: as measured. Right: differences to the baseline of the same seed; a change
    that raises the rank and helps the model lies in the lower right.
    """
    need(table, TrainedRankRow)
    single(table, "corpus", "final_rank_and_loss")
    whole, final = final_numbers(table), differences_to_baseline(table)
    figure = panels(
        "Loss against rank at the end of training",
        setting(table, what="a mark is a seed"),
        [["as measured", "less the baseline of the same seed"]],
        shared_y=False,
    )
    for name, (tone, symbol) in zip(order(whole, "variant"), _LOOKS * len(whole), strict=False):
        here, change = whole[whole.variant == name], final[final.variant == name]
        shown = (
            (here, "rank", "loss"),
            (change, "rank_difference", "loss_difference"),
        )
        for col, (part, x, y) in enumerate(shown, start=1):
            if part.empty:
                continue
            figure.add_scatter(
                x=part[x],
                y=part[y],
                mode="markers",
                name=name,
                legendgroup=name,
                showlegend=col == 1,
                marker={"symbol": symbol, "size": 10, "color": tone, "opacity": 0.8},
                customdata=part.seed,
                hovertemplate=f"{name}, seed %{{customdata}}<br>%{{x:.3f}}: %{{y:.4f}}<extra></extra>",
                row=1,
                col=col,
            )
    for axis in (figure.add_hline, figure.add_vline):
        axis(0, line={"color": GREY, "dash": "dot", "width": 1}, row=1, col=2)
    figure.update_xaxes(title_text=f"{_RANK}, mean over layers", row=1, col=1)
    figure.update_xaxes(title_text="difference in rank", row=1, col=2)
    figure.update_yaxes(title_text="validation loss (nats / token)", row=1, col=1)
    figure.update_yaxes(title_text="difference in loss (nats / token)", row=1, col=2)
    return figure
