"""Builders draw what their table holds, in the style that all figures share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from made_up_ranks import losses, overlaps, projections, ranks, spectra

from asi_lens.base.errors import DataError, UnknownNameError
from asi_lens.base.sites import SITES
from asi_lens.figures import collapse, output_projection
from asi_lens.figures.style import COLORS, color, pick

BUILDERS: list[tuple[Callable[..., go.Figure], Callable[..., pd.DataFrame]]] = [
    (collapse.rank_curves, ranks),
    (collapse.dimension_curves, ranks),
    (collapse.spectra, spectra),
    (collapse.rank_heatmap, ranks),
    (collapse.rank_vs_tokens, lambda: ranks(n_tokens=(512, 1024, 4096))),
    (collapse.downstream_loss, losses),
    (output_projection.wo_ablation, projections),
    (output_projection.head_overlap, overlaps),
]


def named(figure: go.Figure) -> dict[str, go.Scatter]:
    """Traces in the legend, by name."""
    return {trace.name: trace for trace in figure.data if trace.showlegend}


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_every_figure_names_its_setting_and_axes(build: Callable, table: Callable) -> None:
    figure = build(table())
    assert figure.layout.title.text
    subtitle = figure.layout.title.subtitle.text
    assert subtitle.startswith("m · news")
    if build is not collapse.rank_vs_tokens:  # there the tokens are an axis
        assert " tokens" in subtitle
    assert figure.layout.template.layout.paper_bgcolor == "white"
    if build is not collapse.rank_heatmap:  # texts name themselves
        assert all(axis.title.text for axis in figure.select_xaxes())
    assert figure.layout.meta["min_width"] >= 300
    assert figure.layout.width is None, "a page decides the width"


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_a_table_of_another_kind_or_without_rows_is_refused(build: Callable, table: Callable) -> None:
    good = table()
    with pytest.raises(DataError, match=f"has no column {good.columns[3]}"):
        build(good.drop(columns=good.columns[3]))
    with pytest.raises(DataError, match="has no rows"):
        build(good.iloc[:0])


def test_a_site_has_its_color_and_marker_everywhere() -> None:
    symbols: dict[str, set] = {}
    for figure in (collapse.rank_curves(ranks()), collapse.downstream_loss(losses())):
        for name, trace in named(figure).items():
            if name not in ("principal", "random"):
                symbols.setdefault(name, set()).add((trace.line.color, trace.marker.symbol))
    assert all(len(found) == 1 for found in symbols.values())
    assert len({next(iter(found)) for found in symbols.values()}) == len(symbols) == 4
    drawn = {trace.line.color for trace in named(collapse.spectra(spectra())).values()}
    assert drawn == {COLORS[name] for name in SITES}


def test_other_hooks_get_a_color_of_their_own_that_stays() -> None:
    table = ranks()
    table["site"] = table.site.replace("z", "blocks.0.hook_resid_mid")
    line = named(collapse.rank_curves(table))["blocks.0.hook_resid_mid"].line
    assert line.color == color("blocks.0.hook_resid_mid")
    others = {color(f"blocks.0.hook_{n}") for n in range(40)}
    assert len(others) == 4
    assert others.isdisjoint(COLORS.values()), "a site's color, cross-attention's included"


def test_rank_curves_draw_the_mean_and_range_over_texts() -> None:
    figure = collapse.rank_curves(ranks(models=("m", "n"), corpora=("news", "code")))
    attention = named(figure)["attention output"]
    np.testing.assert_allclose(attention.y, 0.45 + 0.01 * np.arange(6))
    band = next(t for t in figure.data if t.fill == "toself" and t.legendgroup == "attn_out")
    np.testing.assert_allclose([min(band.y), max(band.y)], [0.4, 0.55])
    assert "range over texts" in figure.layout.title.subtitle.text
    assert [note.text for note in figure.layout.annotations[:2]] == ["m", "n"]
    assert list(named(figure)) == [
        "attention output",
        "MLP output",
        "residual stream",
        "concatenated heads z",
    ]


def test_one_text_has_no_band() -> None:
    figure = collapse.rank_curves(ranks())
    assert not any(trace.fill for trace in figure.data)
    assert "range" not in figure.layout.title.subtitle.text


def test_the_papers_levels_are_marked_and_no_label_is_a_default() -> None:
    notes = [note.text for note in collapse.rank_curves(ranks(models=("m", "n"))).layout.annotations]
    assert "paper:<br>attention 0.6" in notes
    assert "new text" not in notes
    levels = {shape.y0 for shape in collapse.rank_curves(ranks()).layout.shapes}
    assert levels == {0.6, 0.9}


def test_spectra_choose_layers_and_refuse_absent_ones_and_two_texts() -> None:
    table = spectra(layers=tuple(range(10)))
    titles = [note.text for note in collapse.spectra(table).layout.annotations]
    assert titles == ["layer 0", "layer 3", "layer 6", "layer 9"]
    assert [n.text for n in collapse.spectra(table, layers=[2]).layout.annotations] == []
    with pytest.raises(UnknownNameError, match="11"):
        collapse.spectra(table, layers=[11])
    with pytest.raises(DataError, match="draws one corpus"):
        collapse.spectra(pd.concat([table, table.assign(corpus="code")]))
    assert pick([5, 1, 3], None) == [1, 3, 5]


def test_spectra_keep_a_row_per_model_with_its_own_layers() -> None:
    table = pd.concat([spectra((0, 1)), spectra((0, 5), models=("n",))])
    titles = [note.text for note in collapse.spectra(table).layout.annotations]
    assert titles == ["m, layer 0", "m, layer 1", "n, layer 0", "n, layer 5"]


def test_the_heatmap_holds_means_over_layers_and_leaves_gaps() -> None:
    table = ranks(models=("m", "n"), corpora=("news", "code"))
    table = table[~((table.model == "n") & (table.corpus == "code"))]
    figure = collapse.rank_heatmap(table)
    grid = figure.data[0].z
    np.testing.assert_allclose(grid[0], [0.525, 0.425])
    assert grid[1][0] == pytest.approx(0.525)
    assert np.isnan(grid[1][1])
    assert list(figure.data[0].y) == ["m", "n"]
    assert figure.layout.coloraxis.cmin <= 0.425
    assert figure.layout.coloraxis.cmax >= 0.825


def test_sample_size_marks_twenty_times_the_width() -> None:
    figure = collapse.rank_vs_tokens(ranks(n_tokens=(512, 4096)))
    assert [shape.x0 for shape in figure.layout.shapes] == [20 * 64]
    note = figure.layout.annotations[0]
    assert note.text == "20 d = 1,280"
    assert note.x == pytest.approx(np.log10(1280)), "plotly places notes of a log axis by the exponent"
    assert list(named(figure)["attention output"].x) == [512, 4096]


def test_principal_is_solid_random_is_dashed() -> None:
    figure = collapse.downstream_loss(losses())
    dashes = {t.line.dash for t in figure.data if t.legendgroup == "attn_out" and not t.fill}
    assert dashes == {"solid", "dash"}
    legend = named(figure)
    assert legend["principal"].line.dash == "solid"
    assert legend["random"].line.dash == "dash"
    np.testing.assert_allclose(legend["attention output"].y, [0.0, 0.6, 1.0])
    assert "seed 7" in figure.layout.title.subtitle.text


def test_what_is_cut_off_is_told() -> None:
    assert "not shown" not in collapse.downstream_loss(losses(-0.4)).layout.title.subtitle.text
    figure = collapse.downstream_loss(losses(-3.0))
    assert "12 points below −0.5 not shown" in figure.layout.title.subtitle.text
    assert figure.layout.yaxis.range[0] > -1


def test_rows_without_a_recovered_loss_are_left_out() -> None:
    table = losses()
    table.loc[table.site == "mlp_out", "loss_recovered"] = None
    assert "MLP output" not in named(collapse.downstream_loss(table))
    with pytest.raises(DataError, match="empty in every row"):
        collapse.downstream_loss(table.assign(loss_recovered=np.nan))


def test_more_sites_than_a_line_of_the_legend_holds_get_a_second_line() -> None:
    table = ranks()
    crossed = table.assign(site=table.site.map({"attn_out": "cross_attn_out", "z": "cross_z"}))
    both = collapse.rank_curves(pd.concat([table, crossed.dropna(subset="site")]))
    one = collapse.rank_curves(table)
    assert len(named(both)) == len(named(one)) + 2
    more = both.layout.margin.t - one.layout.margin.t
    assert more > 0
    assert both.layout.height == one.layout.height + more, "the panels keep their height"


def test_ranks_with_massive_rows_are_dashed_beside_those_without() -> None:
    table = ranks()
    mlp = table.site == "mlp_out"
    table.loc[mlp & (table.layer == 2), "rank_with_massive"] = 0.2
    (dashed,) = [trace for trace in collapse.rank_curves(table).data if trace.line.dash == "dash"]
    expected = table[mlp].effective_rank_fraction.to_numpy().copy()
    expected[2] = 0.2
    assert dashed.legendgroup == "mlp_out"
    assert list(dashed.y) == list(expected)


def test_dimensions_are_shares_of_the_width() -> None:
    figure = collapse.dimension_curves(ranks())
    assert {round(y, 6) for trace in figure.data if trace.y is not None for y in trace.y} == {40 / 64}
    assert {shape.y0 for shape in figure.layout.shapes} == {0.6}


def test_a_cut_is_drawn_at_the_directions_of_one_site() -> None:
    table = spectra(layers=(3,))
    own = table[table.site == "mlp_out"]
    figure = collapse.spectrum_cut(table, "mlp_out", 5)
    (line,) = figure.layout.shapes
    assert line.x0 == line.x1 == 5 / own.d.iloc[0]
    assert line.line.color == COLORS["mlp_out"]
    assert named(figure).keys() == named(collapse.spectra(table)).keys()
    assert f"5 of {own.d.iloc[0]}" in [note.text for note in figure.layout.annotations]
    with pytest.raises(DataError, match="the table has no site 'other'"):
        collapse.spectrum_cut(table, "other", 5)
    with pytest.raises(DataError, match="draws one layer"):
        collapse.spectrum_cut(spectra(layers=(0, 3)), "mlp_out", 5)
