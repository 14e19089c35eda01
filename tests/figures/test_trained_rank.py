"""Figures of rank and loss draw what their tables hold."""

from __future__ import annotations

import pandas as pd
import pytest
from drawn import Builder, Table, names_its_setting_and_refuses_other_tables
from made_up_trained_rank import NAMES, trained_ranks

from asi_lens.base.errors import DataError
from asi_lens.figures.trained_rank import final_rank_and_loss, rank_over_training

RANKS = {name: 0.5 + 0.1 * i for i, name in enumerate(NAMES)}


def table() -> pd.DataFrame:
    return trained_ranks(
        lambda name, seed: RANKS[name] + seed / 100, lambda name, seed: 5 - RANKS[name] + seed
    )


BUILDERS: list[tuple[Builder, Table]] = [(rank_over_training, table), (final_rank_and_loss, table)]


@pytest.mark.parametrize(("build", "made"), BUILDERS)
def test_every_figure_names_its_setting_and_refuses_other_tables(build: Builder, made: Table) -> None:
    names_its_setting_and_refuses_other_tables(build, made)
    with pytest.raises(DataError, match="draws one corpus"):
        build(pd.concat([made(), made().assign(corpus="code")]))


def test_curves_are_means_over_layers_and_seeds() -> None:
    figure = rank_over_training(table())
    lines = {(t.name, t.xaxis): t for t in figure.data if t.mode == "lines+markers"}
    assert set(lines) == {(name, axis) for name in NAMES for axis in ("x", "x2", "x3")}
    assert list(lines["muon", "x3"].x) == [0, 500, 1000]
    assert list(lines["muon", "x3"].y) == pytest.approx([0.9, 0.71, 0.71])
    # The start, where every loss is that of equal guesses, would flatten the rest.
    assert list(lines["muon", "x"].x) == [500, 1000]
    assert lines["muon", "x"].y[-1] == pytest.approx(5 - 0.7 + 1)
    assert list(lines["muon", "x2"].y) == pytest.approx([0, -0.2]), "of the same seed"
    bands = [t for t in figure.data if t.fill == "toself" and t.legendgroup == "muon"]
    assert {(round(min(t.y), 3), round(max(t.y), 3)) for t in bands if t.xaxis == "x3"} == {(0.7, 0.9)}


def test_without_a_baseline_there_are_no_differences() -> None:
    rest = table()[lambda t: t.variant != "baseline"]
    assert {t.xaxis for t in rank_over_training(rest).data} == {"x", "x3"}
    assert not [t for t in final_rank_and_loss(rest).data if t.xaxis == "x2" and pd.notna(t.y).any()]


def test_a_released_model_is_a_dotted_line() -> None:
    values = {"model": "released", "corpus": "news", "site": "attn_out", "d": 8, "n_tokens": 99}
    values |= {"effective_rank": 4.0, "intrinsic_dimension_99": 6, "participation_ratio": 2.0}
    more = {"stable_rank": 2.0, "n_left_out": 0, "rank_with_massive": None}
    rows = [{**values, **more, "layer": i, "effective_rank_fraction": 0.3 + 0.2 * i} for i in (0, 1)]
    figure = rank_over_training(table(), pd.DataFrame(rows))
    (line,) = figure.layout.shapes
    assert line.y0 == line.y1 == pytest.approx(0.4)
    assert (line.xref, line.yref) == ("x3 domain", "y3")
    assert figure.layout.title.subtitle.text.endswith("mean and range over seeds · dotted: released")
    assert "dotted" not in rank_over_training(table()).layout.title.subtitle.text


def test_every_seed_is_a_mark() -> None:
    figure = final_rank_and_loss(table())
    marks = {(t.name, t.xaxis): t for t in figure.data}
    assert set(marks) == {(name, "x") for name in NAMES} | {(name, "x2") for name in NAMES[1:]}
    assert list(marks["gate", "x"].x) == pytest.approx([0.6, 0.61, 0.62])
    assert list(marks["gate", "x"].y) == pytest.approx([4.4, 5.4, 6.4])
    assert list(marks["gate", "x2"].x) == pytest.approx([0.1] * 3)
    assert list(marks["gate", "x2"].y) == pytest.approx([-0.1] * 3)
    looks = {(t.marker.symbol, t.marker.color) for t in figure.data}
    assert len(looks) == len(NAMES)
