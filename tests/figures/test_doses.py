"""Figures of doses and of known features draw what their tables hold."""

from __future__ import annotations

import pandas as pd
import pytest
from drawn import names_its_setting_and_refuses_other_tables
from made_up_beyond import doses, known

from asi_lens.figures.doses import dose_response, known_features


def test_figures_name_their_setting_and_refuse_other_tables() -> None:
    table = doses(lambda rank, dimension, head: 1 - rank)
    names_its_setting_and_refuses_other_tables(dose_response, lambda: table)


def test_changed_spectra_stand_at_each_measure_of_their_rank() -> None:
    first = doses(lambda rank, dimension, head: (1 - rank) / 2)
    second = first[first["shape"] != "other site"].assign(site="mlp_out")
    figure = dose_response(pd.concat([first, second]))
    powers = [t for t in figure.data if t.name == "powers"]
    assert [t.xaxis for t in powers] == ["x", "x2", "x3"]
    assert list(powers[0].y) == pytest.approx([50 * (1 - x) for x in powers[0].x])
    assert list(powers[0].error_y.array) == pytest.approx([0.1 * y for y in powers[0].y])
    assert max(powers[2].x) == pytest.approx(64 / 64), "participation ratio over the width"
    lines = [t for t in figure.data if t.mode == "lines"]
    assert list(lines[0].y) == pytest.approx([50 * (1 - x) for x in lines[0].x])
    names = {t.name for t in figure.data if t.showlegend}
    assert names >= {"last half lifted", "other sites, unchanged", "mlp_out 3, changed", "falling curve"}


def test_without_a_number_there_is_no_curve() -> None:
    table = doses(lambda rank, dimension, head: (1 - rank) / 2)
    lost = table.assign(dead_fraction=table.dead_fraction.where(table["shape"] != "measured"))
    assert not [t for t in dose_response(lost).data if t.mode == "lines"]


def test_known_features_by_rank_and_by_frequency() -> None:
    table = known(lambda method, r, fifth: r / 64 + 0.01 * (fifth or 0), lambda method, r: 1 / r)
    figure = known_features(table)
    lines = [t for t in figure.data if t.mode == "lines+markers"]
    assert {t.name for t in lines} == {"random", "ASI"}
    random = {t.xaxis: t for t in lines if t.name == "random"}
    assert list(random["x"].x) == [8, 16, 32]
    assert list(random["x"].y) == pytest.approx([12.5, 25, 50])
    assert list(random["x2"].y) == pytest.approx([100 / r + 0.5 for r in (8, 16, 32)])
    assert list(random["x3"].x) == [1, 2, 3, 4, 5]
