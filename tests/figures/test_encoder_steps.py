"""The figure of encoder steps draws what its table holds."""

from __future__ import annotations

import pandas as pd
import pytest
from drawn import names_its_setting_and_refuses_other_tables
from made_up_beyond import encoder_steps as made_up

from asi_lens.base.errors import DataError
from asi_lens.figures.encoder_steps import encoder_steps


def table() -> pd.DataFrame:
    return made_up(lambda method, lr, overshoot, encoder_lr: (100 * lr / overshoot, 100 * lr * encoder_lr))


def test_it_names_its_setting_and_refuses_other_tables() -> None:
    names_its_setting_and_refuses_other_tables(encoder_steps, table)
    with pytest.raises(DataError, match="encoder_steps draws one layer"):
        encoder_steps(table().assign(layer=lambda rows: rows.seed))


def test_a_row_for_each_cell_and_a_column_for_each_number_and_rate() -> None:
    figure = encoder_steps(table())
    assert list(figure.layout.yaxis.ticktext) == [
        "norm 1, encoder rate 1",
        "norm 1, encoder rate 0.5",
        "norm 2, encoder rate 2",
        "norm 2, encoder rate 1",
    ]
    assert len(figure.data) == 8, "two numbers, two rates, two methods"
    marks = {(trace.name, trace.xaxis): trace for trace in figure.data}
    assert list(marks["ASI", "x"].x) == pytest.approx([10.05, 10.05, 5.05, 5.05])
    assert list(marks["ASI", "x"].error_x.array) == pytest.approx([0.05] * 4)
    assert list(marks["random", "x2"].x) == pytest.approx([20.05, 20.05, 10.05, 10.05])
    assert list(marks["ASI", "x3"].x) == pytest.approx([0.1, 0.05, 0.2, 0.1])
    assert [note.text for note in figure.layout.annotations][:4] == ["rate 0.001", "rate 0.002"] * 2
    assert (figure.layout.xaxis2.matches, figure.layout.xaxis4.matches) == ("x", "x3")
