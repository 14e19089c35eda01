"""What the tests of figures share."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go
import pytest

from asi_lens.base.errors import DataError

Builder = Callable[[pd.DataFrame], go.Figure]
Table = Callable[[], pd.DataFrame]


def names_its_setting_and_refuses_other_tables(build: Builder, table: Table) -> None:
    """A figure of a made-up table says of what it is; a table that lacks a column or all rows is refused."""
    figure, good = build(table()), table()
    assert figure.layout.title.subtitle.text.startswith("m · news")
    own = good.columns[-1]
    with pytest.raises(DataError, match=f"it has no column {own}"):
        build(good.drop(columns=own))
    with pytest.raises(DataError, match="has no rows"):
        build(good.iloc[:0])
