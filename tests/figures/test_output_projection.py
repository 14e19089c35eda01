"""Figures of the output projection: the order of the story, and overlap without a head's own."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from made_up_ranks import overlaps, projections

from asi_lens.base.errors import DataError, UnknownNameError
from asi_lens.figures import output_projection
from asi_lens.figures.style import COLORS
from asi_lens.results.rows import VARIANTS


def test_variants_come_in_the_order_of_the_story() -> None:
    figure = output_projection.wo_ablation(projections())
    places = list(figure.layout.yaxis.tickvals)
    assert places == sorted(places, reverse=True)
    assert len(set(places)) == len(VARIANTS)
    assert list(figure.layout.yaxis.ticktext) == [output_projection.VARIANT_LABELS[v] for v in VARIANTS]
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    np.testing.assert_allclose(dots[0].x, [0.45, 0.46, 0.47], err_msg="the mean over draws, a dot per layer")
    lines = [shape.line.color for shape in figure.layout.shapes]
    assert lines == [COLORS["z"], COLORS["attn_out"]]


def test_some_variants_are_enough_and_unknown_ones_are_refused() -> None:
    figure = output_projection.wo_ablation(projections(("z", "attn_out", "gaussian")))
    assert len(figure.layout.yaxis.ticktext) == 3
    with pytest.raises(UnknownNameError, match="gaussian"):
        output_projection.wo_ablation(projections(("z",)).assign(variant="gausian"))


def test_head_overlap_is_symmetric_without_its_diagonal_and_tells_chance() -> None:
    figure = output_projection.head_overlap(overlaps())
    grid = np.array(figure.data[0].z, dtype=float)
    assert np.isnan(np.diag(grid)).all()
    np.testing.assert_allclose(grid[0, 1:], [0.1, 0.2])
    np.testing.assert_allclose(grid, grid.T)
    assert "random subspaces: 0.33" in figure.layout.title.subtitle.text
    with pytest.raises(DataError, match="one head"):
        output_projection.head_overlap(overlaps(n_heads=1))
    with pytest.raises(DataError, match="draws one model"):
        output_projection.head_overlap(pd.concat([overlaps(), overlaps().assign(model="n")]))
