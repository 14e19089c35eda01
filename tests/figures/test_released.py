"""The figure of released dictionaries draws what its table holds."""

from __future__ import annotations

import pandas as pd
import pytest
from drawn import names_its_setting_and_refuses_other_tables
from made_up_beyond import released

from asi_lens.base.errors import DataError
from asi_lens.figures.released import released_dictionaries


def test_it_names_its_setting_and_refuses_other_tables() -> None:
    names_its_setting_and_refuses_other_tables(released_dictionaries, lambda: released([0.4, 0.1]))
    with pytest.raises(DataError, match="draws one corpus"):
        released_dictionaries(pd.concat([released([0.4]), released([0.4], corpus="wiki")]))


def test_every_dictionary_is_a_mark_at_its_rank() -> None:
    table = pd.concat([released([0.4, 0.1, 0.0]), released([0.2], d_sae=4096, start="asi")])
    figure = released_dictionaries(table)
    attention = [trace for trace in figure.data if trace.legendgroup == "attn_out"]
    dead, silent = attention
    assert list(dead.x) == pytest.approx([0.1, 0.2, 0.3, 0.1])
    assert [y**2 for y in dead.y] == pytest.approx([40, 10, 0, 20])
    assert [y**2 for y in silent.y] == pytest.approx([80, 20, 0, 40])
    assert (dead.xaxis, silent.xaxis) == ("x", "x2")
    assert list(dead.marker.symbol) == ["circle"] * 3 + ["circle-open"]
    assert dead.marker.size[3] > dead.marker.size[0], "larger for more features"
    assert "4,096 tokens" in str(figure.layout.annotations[0].text)
    assert "512 held-out tokens" in str(figure.layout.annotations[1].text)
    assert "start not random" in {trace.name for trace in figure.data}
    assert "start not random" not in {trace.name for trace in released_dictionaries(released([0.1])).data}
