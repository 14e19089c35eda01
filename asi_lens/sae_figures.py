"""One builder per figure of trained dictionaries: a table as its CSV has it in, a plotly figure out.

As in `figures`, builders only draw. Their tables are `DeadFeatureRow`s of both splits: `train` rows over
training, `held_out` rows at its end. What was not measured has no panel. A share of dead features has
its window in the title of its axis, and two windows are never drawn as one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from asi_lens.errors import DataError
from asi_lens.figure_parts import bar, curve, log_x, panels, root_y, strips
from asi_lens.figure_style import (
    GREY,
    METHOD_COLORS,
    color,
    label,
    marker,
    methods,
    need,
    over,
    setting,
    single,
    sites,
)
from asi_lens.results import DeadFeatureRow, RankedDeadFeatureRow, Row

__all__ = ["METHOD_COLORS", "d_init_sweep", "dead_feature_curves", "dictionary_size", "layers_and_sites"]

# Methods that some builders look for.
_RANDOM, _ASI, _AUTOMATIC = "random", "ASI", "ASI, automatic d_init"
# What tells one dictionary from another.
_RUN = ["model", "corpus", "site", "layer", "method", "d_init", "d_sae", "k", "lr", "seed"]
_EDGE = {"width": 1, "color": "white"}
_FVU = "fraction of variance<br>unexplained"
_DELTA = "loss with the reconstruction<br>minus without (nats / token)"


class _Panel(NamedTuple):
    """A column of some rows, under a title and beside the title of its axis."""

    title: str
    y: str
    rows: pd.DataFrame
    column: str


def dead_feature_curves(table: pd.DataFrame) -> go.Figure:
    """Dead features and FVU over training, and where each method ends on held-out text (C7, C9).

    Takes `DeadFeatureRow`s of one model, text, site, layer and size. Lines are means over seeds, bands
    their range; at the end a dot per seed, a bar and a number at the mean. The window is the largest
    that is shorter than every run; curves begin when it has passed, since nothing can be dead before.
    The axis of FVU spans the second half of training: the first points are huge.
    """
    _check(table, DeadFeatureRow, "dead_feature_curves", "model", "corpus", "site", "layer", "d_sae")
    train = table[table.split == "train"]
    window, end = _window(train, whole=False), train.tokens.max()
    full = train[(train.dead_window_tokens == window) & (train.tokens >= window)]
    # A moment has a row for each window, all with its FVU.
    fvu = train[train.fvu.notna()].drop_duplicates([*_RUN, "tokens"])
    shown, limits = [_dead(full, window)], None
    if len(fvu):
        low, high = fvu.fvu.min(), fvu.fvu[fvu.tokens >= fvu.tokens.max() / 2].max()
        pad = 0.08 * (high - low) or 0.05 * high
        limits = [low - pad, high + pad]
        cut = ", start cut off" if fvu.fvu.max() > limits[1] else ""
        shown.append(_Panel(f"FVU, training batches{cut}", _FVU, fvu, "fvu"))
    held = [panel for panel in _held_out(table, "dead_feature_curves") if panel.column != "fvu"]
    subtitle, rows = _subtitle(table, over(table, "seed")), [shown, held] if held else [shown]
    figure, place = _grid("Dead features over training", subtitle, rows)
    figure.update_xaxes(title_text="training tokens", tickformat="~s", range=[0, 1.02 * end], row=1)
    if limits:
        figure.update_yaxes(range=limits, row=1, col=2)
    for panel in shown:
        _method_curves(figure, panel, "tokens", methods(table), *place[panel.title])
    for panel in held:
        strips(figure, panel.rows, panel.column, methods(table), *place[panel.title])
    return figure


def d_init_sweep(table: pd.DataFrame) -> go.Figure:
    """Silent features, FVU and loss on held-out text against d_init, a line per site (C8).

    Takes `DeadFeatureRow`s of one model, text and size. Lines are means over layers and seeds, bands
    their range. Dashed: the mean of the method "random" at that site. Stars: a row each of the method
    "ASI, automatic d_init". Other rows without a d_init are not drawn.
    """
    _check(table, DeadFeatureRow, "d_init_sweep", "model", "corpus", "d_sae")
    held = table[(table.split == "held_out") & (table.d_init.notna() | (table.method == _RANDOM))]
    swept = held[~held.method.isin([_RANDOM, _AUTOMATIC])]
    if swept.empty:
        raise DataError("d_init_sweep: no held_out row has a d_init to sweep over")
    single(swept, "method", "d_init_sweep")
    subtitle, shown = _subtitle(held, over(swept, "layer", "seed")), _held_out(held, "d_init_sweep")
    figure, place = _grid("How large the active subspace is taken", subtitle, [shown])
    ends = log_x(figure, "d_init (dimensions)", swept.d_init, among=held.d_init.dropna())
    for panel in shown:
        row, col = place[panel.title]
        for site in sites(panel.rows):
            rows = panel.rows[panel.rows.site == site]
            base, line = rows[rows.method == _RANDOM], rows[~rows.method.isin([_RANDOM, _AUTOMATIC])]
            if len(line):
                curve(figure, line, "d_init", panel.column, site, row, col)
            if len(base):
                flat = pd.concat([base.assign(d_init=end) for end in ends])
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
        figure.add_scatter(x=[None], y=[None], name=name, showlegend=True, **mark)
    return figure


def dictionary_size(table: pd.DataFrame) -> go.Figure:
    """Dead features at the end of training, and what held-out text shows, against d_sae (C7).

    Takes `DeadFeatureRow`s of one model, text, site and layer. A line per method: means over seeds,
    bands their range. The window of training is the largest that all runs share.
    """
    _check(table, DeadFeatureRow, "dictionary_size", "model", "corpus", "site", "layer")
    train, shown = _ends(table[table.split == "train"]), _held_out(table, "dictionary_size")
    if len(train):
        window = _window(train, whole=True)
        shown.insert(0, _dead(train[train.dead_window_tokens == window], window))
    rows = [shown[:2], shown[2:]] if len(shown) > 2 else [shown]
    figure, place = _grid("Dead features by dictionary size", _subtitle(table, over(table, "seed")), rows)
    log_x(figure, "features in the dictionary, d_sae", table.d_sae)
    for panel in shown:
        _method_curves(figure, panel, "d_sae", methods(table), *place[panel.title])
    return figure


def layers_and_sites(table: pd.DataFrame) -> go.Figure:
    """Silent features against the rank of the activations, and random against ASI (C6, C11).

    Takes `RankedDeadFeatureRow`s of one model, text and size; draws held-out rows of the methods "random"
    and "ASI", means over seeds. Left: random, a mark per layer with its number. Right: a thin line per
    layer, bars and numbers at the means. On the axis of square roots tenths and tens can both be read.
    """
    _check(table, RankedDeadFeatureRow, "layers_and_sites", "model", "corpus", "d_sae")
    table = table[table.method.isin([_RANDOM, _ASI])]
    held = _held_out(table, "layers_and_sites")
    for method in (_RANDOM, _ASI):
        if not held or not (held[0].rows.method == method).any():
            raise DataError(f"layers_and_sites: no held_out row has the method {method!r}")
    rows, shown = held[0].rows, sites(held[0].rows)
    subtitle = _subtitle(table, "mean over seeds" if rows.seed.nunique() > 1 else "")
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
        for layer, pair in pairs.iterrows():
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
        for method, mean in pairs.mean().dropna().items():
            place = {"half": 0.15, "right": method == _ASI, **where}
            bar(figure, x + (method == _ASI), mean**0.5, f"{round(mean, 2):.3g}", tone, **place)
    root_y(figure, float(rows.silent.max()))
    figure.update_xaxes(title_text="effective rank / width", col=1)
    plain = {"ticks": "", "showgrid": False, "tickangle": 0, "range": [-1, 2.8 * len(shown) - 0.8]}
    places = [2.8 * i + side for i in range(len(shown)) for side in (0, 0.5, 1)]
    names = [text for site in shown for text in ("random", f"<br>{label(site)}", "ASI")]
    figure.update_xaxes(tickvals=places, ticktext=names, **plain, col=2)
    return figure


def _check(table: pd.DataFrame, row_type: type[Row], builder: str, *one: str) -> None:
    """Raise DataError for another table, one with several values of `one`, or two recipes of one name."""
    need(table, row_type)
    for column in one:
        single(table, column, builder)
    for (method, *_), rows in table.groupby(["method", "site", "layer", "d_sae", "seed"]):
        for column in ("k", "lr", "optimizer", "aux_k", *["d_init"] * (builder != "d_init_sweep")):
            single(rows, column, f"{builder}, method {method!r},")


def _ends(rows: pd.DataFrame) -> pd.DataFrame:
    """The last rows of every run."""
    return rows[rows.tokens == rows.groupby(_RUN, dropna=False).tokens.transform("max")]


def _window(train: pd.DataFrame, *, whole: bool) -> int:
    """The largest window that all runs end with; as long as a run only if `whole` or for want of others."""
    ends = _ends(train)
    last = ends.tokens.min()
    shared = [set(rows.dead_window_tokens) for _, rows in ends.groupby(_RUN, dropna=False)]
    fit = [w for w in set.intersection(*shared) if w <= last] if shared else []
    if not fit:
        raise DataError("no window of dead features is in all runs of split train and within each")
    return int(max(fit if whole else [w for w in fit if w < last] or fit))


def _dead(train: pd.DataFrame, window: int) -> _Panel:
    y = f"features without a firing in<br>the last {window:,} tokens (%)"
    return _Panel("Dead features, training", y, train.assign(dead=100 * train.dead_fraction), "dead")


def _held_out(table: pd.DataFrame, builder: str) -> list[_Panel]:
    """Panels of what was measured on held-out text at the end of each run."""
    held = _ends(table[table.split == "held_out"])
    single(held, "dead_window_tokens", builder)
    window = int(held.dead_window_tokens.max()) if len(held) else 0
    y = f"features without a firing in<br>{window:,} held-out tokens (%)"
    every = [
        _Panel("Silent features, held out", y, held.assign(silent=100 * held.dead_fraction), "silent"),
        _Panel("FVU, held out", _FVU, held[held.fvu.notna()], "fvu"),
        _Panel("Δ LM loss, held out", _DELTA, held[held.cross_entropy_delta.notna()], "cross_entropy_delta"),
    ]
    return [panel for panel in every if len(panel.rows)]


def _grid(title: str, subtitle: str, rows: list[list[_Panel]]) -> tuple[go.Figure, dict]:
    """Empty panels with y axes, and the row and column of each panel by its title."""
    figure = panels(title, subtitle, [[p.title for p in row] for row in rows], shared_y=False, left=96)
    place = {panel.title: (i, j) for i, row in enumerate(rows, 1) for j, panel in enumerate(row, 1)}
    for panel in [panel for row in rows for panel in row]:
        row, col = place[panel.title]
        figure.update_yaxes(title_text=panel.y, row=row, col=col)
        if panel.column != "fvu":  # differences in FVU are small beside it; the others are read from zero
            values = panel.rows[panel.column]
            low, high = min(0, values.min()), max(0, values.max())
            room = (high - low) or 1
            figure.update_yaxes(range=[low - 0.04 * room, low + 1.08 * room], row=row, col=col)
    return figure, place


def _subtitle(table: pd.DataFrame, what: str) -> str:
    """The setting with sites, layers, sizes and length of training, and `what` the marks are over."""
    layers = ", ".join(str(n) for n in sorted(table.layer.unique()))
    tokens = sorted({int(n) for n in _ends(table).tokens})
    parts = [label(site) for site in sites(table) if table.site.nunique() == 1]
    parts.append(f"layer{'s' * (table.layer.nunique() > 1)} {layers}")
    parts += [f"{n:,} features" for n in table.d_sae.unique() if table.d_sae.nunique() == 1]
    parts += [f"k = {n:g}" for n in table.k.dropna().unique() if table.k.nunique() == 1]
    parts.append(" to ".join(f"{n:,}" for n in dict.fromkeys([tokens[0], tokens[-1]])) + " training tokens")
    return setting(table, tokens=False, what=" · ".join([*parts, what] if what else parts))


def _method_curves(figure: go.Figure, panel: _Panel, x: str, looks: dict, row: int, col: int) -> None:
    """A line per method, with marks where there are few."""
    few = panel.rows[x].nunique() <= 25
    for method, look in looks.items():
        line = panel.rows[panel.rows.method == method]
        if len(line):
            curve(figure, line, x, panel.column, method, row, col, markers=few, look=look)


def _star(tone: str) -> dict:
    return {"mode": "markers", "marker": {"symbol": "star", "size": 12, "color": tone, "line": _EDGE}}
