"""One builder per figure: a table as its CSV has it in, a plotly figure out.

Builders only draw: no numbers are made here beyond means and ranges over what the table holds.
Colors are Okabe and Ito's, which stay apart under color blindness; a site has the same color and
marker everywhere. `save` writes a figure to disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from asi_lens.errors import DataError, unknown_name
from asi_lens.figure_files import SavedFigure, save
from asi_lens.results import (
    VARIANTS,
    HeadOverlapRow,
    LossRow,
    OutputProjectionRow,
    RankRow,
    SpectrumRow,
    columns,
)

__all__ = [
    "COLORS",
    "SITE_LABELS",
    "VARIANT_LABELS",
    "SavedFigure",
    "downstream_loss",
    "head_overlap",
    "rank_curves",
    "rank_heatmap",
    "rank_vs_tokens",
    "save",
    "spectra",
    "wo_ablation",
]

COLORS = {"attn_out": "#D55E00", "mlp_out": "#0072B2", "resid_post": "#009E73", "z": "#CC79A7"}
SITE_LABELS = {
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "resid_post": "residual stream",
    "z": "heads concatenated, z",
}
VARIANT_LABELS = {
    "z": "z, before W<sub>O</sub>",
    "attn_out": "attention output, z W<sub>O</sub>",
    "flat_spectrum": "W<sub>O</sub> with a flat spectrum",
    "random_orthogonal": "random orthogonal W<sub>O</sub>",
    "gaussian": "Gaussian W<sub>O</sub>",
    "rotated_input": "W<sub>O</sub> with its input rotated",
    "isotropic_z": "isotropic z through W<sub>O</sub>",
    "orthogonal_heads": "heads made orthogonal",
    "sum_of_heads": "sum of per-head ranks",
}
_MARKERS = {"attn_out": "circle", "mlp_out": "square", "resid_post": "diamond", "z": "triangle-up"}
_SPARE_COLORS = ("#E69F00", "#56B4E9", "#000000", "#8C6D00")
_GREY = "#777777"
_FONT = "Arial, Helvetica, Liberation Sans, DejaVu Sans, sans-serif"
_PANEL_WIDTH = 330
"""Width in pixels below which a page scrolls a panel sideways instead of squeezing it."""

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": _FONT, "size": 14, "color": "#222"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hoverlabel": {"font": {"family": _FONT}},
        "colorscale": {"sequential": "Cividis"},
        "annotationdefaults": {"font": {"size": 14}},
        **{
            axis: {
                "showline": True,
                "linecolor": "#444",
                "ticks": "outside",
                "tickcolor": "#444",
                "gridcolor": "#e8e8e8",
                "zeroline": False,
                "automargin": True,
                "title": {"standoff": 8},
            }
            for axis in ("xaxis", "yaxis")
        },
    }
)


def rank_curves(table: pd.DataFrame) -> go.Figure:
    """Effective rank / width over layers, a line per site, a panel per model (C1, C2).

    Takes `RankRow`s. Lines are means over corpora, bands their range.
    """
    _need(table, RankRow)
    models = _order(table, "model")
    figure = _panels("Effective rank by layer", _setting(table), [models], y="effective rank / width")
    for col, model in enumerate(models, start=1):
        part = table[table.model == model]
        for site in _sites(part):
            lines = part[part.site == site]
            _curve(figure, lines, "layer", "effective_rank_fraction", site, col=col)
        _level(figure, 0.6, "paper: attention ≈ 0.6", col, label=col == len(models))
        _level(figure, 0.9, "paper: MLP, residual ≈ 0.9", col, label=col == len(models))
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(range=[0, 1.02])
    return figure


def spectra(table: pd.DataFrame, layers: Sequence[int] | None = None) -> go.Figure:
    """Relative singular values on a log axis against i / d, a panel per layer, a row per model (C1).

    Takes `SpectrumRow`s of one corpus; `layers` are those to show of each model that has them, else
    up to four spread over its depth.
    """
    _need(table, SpectrumRow)
    _single(table, "corpus", "spectra")
    models = _order(table, "model")
    shown = {m: _pick(table[table.model == m].layer, layers) for m in models}
    titles = [[f"{m if len(models) > 1 else ''} layer {n}".strip() for n in shown[m]] for m in models]
    figure = _panels(
        "Singular values of the activations", _setting(table), titles, y="s<sub>i</sub> / s<sub>1</sub>"
    )
    for row, model in enumerate(models, start=1):
        for col, layer in enumerate(shown[model], start=1):
            part = table[(table.model == model) & (table.layer == layer)]
            for site in _sites(part):
                line = part[part.site == site].sort_values("index")
                _curve(
                    figure, line, "index_fraction", "relative_singular_value", site, row, col, markers=False
                )
    figure.update_yaxes(type="log", exponentformat="power", dtick=1)
    figure.update_xaxes(title_text="i / d", range=[0, 1], row=len(models))
    return figure


def rank_heatmap(table: pd.DataFrame) -> go.Figure:
    """Effective rank / width, mean over layers, of models (rows) on corpora; a panel per site (C2).

    Takes `RankRow`s.
    """
    _need(table, RankRow)
    sites = _sites(table)
    figure = _panels(
        "Effective rank over models and texts", _setting(table, layers=True), [[_label(s) for s in sites]]
    )
    corpora, models = _order(table, "corpus"), _order(table, "model")
    for col, site in enumerate(sites, start=1):
        part = table[table.site == site]
        mean = part.pivot_table(
            index="model", columns="corpus", values="effective_rank_fraction", aggfunc="mean"
        )
        mean = mean.reindex(index=models, columns=corpora)
        trace = go.Heatmap(
            z=mean.to_numpy(),
            x=corpora,
            y=models,
            coloraxis="coloraxis",
            texttemplate="%{z:.2f}",
            xgap=2,
            ygap=2,
            hovertemplate="%{y} on %{x}: %{z:.3f}<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=col)
    bar = {"title": {"text": "effective rank<br>/ width"}, "thickness": 14, "outlinewidth": 0}
    figure.update_layout(coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": 1, "colorbar": bar})
    figure.update_xaxes(showgrid=False, ticks="", showline=False, tickangle=-35)
    figure.update_yaxes(showgrid=False, ticks="", showline=False, autorange="reversed", matches="y")
    figure.update_layout(height=260 + 50 * len(models))
    return figure


def rank_vs_tokens(table: pd.DataFrame) -> go.Figure:
    """Effective rank / width against tokens in the covariance, a line per site, a panel per model.

    Takes `RankRow`s at several `n_tokens`: shows how far a rank is from its large-sample limit. The
    dotted line is n = 20 d. Lines are means over layers and corpora, bands their range.
    """
    _need(table, RankRow)
    models = _order(table, "model")
    setting = _setting(table, tokens=False, layers=True)
    figure = _panels("Effective rank against sample size", setting, [models], y="effective rank / width")
    for col, model in enumerate(models, start=1):
        part = table[table.model == model]
        for site in _sites(part):
            _curve(figure, part[part.site == site], "n_tokens", "effective_rank_fraction", site, col=col)
        width = int(part[part.site != "z"].d.min() if (part.site != "z").any() else part.d.min())
        figure.add_vline(
            x=20 * width,
            line={"color": _GREY, "dash": "dot", "width": 1.5},
            annotation={
                "text": f"20 d = {20 * width:,}",
                "font": {"size": 12, "color": "#555"},
                "yref": "y domain",
            },
            row=1,
            col=col,
        )
    figure.update_xaxes(type="log", title_text="tokens")
    figure.update_yaxes(range=[0, 1.02])
    return figure


def downstream_loss(table: pd.DataFrame) -> go.Figure:
    """Loss recovered against the share of directions kept, a line per site, a panel per model (C3).

    Takes `LossRow`s. Solid: principal directions; dashed: as many random ones. Lines are means over
    layers, bands (principal only) their range. Below -0.5, worse than ablation by half, is cut off.
    """
    _need(table, LossRow)
    table = table[table.loss_recovered.notna()]
    if table.empty:
        raise DataError("downstream_loss: loss_recovered is empty in every row")
    models = _order(table, "model")
    setting = _setting(table, layers=True)
    figure = _panels("Loss recovered by the top directions of a site", setting, [models], y="loss recovered")
    for col, model in enumerate(models, start=1):
        part = table[table.model == model]
        for site in _sites(part):
            for subspace, dash in (("principal", "solid"), ("random", "dash")):
                line = part[(part.site == site) & (part.subspace == subspace)]
                if len(line):
                    _curve(figure, line, "rank_fraction", "loss_recovered", site, 1, col, dash=dash)
        _level(figure, 1.0, "clean model", col, label=col == len(models))
        _level(figure, 0.0, "site at its mean", col, label=col == len(models))
    for subspace, dash in (("principal", "solid"), ("random", "dash")):
        if (table.subspace == subspace).any():
            line = {"color": "#444", "dash": dash, "width": 2}
            figure.add_trace(
                go.Scatter(x=[None], y=[None], mode="lines", line=line, name=f"{subspace} directions"),
                row=1,
                col=1,
            )
    lowest = max(-0.5, float(table.loss_recovered.min()))
    figure.update_yaxes(range=[min(-0.05, lowest - 0.05), 1.08])
    ticks = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]
    figure.update_xaxes(
        type="log", title_text="directions kept / width", tickvals=ticks, ticktext=[f"{t:g}" for t in ticks]
    )
    return figure


def wo_ablation(table: pd.DataFrame) -> go.Figure:
    """Effective rank of what attention writes under each change to W_O, its input or its heads (C4, C5).

    Takes `OutputProjectionRow`s. A row per variant in the order that tells the story, a dot per layer
    (its color is the depth), a bar at the mean; lines mark the means before and after W_O. A panel per
    model.
    """
    _need(table, OutputProjectionRow)
    for variant in table.variant.unique():
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
    models = _order(table, "model")
    variants = [v for v in VARIANTS if (table.variant == v).any()]
    place = {variant: -index - 0.6 * (index > 1) for index, variant in enumerate(variants)}
    setting = _setting(table, layers=True, what="a dot per layer, a bar at the mean")
    figure = _panels("What makes the collapse: W<sub>O</sub>, and the overlap of heads", setting, [models])
    for col, model in enumerate(models, start=1):
        part = (
            table[table.model == model]
            .groupby(["variant", "layer"], as_index=False)
            .effective_rank_fraction.mean()
        )
        depth = max(1, int(part.layer.max()))
        for variant in variants:
            dots = part[part.variant == variant].sort_values("layer")
            if dots.empty:
                continue
            # A fixed small spread by depth keeps dots of 30 layers apart without random jitter.
            height = place[variant] + 0.28 * (0.5 - dots.layer / depth)
            marker = {"size": 7, "color": dots.layer, "coloraxis": "coloraxis", "opacity": 0.9}
            figure.add_trace(
                go.Scatter(
                    x=dots.effective_rank_fraction,
                    y=height,
                    mode="markers",
                    marker=marker,
                    customdata=dots.layer,
                    hovertemplate="layer %{customdata}: %{x:.3f}<extra></extra>",
                    showlegend=False,
                ),
                row=1,
                col=col,
            )
            mean = float(dots.effective_rank_fraction.mean())
            figure.add_trace(
                go.Scatter(
                    x=[mean, mean],
                    y=[place[variant] - 0.34, place[variant] + 0.34],
                    mode="lines",
                    line={"color": "black", "width": 3},
                    hovertemplate=f"mean over layers: {mean:.3f}<extra></extra>",
                    showlegend=False,
                ),
                row=1,
                col=col,
            )
            figure.add_annotation(
                x=1.0,
                xref=f"x{'' if col == 1 else col} domain",
                xanchor="right",
                y=place[variant],
                yref=f"y{'' if col == 1 else col}",
                text=f"{mean:.2f}",
                showarrow=False,
                font={"size": 13, "color": "#222"},
            )
            if variant in ("z", "attn_out"):
                color = COLORS[variant]
                figure.add_vline(x=mean, line={"color": color, "width": 1.5, "dash": "dash"}, row=1, col=col)
    figure.update_yaxes(
        tickvals=list(place.values()),
        ticktext=[VARIANT_LABELS[v] for v in variants],
        range=[min(place.values()) - 0.6, 0.6],
        showgrid=False,
        ticks="",
    )
    figure.update_xaxes(
        title_text="effective rank / width", range=[0, 1.06], tickvals=[0, 0.2, 0.4, 0.6, 0.8, 1]
    )
    bar = {"title": {"text": "layer"}, "thickness": 14, "outlinewidth": 0}
    figure.update_layout(
        coloraxis={"colorscale": "Cividis", "colorbar": bar}, height=200 + 42 * len(variants)
    )
    return figure


def head_overlap(table: pd.DataFrame, layers: Sequence[int] | None = None) -> go.Figure:
    """Mean cosine of the principal angles between heads' output subspaces, a panel per layer (C5).

    Takes `HeadOverlapRow`s of one model; `layers` are those to show, else up to four spread over its
    depth. The diagonal (a head with itself) is left out.
    """
    _need(table, HeadOverlapRow)
    _single(table, "model", "head_overlap")
    shown = _pick(table.layer, layers)
    setting = _setting(table)
    figure = _panels(
        "Overlap of the heads' output subspaces", setting, [[f"layer {n}" for n in shown]], y="head"
    )
    off = table[table.head_a != table.head_b]
    heads = sorted({*table.head_a, *table.head_b})
    for col, layer in enumerate(shown, start=1):
        part = off[off.layer == layer]
        both = pd.concat([part, part.rename(columns={"head_a": "head_b", "head_b": "head_a"})])
        grid = both.pivot_table(index="head_a", columns="head_b", values="mean_cosine", aggfunc="mean")
        grid = grid.reindex(index=heads, columns=heads)
        trace = go.Heatmap(
            z=grid.to_numpy(),
            x=[str(h) for h in heads],
            y=[str(h) for h in heads],
            coloraxis="coloraxis",
            hoverongaps=False,
            hovertemplate="heads %{x} and %{y}: %{z:.3f}<extra></extra>",
        )
        figure.add_trace(trace, row=1, col=col)
    figure.update_xaxes(title_text="head", showgrid=False, constrain="domain", type="category")
    figure.update_yaxes(showgrid=False, autorange="reversed", type="category")
    top = float(off.mean_cosine.max()) if len(off) else 1.0
    bar = {"title": {"text": "mean cosine"}, "thickness": 14, "outlinewidth": 0}
    figure.update_layout(
        coloraxis={"colorscale": "Cividis", "cmin": 0, "cmax": top, "colorbar": bar}, height=390
    )
    return figure


def _panels(title: str, subtitle: str, titles: Sequence[Sequence[str]], y: str = "") -> go.Figure:
    """Empty panels in the house style, a list of titles per row; one panel alone has no title."""
    cols = max(len(row) for row in titles)
    alone = cols == 1 and len(titles) == 1
    figure = make_subplots(
        rows=len(titles),
        cols=cols,
        shared_yaxes=True,
        horizontal_spacing=0.06 / max(1, cols - 1) if cols > 1 else 0,
        vertical_spacing=0.12,
        subplot_titles=None if alone else [t for row in titles for t in [*row, *[""] * (cols - len(row))]],
    )
    top, bottom, plot = (112 if alone else 134), 64, 340 * len(titles)
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": title,
            "subtitle": {"text": subtitle},
            "x": 0.01,
            "xref": "container",
            "yref": "container",
        },
        title_y=0.97,
        height=plot + top + bottom,
        margin={"l": 76, "r": 24, "t": top, "b": bottom},
        legend={
            "orientation": "h",
            "x": 0,
            "y": 1 + (8 if alone else 30) / plot,
            "yanchor": "bottom",
            "tracegroupgap": 0,
        },
        meta={"min_width": _PANEL_WIDTH * cols if cols > 1 else 320},
    )
    if y:
        figure.update_yaxes(title_text=y, col=1)
    return figure


def _curve(
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
) -> None:
    """A site's line: mean of `y` at each `x`, with a band where several rows share an `x`."""
    stats = part.groupby(x)[y].agg(["mean", "min", "max"]).reset_index()
    color = _color(site)
    if dash == "solid" and (stats["max"] - stats["min"]).max() > 0:
        edge = {
            "x": [*stats[x], *stats[x][::-1]],
            "y": [*stats["max"], *stats["min"][::-1]],
        }
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        figure.add_trace(
            go.Scatter(
                **edge,
                fill="toself",
                fillcolor=f"rgba({red},{green},{blue},0.15)",
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                legendgroup=site,
            ),
            row=row,
            col=col,
        )
    known = {trace.name for trace in figure.data if trace.showlegend is not False}
    figure.add_trace(
        go.Scatter(
            x=stats[x],
            y=stats["mean"],
            mode="lines+markers" if markers and dash == "solid" else "lines",
            name=_label(site),
            legendgroup=site,
            showlegend=_label(site) not in known and dash == "solid",
            line={"color": color, "dash": dash, "width": 2.2},
            marker={"symbol": _MARKERS.get(site, "cross"), "size": 7, "color": color},
            hovertemplate=f"{_label(site)}<br>%{{x}}: %{{y:.3f}}<extra></extra>",
        ),
        row=row,
        col=col,
    )


def _level(figure: go.Figure, y: float, text: str, col: int, *, label: bool) -> None:
    note = {"text": text, "font": {"size": 12, "color": "#555"}} if label else None
    figure.add_hline(
        y=y,
        line={"color": _GREY, "dash": "dot", "width": 1.2},
        annotation=note,
        annotation_position="bottom right",
        row=1,
        col=col,
    )


def _setting(table: pd.DataFrame, *, tokens: bool = True, layers: bool = False, what: str = "") -> str:
    """Model, text, tokens and seeds of a table in a line, and what its bands are over."""
    parts = []
    for column, plural in (("model", "models"), ("corpus", "texts")):
        names = [str(n) for n in table[column].dropna().unique()]
        if names:
            parts.append(", ".join(names) if len(names) <= 4 else f"{len(names)} {plural}")
    if tokens and "n_tokens" in table and table.n_tokens.notna().any():
        low, high = int(table.n_tokens.min()), int(table.n_tokens.max())
        parts.append(f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens")
    if "seed" in table and table.seed.notna().any():
        seeds = sorted({int(s) for s in table.seed.dropna()})
        parts.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}")
    over = [n for n, c in (("layers", "layer"), ("texts", "corpus")) if table[c].nunique() > 1]
    over = [n for n in over if n == "texts" or layers]
    if what or over:
        parts.append(what or f"mean and range over {' and '.join(over)}")
    return " · ".join(parts)


def _need(table: pd.DataFrame, row_type: type) -> None:
    missing = [name for name in columns(row_type) if name not in table.columns]
    if missing:
        raise DataError(f"not a table of {row_type.__name__}: columns {', '.join(missing)} are missing")
    if table.empty:
        raise DataError(f"a table of {row_type.__name__} without rows cannot be drawn")


def _single(table: pd.DataFrame, column: str, builder: str) -> None:
    if table[column].nunique() > 1:
        names = ", ".join(str(n) for n in table[column].unique())
        raise DataError(f"{builder} draws one {column}, the table has {names}: choose one")


def _pick(layers: Iterable[int], wanted: Sequence[int] | None) -> list[int]:
    """The wanted layers that are there, or up to four spread evenly from the first to the last."""
    there = sorted({int(n) for n in layers})
    if wanted is not None:
        absent = [n for n in wanted if n not in there]
        if absent:
            raise unknown_name("layer of the table", absent[0], [str(n) for n in there])
        return list(wanted)
    if len(there) <= 4:
        return there
    return [there[round(i * (len(there) - 1) / 3)] for i in range(4)]


def _order(table: pd.DataFrame, column: str) -> list[str]:
    return [str(value) for value in table[column].unique()]


def _sites(table: pd.DataFrame) -> list[str]:
    there = _order(table, "site")
    return [s for s in COLORS if s in there] + sorted(s for s in there if s not in COLORS)


def _label(site: str) -> str:
    return SITE_LABELS.get(site, site)


def _color(site: str) -> str:
    # Any other hook gets a color by its name, so that it too keeps it from figure to figure.
    return COLORS.get(site) or _SPARE_COLORS[sum(site.encode()) % len(_SPARE_COLORS)]
