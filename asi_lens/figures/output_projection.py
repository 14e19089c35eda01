"""Figures of the output projection: its effect on the rank under each change, and the heads' overlap."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go

from asi_lens.base.errors import DataError, require_known
from asi_lens.figures.parts import color_scale, heatmap, panels
from asi_lens.figures.style import COLORS, left_margin, need, order, pick, setting, single
from asi_lens.results.rows import VARIANTS, HeadOverlapRow, OutputProjectionRow

VARIANT_LABELS = {
    "z": "z, before W<sub>O</sub>",
    "attn_out": "attention output, z W<sub>O</sub>",
    "flat_spectrum": "W<sub>O</sub>, spectrum made flat",
    "random_orthogonal": "W<sub>O</sub> random orthogonal",
    "gaussian": "W<sub>O</sub> random Gaussian",
    "rotated_input": "z rotated at random",
    "isotropic_z": "z made white noise",
    "orthogonal_heads": "heads made orthogonal",
    "sum_of_heads": "sum of the heads' ranks",
}
# Groups of variants by the changed part, drawn with a gap between groups.
_GROUPS = (
    ("z", "attn_out"),
    ("flat_spectrum", "random_orthogonal", "gaussian"),
    ("rotated_input", "isotropic_z"),
    ("orthogonal_heads", "sum_of_heads"),
)

_WIDE_PANELS = 4


def wo_ablation(table: pd.DataFrame) -> go.Figure:
    """Draw the effective rank of attention's output under changes to W_O, its input or its heads (C4, C5).

    Takes `OutputProjectionRow`s. Each model has a panel, each variant a row (in the order of `VARIANTS`), and
    each layer a dot (mean over draws; the color is the depth). A bar and a number mark a row's mean; dashed
    lines mark the means before and after W_O.
    """
    need(table, OutputProjectionRow)
    require_known(table.variant.unique(), VARIANTS, "variant")
    models = order(table, "model")
    groups = [[v for v in group if (table.variant == v).any()] for group in _GROUPS]
    variants = [(v, -gap) for gap, group in enumerate(filter(None, groups)) for v in group]
    place = {variant: 0.5 * gap - row for row, (variant, gap) in enumerate(variants)}
    figure = panels(
        "What makes the collapse: the output projection and the overlap of heads",
        setting(table, what="a dot per layer, a bar at the mean"),
        [models],
        legend=False,
        left=left_margin(VARIANT_LABELS[variant] for variant in place),
        plot=round(30 - 38 * min(place.values())),
    )
    # Narrow panels need more room for a row's number.
    end = 1.12 if len(models) <= _WIDE_PANELS else 1.3
    for col, model in enumerate(models, start=1):
        dots = table[table.model == model].groupby(["variant", "layer"]).effective_rank_fraction.mean()
        for variant in place:
            if variant in dots.index.get_level_values("variant"):
                _strip(figure, dots[variant], place[variant], col, end, color=COLORS.get(variant))
    figure.update_yaxes(
        tickvals=list(place.values()),
        ticktext=[VARIANT_LABELS[variant] for variant in place],
        range=[min(place.values()) - 0.6, 0.6],
        showgrid=False,
        ticks="",
    )
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    figure.update_xaxes(title_text="effective rank / width", range=[0, end], tickvals=ticks)
    scale = color_scale("layer", 0, max(1, int(table.layer.max())), step=1)
    figure.update_layout(coloraxis=scale, margin_r=90)
    return figure


def head_overlap(table: pd.DataFrame, layers: Sequence[int] | None = None) -> go.Figure:
    """Draw the mean cosine of principal angles between heads' output subspaces, a panel per layer (C5).

    Takes `HeadOverlapRow`s of one model. `layers` are the layers to draw; by default up to four layers are
    spread over the model's depth. The diagonal (a head with itself) is left out. The subtitle states the
    chance level.
    """
    need(table, HeadOverlapRow)
    single(table, "model", "head_overlap")
    shown = pick(table.layer, layers)
    off = table[table.head_a != table.head_b]
    if off.empty:
        raise DataError("head_overlap: the model has one head, so there is no overlap to draw")
    chance = float(off.random_mean_cosine.mean())
    figure = panels(
        "Overlap of the heads' output subspaces",
        setting(table, what=f"random subspaces: {chance:.2f}"),
        [[f"layer {layer}" for layer in shown]],
        y="head",
        legend=False,
        left=60,
        plot=max(180, round(860 / len(shown))) if len(shown) > 2 else 340,
    )
    heads = sorted({*off.head_a, *off.head_b})
    mirrored = pd.concat([off, off.rename(columns={"head_a": "head_b", "head_b": "head_a"})])
    means = mirrored.groupby(["layer", "head_a", "head_b"]).mean_cosine.mean()
    for col, layer in enumerate(shown, start=1):
        cells = means[layer].unstack().reindex(index=heads, columns=heads)
        heatmap(figure, cells, col, gap=1, what="heads %{x} and %{y}", numbers=len(heads) <= 4)
    plain = {"showgrid": False, "type": "category", "ticks": "", "showline": False}
    figure.update_xaxes(title_text="head", **plain)
    figure.update_yaxes(autorange="reversed", **plain)
    scale = color_scale("mean<br>cosine", min(chance, means.min()), means.max(), step=0.05)
    figure.update_layout(coloraxis=scale, margin_r=100)
    return figure


def _strip(figure: go.Figure, dots: pd.Series, y: float, col: int, end: float, *, color: str | None) -> None:
    """Add a dot per layer at height `y`, a bar at the dots' mean, the mean before `end`, and a vertical line
    in `color`."""
    where = {"row": 1, "col": col}
    mean = float(dots.mean())
    # A fixed offset by depth separates the dots of 30 layers; random jitter would differ between runs.
    depth = dots.index.to_numpy()
    figure.add_scatter(
        x=dots.to_numpy(),
        y=y + 0.34 * (0.5 - depth / max(1, depth.max())),
        mode="markers",
        marker={
            "size": 7,
            "color": depth,
            "coloraxis": "coloraxis",
            "line": {"width": 0.5, "color": "white"},
        },
        customdata=depth,
        hovertemplate="layer %{customdata}: %{x:.3f}<extra></extra>",
        showlegend=False,
        **where,
    )
    figure.add_scatter(
        x=[mean, mean],
        y=[y - 0.36, y + 0.36],
        mode="lines",
        line={"color": "black", "width": 3},
        hovertemplate=f"mean over layers: {mean:.3f}<extra></extra>",
        showlegend=False,
        **where,
    )
    figure.add_annotation(x=end - 0.01, xanchor="right", y=y, text=f"{mean:.2f}", showarrow=False, **where)
    if color is not None:
        line = {"color": color, "width": 1.5, "dash": "dash"}
        figure.add_vline(x=mean, line=line, layer="below", **where)
