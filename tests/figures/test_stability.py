"""Figures of stability draw what their tables hold."""

from __future__ import annotations

import pandas as pd
import pytest
from drawn import Builder, Table, names_its_setting_and_refuses_other_tables
from made_up_stability import matches, overlaps, transfer

from asi_lens.base.errors import DataError
from asi_lens.figures.stability import off_its_text, seed_matches, subspace_overlaps

KERNELS = {"half": 0.9, "text": 0.7, "layer": 0.4}
BUILDERS: list[tuple[Builder, Table]] = [
    (subspace_overlaps, lambda: overlaps(lambda against, layer: KERNELS[against])),
    (off_its_text, lambda: transfer(lambda text, inputs, seed: 0.3)),
    (seed_matches, lambda: matches(lambda method, tokens, i: 0.3)),
]


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_every_figure_names_its_setting_and_refuses_other_tables(build: Builder, table: Table) -> None:
    names_its_setting_and_refuses_other_tables(build, table)


def test_texts_stand_on_the_left_and_layers_on_the_right() -> None:
    table = overlaps(lambda against, layer: KERNELS[against] - 0.01 * layer)
    figure = subspace_overlaps(table)
    lines = {(t.name, t.xaxis): t for t in figure.data if t.mode == "lines+markers"}
    left = {"same text, next part", "code", "speech"}
    assert set(lines) == {*((name, "x") for name in left), ("another layer", "x2")}
    assert list(lines["code", "x"].y) == pytest.approx([0.7, 0.69, 0.68, 0.67])
    assert list(lines["another layer", "x2"].x) == [0, 1, 3], "not against itself"
    random = [t for t in figure.data if t.name == "random subspaces" and t.y[0] is not None]
    assert [set(t.y) for t in random] == [{0.25}, {0.25}]
    assert "layer 2" in str(figure.layout.annotations)
    with pytest.raises(DataError, match="draws one site"):
        subspace_overlaps(pd.concat([table, table.assign(site="mlp_out")]))


def test_many_texts_leave_room_for_the_legend() -> None:
    few = overlaps(lambda against, layer: 0.5)
    more = [few[few.other == "code"].assign(other=f"text {i}") for i in range(4)]
    figure, high = subspace_overlaps(few), subspace_overlaps(pd.concat([few, *more]))
    grown = high.layout.height - figure.layout.height
    assert grown > 0
    assert high.layout.margin.t - figure.layout.margin.t == grown, "the panels keep their size"


def test_overlaps_without_layers_are_drawn() -> None:
    table = overlaps(lambda against, layer: 0.5)
    assert "another layer" not in {t.name for t in subspace_overlaps(table[table.against != "layer"]).data}


def test_every_seed_is_a_mark_at_its_text() -> None:
    fvus = {"as they are": 0.5, "its own mean": 0.4, "rotated": 0.35}
    table = transfer(lambda text, inputs, seed: (0.2 if text == "news" else fvus[inputs]) + 0.01 * seed)
    figure = off_its_text(table)
    assert [t.name for t in figure.data if t.showlegend] == ["own text", *fvus]
    first = {t.name: t for t in figure.data if t.xaxis == "x"}
    assert list(first["own text"].y) == pytest.approx([0.2, 0.21])
    assert list(first["rotated"].y) == pytest.approx([0.35, 0.36])
    assert all(round(x) == 0 for x in first["own text"].x)
    assert all(round(x) == 1 for name in fvus for x in first[name].x)
    assert list(figure.layout.xaxis.ticktext) == ["news", "code"]


def test_matches_rise_from_start_to_end() -> None:
    table = matches(lambda method, tokens, i: 0.1 + 0.2 * (tokens > 0) * (1 + (method == "ASI")))
    figure = seed_matches(table)
    lines = {(t.name, t.xaxis): list(t.y) for t in figure.data if t.mode == "lines+markers"}
    assert lines["random", "x"] == pytest.approx([0.1, 0.3])
    assert lines["ASI", "x"] == pytest.approx([0.1, 0.5])
    assert lines["ASI", "x2"] == pytest.approx([0.5]), "nothing fired at the start of this table"
    assert lines["ASI", "x3"] == pytest.approx([5, 25])
    dashed = [t for t in figure.data if t.line.dash == "dash"]
    assert [list(t.y) for t in dashed] == [pytest.approx([0.11, 0.31]), pytest.approx([0.11, 0.51])]
    assert figure.layout.title.subtitle.text.endswith("seeds 0, 1, 2")
