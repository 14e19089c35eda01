"""Parts of all figures of trained dictionaries: panels of `DeadFeatureRow`s, their titles and checks."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from asi_lens.base.errors import DataError
from asi_lens.figures.parts import curve, panels, strips
from asi_lens.figures.style import label, methods, need, over, setting, single, sites
from asi_lens.results.rows import Row

# Columns that identify a dictionary.
RUN = ["model", "corpus", "site", "layer", "method", "d_init", "d_sae", "k", "lr", "seed"]
FVU = "fraction of variance<br>unexplained"
# Held-out windows that differ by less are drawn as one: the share that sites leave out as massive rows.
_ALIKE = 0.01
DELTA = "loss with the reconstruction<br>minus without (nats / token)"


class Panel(NamedTuple):
    """A panel's title, the title of its y axis, and the column and rows that it shows."""

    title: str
    y: str
    rows: pd.DataFrame
    column: str


def check(table: pd.DataFrame, row_type: type[Row], builder: str, *one: str, swept: str = "") -> None:
    """Raise DataError if the table cannot be drawn as one figure.

    The table must have the columns of `row_type`, a single value in each column of `one`, and no two recipes
    with the same name. Recipes are different if they differ in an option other than `swept`.
    """
    need(table, row_type)
    for column in one:
        single(table, column, builder)
    for (method, *_), rows in table.groupby(["method", "site", "layer", "d_sae", "seed"]):
        for column in ("k", "lr", "optimizer", "aux_k", "d_init"):
            if column != swept:
                single(rows, column, f"{builder}, method {method!r},")


def ends(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the last rows of every run."""
    return rows[rows.tokens == rows.groupby(RUN, dropna=False).tokens.transform("max")]


def window_of(train: pd.DataFrame, *, whole: bool) -> int:
    """Return the largest window (tokens) that all runs end with.

    A window as long as a run is returned only if `whole`, or if there is no shorter window.
    """
    last_rows = ends(train)
    last = last_rows.tokens.min()
    shared = [set(rows.dead_window_tokens) for _, rows in last_rows.groupby(RUN, dropna=False)]
    fit = [w for w in set.intersection(*shared) if w <= last] if shared else []
    if not fit:
        raise DataError(
            "the training runs share no dead_window_tokens that is at most as long as every run; "
            "train them with one dead_window"
        )
    return int(max(fit if whole else [w for w in fit if w < last] or fit))


def dead_panel(train: pd.DataFrame, window: int, noun: str = "features") -> Panel:
    y = f"{noun} without a firing in<br>the last {window:,} tokens (%)"
    return Panel(f"Dead {noun}, training", y, train.assign(dead=100 * train.dead_fraction), "dead")


def held_out_panels(table: pd.DataFrame, builder: str, noun: str = "features") -> list[Panel]:
    """Return panels of the numbers measured on held-out text at the end of each run."""
    held = ends(table[table.split == "held_out"])
    window = _held_out_window(held, builder)
    y = f"{noun} without a firing in<br>{window} held-out tokens (%)"
    every = [
        Panel(f"Silent {noun}, held out", y, held.assign(silent=100 * held.dead_fraction), "silent"),
        Panel("FVU, held out", FVU, held[held.fvu.notna()], "fvu"),
        Panel("Δ LM loss, held out", DELTA, held[held.cross_entropy_delta.notna()], "cross_entropy_delta"),
    ]
    return [panel for panel in every if len(panel.rows)]


def _held_out_window(held: pd.DataFrame, builder: str) -> str:
    """Return the number of held-out tokens, or its range. Sites differ by their massive rows, left out."""
    low, high = held.dead_window_tokens.min(), held.dead_window_tokens.max()
    if high > (1 + _ALIKE) * low:
        single(held, "dead_window_tokens", builder)
    return " to ".join(f"{int(n):,}" for n in sorted({low, high})) if len(held) else ""


def grid(title: str, subtitle: str, rows: list[list[Panel]]) -> tuple[go.Figure, dict]:
    """Return a figure of empty panels with y axes, and the row and column of each panel by its title."""
    figure = panels(title, subtitle, [[p.title for p in row] for row in rows], shared_y=False, left=96)
    place = {panel.title: (i, j) for i, row in enumerate(rows, 1) for j, panel in enumerate(row, 1)}
    for panel in [panel for row in rows for panel in row]:
        row, col = place[panel.title]
        figure.update_yaxes(title_text=panel.y, row=row, col=col)
        if panel.column != "fvu":  # FVU differs little between methods; other axes include zero
            values = panel.rows[panel.column]
            low, high = min(0, values.min()), max(0, values.max())
            room = (high - low) or 1
            figure.update_yaxes(range=[low - 0.04 * room, low + 1.08 * room], row=row, col=col)
    return figure, place


def subtitle_of(table: pd.DataFrame, what: str, noun: str = "features") -> str:
    """Return the setting with sites, layers, sizes and length of training; `what` describes the marks."""
    layers = ", ".join(str(n) for n in sorted(table.layer.unique()))
    tokens = sorted({int(n) for n in ends(table).tokens})
    parts = [label(site) for site in sites(table) if table.site.nunique() == 1]
    parts.append(f"layer{'s' * (table.layer.nunique() > 1)} {layers}")
    parts += [f"{n:,} {noun}" for n in table.d_sae.unique() if table.d_sae.nunique() == 1]
    parts += [f"k = {n:g}" for n in table.k.dropna().unique() if table.k.nunique() == 1]
    parts.append(" to ".join(f"{n:,}" for n in dict.fromkeys([tokens[0], tokens[-1]])) + " training tokens")
    return setting(table, tokens=False, what=" · ".join([*parts, what] if what else parts))


def in_training(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """Return rows of the training split for curves, and the window of the first.

    First the rows of one window (the largest that is shorter than every run) from its end on, for dead
    features. Then one row per run and point, for numbers that the rows of all windows share.
    """
    train = table[table.split == "train"]
    window = window_of(train, whole=False)
    full = train[(train.dead_window_tokens == window) & (train.tokens >= window)]
    return full, train.drop_duplicates([*RUN, "tokens"]), window


def over_training(
    title: str, table: pd.DataFrame, curves: list[Panel], held: list[Panel], noun: str = "features"
) -> go.Figure:
    """Return a figure with a row of curves over training and a row of held-out numbers at its end."""
    subtitle = subtitle_of(table, over(table, "seed"), noun)
    figure, place = grid(title, subtitle, [curves, held] if held else [curves])
    end = table.tokens[table.split == "train"].max()
    figure.update_xaxes(title_text="training tokens", tickformat="~s", range=[0, 1.02 * end], row=1)
    for panel in curves:
        method_curves(figure, panel, "tokens", methods(table), *place[panel.title])
    for panel in held:
        strips(figure, panel.rows, panel.column, methods(table), *place[panel.title])
    return figure


def method_curves(figure: go.Figure, panel: Panel, x: str, looks: dict, row: int, col: int) -> None:
    """Add a line per method, with markers if there are few points."""
    few = panel.rows[x].nunique() <= 25
    for method, look in looks.items():
        line = panel.rows[panel.rows.method == method]
        if len(line):
            curve(figure, line, x, panel.column, method, row, col, markers=few, look=look)
