"""Style of all figures: colors, markers, names, and subtitles computed from a table.

Colors are those of Okabe and Ito, which remain distinct under color blindness. A site, or a method of
training dictionaries, has the same color and marker in every figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import plotly.graph_objects as go

from asi_lens.base.errors import DataError, unknown_name
from asi_lens.base.sites import ALL as SITES
from asi_lens.results.rows import Row, columns

PLOTLY = "application/vnd.plotly.v1+json"
"""MIME type of a figure, which JupyterLab and VS Code draw."""
COLORS = {name: site.color for name, site in SITES.items()}
METHODS = {
    "random": ("#000000", "circle"),
    "random + AuxK": ("#E69F00", "square"),
    "ASI": ("#56B4E9", "diamond"),
    "ASI + sparse Adam": ("#CC79A7", "triangle-up"),
}
METHOD_COLORS = {name: tone for name, (tone, _) in METHODS.items()}
GREY = "#777777"
# Looks of other methods, assigned in order, so that no two methods of a figure look the same.
_SPARE_METHODS = (
    ("#8C6D00", "cross"),
    ("#009E73", "x"),
    ("#D55E00", "pentagon"),
    ("#0072B2", "star-diamond"),
    ("#777777", "hexagon"),
)
# Colors of other hooks. None is a site's.
_SPARE_COLORS = ("#882255", "#332288", "#000000", "#8C6D00")
_FONT = "Arial, Helvetica, Liberation Sans, DejaVu Sans, sans-serif"

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": _FONT, "size": 13, "color": "#222"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hoverlabel": {"font": {"family": _FONT}},
        "legend": {"font": {"size": 13}},
        **{
            axis: {
                "showline": True,
                "linecolor": "#444",
                "ticks": "outside",
                "tickcolor": "#444",
                "gridcolor": "#e8e8e8",
                "zeroline": False,
                "automargin": True,
                "title": {"standoff": 8, "font": {"size": 14}},
            }
            for axis in ("xaxis", "yaxis")
        },
    }
)


def setting(table: pd.DataFrame, *, tokens: bool = True, what: str = "") -> str:
    """Return a line with model, text, tokens and seeds of a table; `what` describes its marks."""
    parts = []
    for column, plural in (("model", "models"), ("corpus", "texts")):
        names = [str(name) for name in table[column].dropna().unique()]
        if names:
            parts.append(", ".join(names) if len(names) <= 4 else f"{len(names)} {plural}")
    if tokens and table.n_tokens.notna().any():
        low, high = int(table.n_tokens.min()), int(table.n_tokens.max())
        parts.append(f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens")
    if "seed" in table and table.seed.notna().any():
        seeds = sorted({int(seed) for seed in table.seed.dropna()})
        parts.append(f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}")
    return " · ".join([*parts, what] if what else parts)


def over(table: pd.DataFrame, *names: str) -> str:
    """Return "mean and range over layers" (all columns of `names` that vary), or "" if no column varies."""
    words = {"layer": "layers", "corpus": "texts", "seed": "seeds"}
    varying = [words[name] for name in names if table[name].nunique() > 1]
    return f"mean and range over {' and '.join(varying)}" if varying else ""


def need(table: pd.DataFrame, row_type: type[Row]) -> None:
    """Raise DataError unless `table` has rows and every column of `row_type`."""
    missing = [name for name in columns(row_type) if name not in table.columns]
    if missing:
        raise DataError(
            f"the table is not a table of {row_type.__name__}: it has no column {', '.join(missing)}"
        )
    if table.empty:
        raise DataError(f"the table of {row_type.__name__} has no rows, so there is nothing to draw")


def single(table: pd.DataFrame, column: str, builder: str) -> None:
    """Raise DataError if `column` has several values: the figure can show only one."""
    if table[column].nunique() > 1:
        names = ", ".join(str(name) for name in table[column].unique())
        raise DataError(f"{builder} draws one {column}; the table has {names}: select one")


def pick(layers: Iterable[int], wanted: Sequence[int] | None) -> list[int]:
    """Return the wanted layers, or up to four of `layers`, spread evenly from the first to the last.

    Raises UnknownNameError for a wanted layer that the table does not have.
    """
    there = sorted({int(layer) for layer in layers})
    if wanted is not None:
        for layer in wanted:
            if layer not in there:
                raise unknown_name("layer of the table", layer, [str(n) for n in there])
        return list(wanted)
    if len(there) <= 4:
        return there
    return [there[round(i * (len(there) - 1) / 3)] for i in range(4)]


def order(table: pd.DataFrame, column: str) -> list[str]:
    """Return the values of a column in order of first appearance."""
    return [str(value) for value in table[column].unique()]


def sites(table: pd.DataFrame) -> list[str]:
    """Return the sites of a table, in the order of every legend."""
    there = order(table, "site")
    return [site for site in COLORS if site in there] + sorted(site for site in there if site not in COLORS)


def label(site: str) -> str:
    """Return a site's label; a full hook name is returned as it is."""
    return SITES[site].label if site in SITES else site


def methods(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Return (color, marker) of each method of a table, in the order of every legend."""
    there = order(table, "method")
    spare = [method for method in there if method not in METHODS]
    known = {name: look for name, look in METHODS.items() if name in there}
    return known | {name: _SPARE_METHODS[i % len(_SPARE_METHODS)] for i, name in enumerate(spare)}


def marker(site: str) -> str:
    """Return a site's marker; other hooks have a cross."""
    return SITES[site].marker if site in SITES else "cross"


def color(site: str) -> str:
    """Return a site's color; the color of any other hook depends only on its name, in every figure."""
    return COLORS.get(site) or _SPARE_COLORS[sum(site.encode()) % len(_SPARE_COLORS)]


def left_margin(labels: Iterable[str]) -> int:
    """Return the width in pixels of the longest tick label, rather too wide than too narrow."""
    plain = [text.replace("<sub>", "").replace("</sub>", "") for text in labels]
    return round(24 + 7.28 * max(map(len, plain)))
