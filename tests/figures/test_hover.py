"""The text beside the pointer says where a point was measured, and on how much text."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
from made_up_ranks import ranks
from made_up_tables import curves

from asi_lens.figures import collapse, dead_features
from asi_lens.figures.hover import hover


def told(trace: Any, point: int) -> str:
    """The text of a point, with its own values in the place of the template's names."""
    own = [] if trace.customdata is None else trace.customdata[point]
    return re.sub(r"%\{customdata\[(\d+)\]\}", lambda found: own[int(found[1])], trace.hovertemplate)


def lines(figure: Any) -> list[Any]:
    return [trace for trace in figure.data if trace.hovertemplate and "tokens" in trace.hovertemplate]


def test_rank_curves_say_where_and_from_what() -> None:
    trace = lines(collapse.rank_curves(ranks()))[0]
    text = told(trace, 2)
    for part in ("m · on news", "4,096 tokens", "width 64", "99 % of the variance in 40 directions"):
        assert part in text, text
    assert text.startswith("<b>attention output</b><br>m · on news<br>")
    assert text.endswith("<br>layer %{x:,}: <b>%{y:.3f}</b><extra></extra>")


def test_several_texts_have_a_range() -> None:
    trace = lines(collapse.dimension_curves(ranks(corpora=("news", "code"))))[0]
    assert "on news, code" in trace.hovertemplate
    assert "effective rank / width 0.420 to 0.520" in told(trace, 2)


def test_dead_feature_curves_say_method_seeds_tokens_dead_and_fvu() -> None:
    figure = dead_features.dead_feature_curves(curves())
    trace = next(one for one in lines(figure) if one.name == "random")
    text = told(trace, 0)
    for part in (
        "m · on news",
        "layer 3 · seed 0 to 2",
        "<br>%{x:,} training tokens: <b>",
        "in 400 tokens",
        "FVU 0.3000 to 0.3200",
    ):
        assert part in text, text
    dot = next(one for one in figure.data if one.mode == "markers" and one.legendgroup == "random")
    assert "seed 1" in told(dot, 1)
    assert "no firing: 41.00 %" in told(dot, 1)
    assert "1,000 training tokens" in told(dot, 1)


def test_shared_values_stand_once_and_others_at_each_point() -> None:
    rows = pd.DataFrame({"x": [2, 1, 1], "y": [0.1, 0.2, 0.3], "model": "m", "seed": [5, 6, 7], "layer": 4})
    found = hover(rows, "x", "first")
    assert (
        found.template
        == "<b>first</b><br>m<br>layer 4 · %{customdata[0]}<br>%{x:,}: <b>%{y:.3f}</b><extra></extra>"
    )
    assert found.customdata == [["seed 6 to 7"], ["seed 5"]]
    assert hover(rows[:1], "x", "first").customdata is None


def test_what_was_not_measured_is_said_so() -> None:
    rows = pd.DataFrame(
        {"x": [1, 2], "y": [0.1, 0.2], "fvu": [0.5, np.nan], "dead_fraction": [np.nan, np.nan]}
    )
    found = hover(rows, "x", "first")
    assert found.customdata == [["FVU 0.5000"], ["FVU –"]]
    assert "firing" not in found.template
