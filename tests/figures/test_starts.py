"""The figure of starts draws what its table holds."""

from __future__ import annotations

import pytest
from drawn import names_its_setting_and_refuses_other_tables
from made_up_beyond import tried

from asi_lens.base.errors import DataError
from asi_lens.figures.starts import starts_side_by_side

ENDS = {"random": (0.3, 0.4, 0.3), "ASI": (1.0, 0.05, 0.2), "data points": (0.9, 0.2, 0.25)}


def test_it_names_its_setting_and_refuses_other_tables() -> None:
    names_its_setting_and_refuses_other_tables(starts_side_by_side, lambda: tried(ENDS))
    two = tried(ENDS).assign(layer=lambda table: table.seed)
    with pytest.raises(DataError, match="draws one layer"):
        starts_side_by_side(two)


def test_starts_stand_in_the_order_of_their_silent_share() -> None:
    figure = starts_side_by_side(tried(ENDS))
    assert list(figure.layout.yaxis.ticktext) == ["ASI", "data points", "random"], "from below"
    silent, fvu, kl, inside, hollow, norm = (t for t in figure.data if not t.showlegend)
    assert list(silent.x) == pytest.approx([5.5, 20.5, 40.5])
    assert list(silent.error_x.array) == pytest.approx([0.5] * 3)
    assert list(fvu.x) == pytest.approx([0.2, 0.25, 0.3])
    assert list(kl.x) == pytest.approx([0.2] * 3)
    assert list(inside.x) == pytest.approx([110, 100, 40])
    assert list(hollow.x) == pytest.approx([100, 90, 30])
    assert hollow.xaxis == inside.xaxis
    assert list(norm.x) == pytest.approx([0.55] * 3)


def test_numbers_that_were_not_measured_have_no_column() -> None:
    figure = starts_side_by_side(tried(ENDS).assign(kl=float("nan")))
    titles = [axis.title.text for axis in figure.select_xaxes()]
    assert len(titles) == 4
    assert not any("KL" in title for title in titles)
