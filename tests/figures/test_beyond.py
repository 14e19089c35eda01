"""Figures beyond the paper draw what their tables hold."""

from __future__ import annotations

import pytest
from drawn import Builder, Table, names_its_setting_and_refuses_other_tables
from made_up_beyond import LIVES, inputs, lives, starts

from asi_lens.figures import beyond

BUILDERS: list[tuple[Builder, Table]] = [
    (beyond.death_at_start, lambda: starts(lambda name, gamma, rank: gamma / 3)),
    (beyond.lives, lambda: lives(lambda *_: 0.1, lambda *_: 0.2)),
    (beyond.inputs_and_starts, lambda: inputs(lambda name, start, rank: 0.1 + 0.1 * (start == "ASI"))),
]


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_every_figure_names_its_setting_and_refuses_other_tables(build: Builder, table: Table) -> None:
    names_its_setting_and_refuses_other_tables(build, table)


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


def test_survival_ends_a_window_before_the_end_and_fates_add_up() -> None:
    table = lives(lambda method, seed: 0.1 if "random" in method else 0.02, lambda *_: 0.2, back=0.05)
    figure = beyond.lives(table)
    by_method = [t for t in figure.data if t.xaxis == "x" and t.type == "scatter" and t.name]
    assert {t.name for t in by_method} == set(LIVES)
    for line in by_method:
        assert list(line.x) == list(range(100, 801, 100))
        assert line.y[-1] == pytest.approx(70 if "random" in line.name else 78), "100 % without all deaths"
    tenths = [t for t in figure.data if t.xaxis == "x2"]
    assert [t.name for t in tenths] == [f"tenth {i}" for i in range(1, 11)]
    assert [t.y[-1] for t in tenths] == sorted((t.y[-1] for t in tenths), reverse=True)
    assert tenths[0].line.color != tenths[-1].line.color
    bars = {t.name: list(t.y) for t in figure.data if t.type == "bar"}
    assert bars["never fired"] == pytest.approx([10, 10, 2, 2])
    assert bars["fired, then died"] == pytest.approx([20] * 4)
    assert bars["came back"] == pytest.approx([5] * 4)


def test_lives_without_tenths_leave_the_middle_empty() -> None:
    table = lives(lambda *_: 0.1, lambda *_: 0.2)
    figure = beyond.lives(table[table.tenth.isna()])
    assert not [t for t in figure.data if t.xaxis == "x2"]
