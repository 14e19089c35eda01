"""The house style of the figures: colors, markers, names, and what a table says about itself.

Colors are Okabe and Ito's, which stay apart under color blindness; a site has the same color and
marker in every figure, and so has a method of training dictionaries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import plotly.graph_objects as go

from asi_lens.base.errors import DataError, unknown_name
from asi_lens.base.sites import SITES
from asi_lens.results.rows import Row, columns

COLORS = {name: site.color for name, site in SITES.items()}
SITE_LABELS = {name: site.label for name, site in SITES.items()}
METHOD_COLORS = {
    "random": "#000000",
    "random + AuxK": "#E69F00",
    "ASI": "#56B4E9",
    "ASI + sparse Adam": "#CC79A7",
}
GREY = "#777777"
_METHOD_MARKERS = dict(zip(METHOD_COLORS, ("circle", "square", "diamond", "triangle-up"), strict=True))
# Other methods take these by order, so that no two of a figure look the same.
_SPARE_METHODS = (
    ("#8C6D00", "cross"),
    ("#009E73", "x"),
    ("#D55E00", "pentagon"),
    ("#0072B2", "star-diamond"),
    ("#777777", "hexagon"),
)
_SPARE_COLORS = ("#E69F00", "#56B4E9", "#000000", "#8C6D00")
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
    """Model, text, tokens and seeds of a table in a line, and `what` its marks are over."""
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
    """ "mean and range over layers", of the columns among `layer`, `corpus`, `seed` that vary; else ""."""
    words = {"layer": "layers", "corpus": "texts", "seed": "seeds"}
    varying = [words[name] for name in names if table[name].nunique() > 1]
    return f"mean and range over {' and '.join(varying)}" if varying else ""


def need(table: pd.DataFrame, row_type: type[Row]) -> None:
    """Raise DataError unless `table` has rows, and every column of `row_type`."""
    missing = [name for name in columns(row_type) if name not in table.columns]
    if missing:
        raise DataError(f"not a table of {row_type.__name__}: columns {', '.join(missing)} are missing")
    if table.empty:
        raise DataError(f"a table of {row_type.__name__} without rows cannot be drawn")


def single(table: pd.DataFrame, column: str, builder: str) -> None:
    """Raise DataError if `column` has several values, of which a figure can show one."""
    if table[column].nunique() > 1:
        names = ", ".join(str(name) for name in table[column].unique())
        raise DataError(f"{builder} draws one {column}, the table has {names}: choose one")


def pick(layers: Iterable[int], wanted: Sequence[int] | None) -> list[int]:
    """The wanted layers, or up to four spread evenly from the first to the last of those there are.

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
    """Values of a column in the order in which they come."""
    return [str(value) for value in table[column].unique()]


def sites(table: pd.DataFrame) -> list[str]:
    """Sites of a table, in the order of every legend."""
    there = order(table, "site")
    return [site for site in COLORS if site in there] + sorted(site for site in there if site not in COLORS)


def label(site: str) -> str:
    """A site in words; a full hook name stands for itself."""
    return SITE_LABELS.get(site, site)


def methods(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Color and marker of the methods of a table, in the order of every legend."""
    there = order(table, "method")
    spare = [method for method in there if method not in METHOD_COLORS]
    known = {name: (METHOD_COLORS[name], _METHOD_MARKERS[name]) for name in METHOD_COLORS if name in there}
    return known | {name: _SPARE_METHODS[i % len(_SPARE_METHODS)] for i, name in enumerate(spare)}


def marker(site: str) -> str:
    """A site's marker; any other hook has a cross."""
    return SITES[site].marker if site in SITES else "cross"


def color(site: str) -> str:
    """A site's color; any other hook has one by its name, so that it keeps it from figure to figure."""
    return COLORS.get(site) or _SPARE_COLORS[sum(site.encode()) % len(_SPARE_COLORS)]


def left_margin(labels: Iterable[str], size: int = 13) -> int:
    """Pixels that the longest of some tick labels needs, on the wide side."""
    plain = [text.replace("<sub>", "").replace("</sub>", "") for text in labels]
    return round(24 + 0.56 * size * max(map(len, plain)))
