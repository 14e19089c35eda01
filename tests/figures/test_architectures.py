"""Figures of architectures draw what their tables hold."""

from __future__ import annotations

import made_up_ranks
import made_up_tables
import pandas as pd
import pytest
from drawn import Builder, Table, names_its_setting_and_refuses_other_tables

from asi_lens.figures.architectures import overlap_by_layer, starts_by_architecture

BUILDERS: list[tuple[Builder, Table]] = [
    (starts_by_architecture, made_up_tables.curves),
    (overlap_by_layer, made_up_ranks.overlaps),
]


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_every_figure_names_its_setting_and_refuses_other_tables(build: Builder, table: Table) -> None:
    names_its_setting_and_refuses_other_tables(build, table)


def test_a_dot_per_seed_and_a_bar_at_the_mean() -> None:
    one = made_up_tables.curves(methods=("random", "ASI"))
    figure = starts_by_architecture(pd.concat([one, one.assign(model="n", dead_fraction=0.5)]))
    dots = {(t.name, t.xaxis, t.marker.symbol): t for t in figure.data if t.x[0] is not None}
    silent = dots["random", "x", None]
    assert list(silent.y) == pytest.approx([40, 41, 42, 50, 50, 50])
    assert [round(x) for x in silent.x] == [0, 0, 0, 1, 1, 1]
    assert list(dots["random", "x", "line-ew"].y) == pytest.approx([41, 50])
    assert set(silent.x).isdisjoint(dots["ASI", "x", None].x)
    assert list(dots["ASI", "x2", None].y) == pytest.approx([0.3] * 6)
    assert list(figure.layout.xaxis.ticktext) == ["m", "n"]


def test_overlap_is_drawn_beside_random_subspaces() -> None:
    table = made_up_ranks.overlaps()
    figure = overlap_by_layer(pd.concat([table, table.assign(model="n", mean_cosine=0.5)]))
    lines = {(t.name, t.xaxis): list(t.y) for t in figure.data}
    assert lines["heads", "x2"] == pytest.approx([0.5, 0.5])
    assert lines["random subspaces", "x"] == pytest.approx([0.33, 0.33])
    means = table.groupby("layer").mean_cosine.mean()
    assert lines["heads", "x"] == pytest.approx(list(means))
