"""One builder per figure of trained dictionaries: takes a table as in its CSV, returns a plotly figure.

As in `collapse`, builders only draw. The tables are `DeadFeatureRow`s of both splits: `train` rows over
training, `held_out` rows at its end. Columns that were not measured have no panel. The axis title of a share
of dead features states the window; shares of two windows are never drawn as one.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from asi_lens.base.errors import DataError
from asi_lens.figures.panels import (
    FVU,
    Panel,
    check,
    dead_panel,
    ends,
    grid,
    held_out_panels,
    in_training,
    method_curves,
    over_training,
    subtitle_of,
    window_of,
)
from asi_lens.figures.parts import bar, curve, legend_only, log_x, panels, root_y
from asi_lens.figures.style import GREY, color, label, marker, methods, over, single, sites
from asi_lens.results.rows import DeadFeatureRow, RankedDeadFeatureRow

# Methods that some builders need by name.
_RANDOM, _ASI, _AUTOMATIC = "random", "ASI", "ASI, automatic d_init"
_EDGE = {"width": 1, "color": "white"}


def dead_feature_curves(table: pd.DataFrame, noun: str = "features") -> go.Figure:
    """Draw dead features and FVU over training, and each method's held-out numbers at the end (C7, C9, C10).

    Takes `DeadFeatureRow`s of one model, text, site, layer and size. Lines are means over seeds, bands
    their range. The end has a dot per seed, and a bar and a number at the mean. The window is the largest
    that is shorter than every run. Curves begin after one window, since no feature can be dead before. The
    axis of FVU spans the second half of training, since the first values are huge. `noun`: what can be dead.
    """
    check(table, DeadFeatureRow, "dead_feature_curves", "model", "corpus", "site", "layer", "d_sae")
    full, once, window = in_training(table)
    fvu = once[once.fvu.notna()]
    shown, limits = [dead_panel(full, window, noun)], None
    if len(fvu):
        low, high = fvu.fvu.min(), fvu.fvu[fvu.tokens >= fvu.tokens.max() / 2].max()
        pad = 0.08 * (high - low) or 0.05 * high
        limits = [low - pad, high + pad]
        cut = ", start cut off" if fvu.fvu.max() > limits[1] else ""
        shown.append(Panel(f"FVU, training batches{cut}", FVU, fvu, "fvu"))
    held = held_out_panels(table, "dead_feature_curves", noun)
    held = [panel for panel in held if panel.column != "fvu"]
    figure = over_training(f"Dead {noun} over training", table, shown, held, noun)
    if limits:
        figure.update_yaxes(range=limits, row=1, col=2)
    return figure


def d_init_sweep(table: pd.DataFrame) -> go.Figure:
    """Draw silent features, FVU and loss on held-out text against d_init, a line per site (C8).

    Takes `DeadFeatureRow`s of one model, text and size. Lines are means over layers and seeds, bands
    their range. Dashed lines: the mean of the method "random" at the site. Stars: rows of the method
    "ASI, automatic d_init", one star per row. Other rows without a d_init are not drawn.
    """
    check(table, DeadFeatureRow, "d_init_sweep", "model", "corpus", "d_sae", swept="d_init")
    held = table[(table.split == "held_out") & (table.d_init.notna() | (table.method == _RANDOM))]
    swept = held[~held.method.isin([_RANDOM, _AUTOMATIC])]
    if swept.empty:
        raise DataError("d_init_sweep: the table has no held_out row with a d_init")
    single(swept, "method", "d_init_sweep")
    subtitle, shown = subtitle_of(held, over(swept, "layer", "seed")), held_out_panels(held, "d_init_sweep")
    figure, place = grid("How large the active subspace is taken", subtitle, [shown])
    edges = log_x(figure, "d_init (dimensions)", swept.d_init, among=held.d_init.dropna())
    for panel in shown:
        row, col = place[panel.title]
        for site in sites(panel.rows):
            rows = panel.rows[panel.rows.site == site]
            base, line = rows[rows.method == _RANDOM], rows[~rows.method.isin([_RANDOM, _AUTOMATIC])]
            if len(line):
                curve(figure, line, "d_init", panel.column, site, row, col)
            if len(base):
                flat = pd.concat([base.assign(d_init=end) for end in edges])
                curve(figure, flat, "d_init", panel.column, site, row, col, dash="dash")
                figure.data[-1].hovertemplate = f"{label(site)}, random: %{{y:.3f}}<extra></extra>"
        stars = panel.rows[panel.rows.method == _AUTOMATIC]
        for site, rows in stars.groupby("site"):
            figure.add_scatter(
                x=rows.d_init,
                y=rows[panel.column],
                text=[f"layer {n}, seed {seed}" for n, seed in zip(rows.layer, rows.seed, strict=True)],
                hovertemplate=f"{label(site)}, %{{text}}<br>d_init %{{x}}: %{{y:.3f}}<extra></extra>",
                legendgroup=site,
                showlegend=False,
                row=row,
                col=col,
                **_star(color(site)),
            )
    dash = {"mode": "lines", "line": {"color": GREY, "dash": "dash", "width": 2}}
    marks = {_RANDOM: ("random initialization", dash), _AUTOMATIC: ("automatic d_init", _star(GREY))}
    for name, mark in [marks[method] for method in marks if (held.method == method).any()]:
        legend_only(figure, name, **mark)
    return figure


def dictionary_size(table: pd.DataFrame) -> go.Figure:
    """Draw dead features at the end of training, and held-out numbers, against d_sae (C7).

    Takes `DeadFeatureRow`s of one model, text, site and layer. Each method has a line (means over seeds) and
    a band (their range). The window in training is the largest that all runs share.
    """
    check(table, DeadFeatureRow, "dictionary_size", "model", "corpus", "site", "layer")
    x_title, title = "features in the dictionary, d_sae", "Dead features by dictionary size"
    return _ends_against(table, "dictionary_size", "d_sae", x_title, title)


def learning_rates(table: pd.DataFrame) -> go.Figure:
    """Draw dead features at the end of training, and held-out numbers, against the learning rate.

    Takes `DeadFeatureRow`s of one model, text, site, layer and size. Each method has a line (means over
    seeds) and a band (their range). The window in training is the largest that all runs share.
    """
    check(table, DeadFeatureRow, "learning_rates", "model", "corpus", "site", "layer", "d_sae", swept="lr")
    x_title, title = "learning rate after warm-up", "Dead features by learning rate"
    return _ends_against(table, "learning_rates", "lr", x_title, title)


def layers_and_sites(table: pd.DataFrame) -> go.Figure:
    """Draw silent features against the rank of the activations, and random against ASI (C6, C11).

    Takes `RankedDeadFeatureRow`s of one model, text and size; draws held-out rows of the methods "random"
    and "ASI", means over seeds. Left panel: random, a numbered mark per layer. Right panel: a thin line per
    layer with both, bars and numbers at their means. The axis shows square roots, so both 0.1 % and 10 % can
    be read.
    """
    check(table, RankedDeadFeatureRow, "layers_and_sites", "model", "corpus", "d_sae")
    table = table[table.method.isin([_RANDOM, _ASI])]
    held = held_out_panels(table, "layers_and_sites")
    for method in (_RANDOM, _ASI):
        if not held or not (held[0].rows.method == method).any():
            raise DataError(f"layers_and_sites: the table has no held_out row with the method {method!r}")
    rows, shown = held[0].rows, sites(held[0].rows)
    subtitle = subtitle_of(table, "mean over seeds" if rows.seed.nunique() > 1 else "")
    titles = ["random initialization, a mark per layer", "random and ASI, a line per layer"]
    y = held[0].y.replace("(%)", "(%, √ axis)")
    figure = panels("Dead features by layer and site", subtitle, [titles], y=y, left=92, bottom=70, plot=400)
    means = rows.groupby(["site", "layer", "method"])[["silent", "effective_rank_fraction"]].mean().unstack()
    for i, site in enumerate(shown):
        name, tone, x = label(site), color(site), 2.8 * i
        where: dict[str, Any] = {"row": 1, "col": 2, "legendgroup": site}
        here, pairs = means.loc[site], means.loc[site].silent[[_RANDOM, _ASI]]
        figure.add_scatter(
            x=here.effective_rank_fraction[_RANDOM],
            y=pairs[_RANDOM] ** 0.5,
            mode="markers+text",
            text=here.index,
            textfont={"size": 9, "color": "white"},
            marker={"symbol": marker(site), "size": 15, "color": tone, "line": _EDGE},
            opacity=0.85,
            name=name,
            showlegend=True,
            customdata=pairs[_RANDOM],
            hovertemplate=f"{name}, layer %{{text}}<br>rank %{{x:.3f}}: %{{customdata:.2f}} %<extra></extra>",
            **{**where, "col": 1},
        )
        both = pairs.dropna()  # some layers may have a random start alone
        for layer, pair in both.iterrows():
            figure.add_scatter(
                x=[x, x + 1],
                y=pair**0.5,
                mode="lines+markers",
                line={"color": tone, "width": 1},
                marker={"symbol": marker(site), "size": 5},
                opacity=0.6,
                showlegend=False,
                customdata=pair,
                hovertemplate=f"{name}, layer {layer}: %{{customdata:.2f}} %<extra></extra>",
                **where,
            )
        for method, mean in (both if len(both) else pairs).mean().dropna().items():
            place = {"half": 0.15, "right": method == _ASI, **where}
            bar(figure, x + (method == _ASI), mean**0.5, f"{round(mean, 2):.3g}", tone, **place)
    root_y(figure, float(rows.silent.max()))
    figure.update_xaxes(title_text="effective rank / width", col=1)
    plain = {"ticks": "", "showgrid": False, "tickangle": 0, "range": [-1, 2.8 * len(shown) - 0.8]}
    places = [2.8 * i + side for i in range(len(shown)) for side in (0, 0.5, 1)]
    names = [text for site in shown for text in ("random", f"<br>{label(site)}", "ASI")]
    figure.update_xaxes(tickvals=places, ticktext=names, **plain, col=2)
    return figure


def _ends_against(table: pd.DataFrame, builder: str, x: str, x_title: str, title: str) -> go.Figure:
    train, shown = ends(table[table.split == "train"]), held_out_panels(table, builder)
    if len(train):
        window = window_of(train, whole=True)
        shown.insert(0, dead_panel(train[train.dead_window_tokens == window], window))
    rows = [shown[:2], shown[2:]] if len(shown) > 3 else [shown]
    figure, place = grid(title, subtitle_of(table, over(table, "seed")), rows)
    log_x(figure, x_title, table[x])
    for panel in shown:
        method_curves(figure, panel, x, methods(table), *place[panel.title])
    return figure


def _star(tone: str) -> dict:
    return {"mode": "markers", "marker": {"symbol": "star", "size": 12, "color": tone, "line": _EDGE}}
