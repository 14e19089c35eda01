"""Figures of architectures draw what their tables hold."""

from __future__ import annotations

import made_up_ranks
import made_up_tables
import pandas as pd
import pytest
from drawn import Builder, Table, names_its_setting_and_refuses_other_tables

from asi_lens.figures.architectures import overlap_by_layer, starts_by_architecture, with_cross
from asi_lens.figures.output_projection import wo_ablation

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


def test_cross_attention_has_a_panel_beside_its_decoders_own() -> None:
    own, heads = made_up_ranks.projections(), made_up_ranks.overlaps()
    own = pd.concat([own.assign(model="other"), own])
    figure = wo_ablation(with_cross(own, own[own.model == "m"].assign(effective_rank_fraction=0.9)))
    panels = [one.text for one in figure.layout.annotations[:2]]
    assert panels == ["m", "m (cross-attention)"], "a model without cross-attention has none"
    lines = overlap_by_layer(with_cross(heads, heads.assign(mean_cosine=0.5))).data
    assert [list(line.y) for line in lines if line.xaxis == "x2" and line.name == "heads"] == [[0.5, 0.5]]


def test_a_decoder_has_two_places_among_the_starts() -> None:
    one = made_up_tables.curves(methods=("random", "ASI"))
    both = pd.concat([one, one.assign(site="cross_attn_out", dead_fraction=0.5)])
    figure = starts_by_architecture(both)
    assert list(figure.layout.xaxis.ticktext) == ["m", "m<br>(cross-attention)"]
    (silent, *_) = (t for t in figure.data if t.name == "random" and t.xaxis == "x")
    assert list(silent.y) == pytest.approx([40, 41, 42, 50, 50, 50])
