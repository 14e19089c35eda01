"""Figures beyond the paper draw what their tables hold."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go
import pytest
from made_up_beyond import doses, inputs, starts

from asi_lens.base.errors import DataError
from asi_lens.figures import beyond

BUILDERS: list[tuple[Callable[[pd.DataFrame], go.Figure], Callable[[], pd.DataFrame]]] = [
    (beyond.death_at_start, lambda: starts(lambda name, gamma, rank: gamma / 3)),
    (beyond.dose_response, lambda: doses(lambda rank, dimension, head: 1 - rank)),
    (beyond.inputs_and_starts, lambda: inputs(lambda name, start, rank: 0.1 + 0.1 * (start == "ASI"))),
]


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_every_figure_names_its_setting_and_refuses_other_tables(build: Callable, table: Callable) -> None:
    figure, good = build(table()), table()
    assert figure.layout.title.subtitle.text.startswith("m · news")
    own = good.columns[-1]
    with pytest.raises(DataError, match=f"it has no column {own}"):
        build(good.drop(columns=own))
    with pytest.raises(DataError, match="has no rows"):
        build(good.iloc[:0])


def test_points_stand_at_gamma_and_at_rank() -> None:
    table = starts(lambda name, gamma, rank: gamma / 3 if name == "raw" else rank)
    figure = beyond.death_at_start(table)
    marks = [trace for trace in figure.data if trace.mode == "markers"]
    left, right = (next(t for t in marks if t.xaxis == axis) for axis in ("x", "x2"))
    assert list(left.y) == pytest.approx([100 * x / 3 for x in left.x])
    assert list(right.y) == pytest.approx([100 * x for x in right.x])
    (line,) = [trace for trace in figure.data if trace.mode == "lines"]
    assert list(line.x) == sorted(line.x)


def test_starts_are_lines_over_treatments() -> None:
    figure = beyond.inputs_and_starts(inputs(lambda name, start, rank: 0.2 if start == "random" else 0.1))
    lines = [t for t in figure.data if t.mode == "lines+markers" and t.xaxis == "x"]
    assert {t.name: set(t.y) for t in lines if t.yaxis == "y"} == {"random": {20.0}, "ASI": {10.0}}
    assert list(figure.layout.xaxis.ticktext) == ["raw", "mean", "geometric median", "power 0.5", "power 0"]


def test_changed_spectra_stand_at_each_measure_of_their_rank() -> None:
    figure = beyond.dose_response(doses(lambda rank, dimension, head: (1 - rank) / 2))
    joined = [t for t in figure.data if t.mode == "lines+markers"]
    assert [t.xaxis for t in joined] == ["x", "x2", "x3"]
    assert list(joined[0].x) == sorted(joined[0].x)
    assert list(joined[0].y) == pytest.approx([50 * (1 - x) for x in joined[0].x])
    assert max(joined[2].x) == pytest.approx(64 / 64), "participation ratio over the width"
    assert {t.name for t in figure.data if t.showlegend} >= {"last half lifted", "other sites, as they are"}
