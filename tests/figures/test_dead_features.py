"""Figures of trained dictionaries draw what their table holds, and no dead feature without its window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from made_up_tables import END, PAPERS, SEEDS, curves, ranked, rates, row, sizes, sweep

from asi_lens.base.errors import DataError
from asi_lens.figures import dead_features
from asi_lens.figures.parts import in_lines
from asi_lens.figures.style import COLORS, METHOD_COLORS
from asi_lens.results.rows import frame

Builder = Callable[[pd.DataFrame], go.Figure]
BUILDERS: list[tuple[Builder, Callable[[], pd.DataFrame]]] = [
    (dead_features.dead_feature_curves, curves),
    (dead_features.d_init_sweep, sweep),
    (dead_features.dictionary_size, sizes),
    (dead_features.layers_and_sites, ranked),
    (dead_features.learning_rates, rates),
]
TRAINING = "features without a firing in<br>the last {} tokens (%)"
HELD_OUT = "features without a firing in<br>4,096 held-out tokens (%)"
DELTA = "loss with the reconstruction<br>minus without (nats / token)"
FVU = "fraction of variance<br>unexplained"


def named(figure: go.Figure) -> dict[str, go.Scatter]:
    """Traces in the legend, by name."""
    return {trace.name: trace for trace in figure.data if trace.showlegend}


def y_titles(figure: go.Figure) -> list[str]:
    return [axis.title.text for axis in figure.select_yaxes()]


def traces(figure: go.Figure, group: str, panel: int) -> list[go.Scatter]:
    """Traces of a site or method in a panel, counted from 1 as plotly counts axes."""
    axis = "y" if panel == 1 else f"y{panel}"
    return [t for t in figure.data if t.legendgroup == group and (t.yaxis or "y") == axis]


def line(figure: go.Figure, group: str, panel: int) -> go.Scatter:
    return next(t for t in traces(figure, group, panel) if not t.fill)


# --- every figure -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_every_figure_names_its_setting_its_axes_and_its_window(build: Builder, table: Callable) -> None:
    figure = build(table())
    assert figure.layout.title.text
    subtitle = figure.layout.title.subtitle.text
    assert subtitle.startswith("m · news")
    assert "k = 8 · 1,000 training tokens" in subtitle
    assert all(axis.title.text or axis.tickvals for axis in figure.select_xaxes())
    assert any("4,096 held-out tokens (%" in (title or "") for title in y_titles(figure))
    assert figure.layout.meta["min_width"] >= 300
    assert figure.layout.width is None, "a page decides the width"


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_a_table_of_another_kind_or_without_rows_is_refused(build: Builder, table: Callable) -> None:
    good = table()
    with pytest.raises(DataError, match="has no column layer"):
        build(good.drop(columns="layer"))
    with pytest.raises(DataError, match="has no rows"):
        build(good.iloc[:0])


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_one_model_and_one_text_are_drawn(build: Builder, table: Callable) -> None:
    for column in ("model", "corpus"):
        two = pd.concat([table(), table().assign(**{column: "other"})])
        with pytest.raises(DataError, match=f"{build.__name__} draws one {column}"):
            build(two)


@pytest.mark.parametrize(
    "build", [dead_features.dead_feature_curves, dead_features.dictionary_size, dead_features.learning_rates]
)
@pytest.mark.parametrize(("column", "value"), [("site", "mlp_out"), ("layer", 4)])
def test_curves_and_sizes_are_of_one_layer_and_site(build: Builder, column: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"draws one {column}"):
        build(pd.concat([curves(), curves().assign(**{column: value})]))


@pytest.mark.parametrize(("build", "table"), [BUILDERS[i] for i in (0, 1, 3, 4)])
def test_only_its_own_figure_mixes_sizes(build: Builder, table: Callable) -> None:
    with pytest.raises(DataError, match="draws one d_sae"):
        build(pd.concat([table(), table().assign(d_sae=128)]))


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_two_recipes_under_one_name_are_refused(build: Builder, table: Callable) -> None:
    column, value = ("k", 9) if build is dead_features.learning_rates else ("lr", 0.1)
    with pytest.raises(DataError, match=f"method 'ASI', draws one {column}"):
        build(pd.concat([table(), table()[lambda t: t.method == "ASI"].assign(**{column: value})]))


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_held_out_shares_of_two_windows_are_refused(build: Builder, table: Callable) -> None:
    two = table()
    two.loc[two.index[-1], "dead_window_tokens"] = 8192
    with pytest.raises(DataError, match="draws one dead_window_tokens"):
        build(two)


@pytest.mark.parametrize(("build", "table"), BUILDERS)
def test_sites_that_left_out_some_massive_rows_are_drawn_together(build: Builder, table: Callable) -> None:
    two = table()
    held = two.index[two.split == "held_out"]
    two.loc[held, "dead_window_tokens"] = 4096
    two.loc[held[-1], "dead_window_tokens"] = 4090
    assert any("4,090 to 4,096 held-out tokens" in (title or "") for title in y_titles(build(two)))


def test_a_method_has_its_color_and_marker_everywhere() -> None:
    looks: dict[str, set] = {}
    for figure in (dead_features.dead_feature_curves(curves()), dead_features.dictionary_size(sizes())):
        for name, trace in named(figure).items():
            looks.setdefault(name, set()).add((trace.line.color, trace.marker.symbol))
    assert {name: color for name, [(color, _)] in looks.items()} == METHOD_COLORS
    assert len({symbol for [(_, symbol)] in looks.values()}) == len(METHOD_COLORS)
    # In the order of the legend, whatever the table's.
    shuffled = curves(("ASI", "orthogonal", "random"))
    assert list(named(dead_features.dead_feature_curves(shuffled))) == ["random", "ASI", "orthogonal"]


def test_methods_look_like_no_site_of_a_dictionary_and_other_methods_like_no_other() -> None:
    assert not set(METHOD_COLORS.values()) & {COLORS[s] for s in ("attn_out", "mlp_out", "resid_post")}
    others = ("orthogonal", "low rank", "random", "ASI")
    found = named(dead_features.dead_feature_curves(curves(others)))
    assert len({(trace.line.color, trace.marker.symbol) for trace in found.values()}) == 4
    assert not {found[name].line.color for name in others[:2]} & set(METHOD_COLORS.values())


# --- dead_feature_curves ----------------------------------------------------------------------------


def test_curves_draw_means_and_ranges_over_seeds_from_the_window_on() -> None:
    figure = dead_features.dead_feature_curves(curves())
    assert y_titles(figure) == [TRAINING.format(400), FVU, HELD_OUT, DELTA]
    band, dead = traces(figure, "random", 1)
    assert list(dead.x) == [400, 600, 800, 1000], "nothing can be dead before the window has passed"
    np.testing.assert_allclose(dead.y, 41)
    assert (min(band.y), max(band.y)) == pytest.approx((40, 42))
    band, fvu = traces(figure, "random", 2)
    assert list(fvu.x) == [200, 400, 600, 800, 1000]
    np.testing.assert_allclose(fvu.y[1:], 0.31)
    assert figure.layout.xaxis.range[0] == 0
    assert "mean and range over seeds" in figure.layout.title.subtitle.text
    assert "attention output · layer 3 · 64 features" in figure.layout.title.subtitle.text


def test_fvu_is_shown_from_the_second_half_and_a_cut_is_told() -> None:
    figure = dead_features.dead_feature_curves(curves())
    low, high = figure.layout.yaxis2.range
    assert low < 0.3
    assert 0.32 < high < 0.33
    assert "FVU, training batches, start cut off" in [note.text for note in figure.layout.annotations]
    table = curves()
    whole = dead_features.dead_feature_curves(table[~((table.split == "train") & (table.tokens == 200))])
    assert "FVU, training batches" in [note.text for note in whole.layout.annotations]


def test_the_ends_of_curves_have_a_dot_per_seed_and_a_bar_at_the_mean() -> None:
    figure = dead_features.dead_feature_curves(curves())
    for panel, dots, mean, number in ((3, [40, 41, 42], 41, "41"), (4, [0.1, 0.11, 0.12], 0.11, "0.11")):
        bar, seeds = traces(figure, "random", panel)
        np.testing.assert_allclose(seeds.y, dots)
        assert [told[0] for told in seeds.customdata] == [f"seed {seed}" for seed in SEEDS]
        assert len(set(seeds.x)) == 3
        np.testing.assert_allclose(bar.y, mean)
        assert bar.text[1].strip("\u00a0") == number
    assert list(figure.layout.xaxis3.ticktext) == [
        "random",
        "random<br>+ AuxK",
        "ASI",
        "ASI<br>+ sparse Adam",
    ]
    assert in_lines("ASI + sparse Adam", among=6) == "ASI<br>+ sparse<br>Adam"


def test_one_seed_has_no_band() -> None:
    figure = dead_features.dead_feature_curves(curves(seeds=(0,)))
    assert not any(trace.fill for trace in figure.data)
    assert "range" not in figure.layout.title.subtitle.text


def test_the_window_is_the_largest_within_every_run() -> None:
    figure = dead_features.dead_feature_curves(curves(windows=(100,)))
    assert y_titles(figure)[0] == TRAINING.format(100)
    np.testing.assert_allclose(line(figure, "ASI", 1).y, 6)
    # A window as long as training leaves one point: better than none.
    assert y_titles(dead_features.dead_feature_curves(curves(windows=(END,))))[0] == TRAINING.format("1,000")
    figure = dead_features.dead_feature_curves(curves(windows=(400, END)))
    assert y_titles(figure)[0] == TRAINING.format(400)
    one_each = pd.concat([curves(("random",), (100,)), curves(("ASI",), (400,))])
    for table in (curves(windows=(2000,)), one_each, curves()[lambda t: t.split == "held_out"]):
        with pytest.raises(DataError, match="share no dead_window_tokens"):
            dead_features.dead_feature_curves(table)


def test_what_was_not_measured_has_no_panel() -> None:
    table = curves()
    figure = dead_features.dead_feature_curves(table.assign(cross_entropy_delta=np.nan))
    assert y_titles(figure) == [TRAINING.format(400), FVU, HELD_OUT]
    figure = dead_features.dead_feature_curves(table.assign(fvu=np.nan, cross_entropy_delta=np.nan))
    assert y_titles(figure) == [TRAINING.format(400), HELD_OUT]
    figure = dead_features.dead_feature_curves(table[table.split == "train"])
    assert y_titles(figure) == [TRAINING.format(400), FVU]
    table.loc[table.method == "ASI", "cross_entropy_delta"] = np.nan
    figure = dead_features.dead_feature_curves(table)
    assert traces(figure, "ASI", 3)
    assert not traces(figure, "ASI", 4)
    assert traces(figure, "random", 4)


# --- d_init_sweep -----------------------------------------------------------------------------------


def test_the_sweep_draws_means_over_layers_by_site() -> None:
    figure = dead_features.d_init_sweep(sweep())
    assert y_titles(figure) == [HELD_OUT, FVU, DELTA]
    legend = "attention output, MLP output, random initialization, automatic d_init"
    assert ", ".join(named(figure)) == legend
    band, silent, _, _ = traces(figure, "attn_out", 1)
    assert list(silent.x) == [8, 16, 32]
    np.testing.assert_allclose(silent.y, [2.8, 3.6, 5.2])
    assert (min(band.y), max(band.y)) == pytest.approx((1.8, 6.2))
    assert silent.line.color == COLORS["attn_out"]
    assert "mean and range over layers" in figure.layout.title.subtitle.text
    assert figure.layout.xaxis.type == "log"
    assert list(figure.layout.xaxis.ticktext) == ["32", "16", "8"]


def test_the_sweep_marks_the_random_start_and_the_automatic_choice() -> None:
    figure = dead_features.d_init_sweep(sweep())
    *_, dashed, stars = traces(figure, "mlp_out", 1)
    np.testing.assert_allclose(dashed.y, 22)
    assert (dashed.line.dash, dashed.line.color) == ("dash", COLORS["mlp_out"])
    np.testing.assert_allclose(np.log10(dashed.x), figure.layout.xaxis.range)
    assert list(stars.x) == [21, 23]
    np.testing.assert_allclose(stars.y, 1)
    assert stars.marker.symbol == "star"
    assert list(stars.text) == ["layer 1, seed 0", "layer 3, seed 0"]
    np.testing.assert_allclose(traces(figure, "mlp_out", 2)[-2].y, 0.6)
    alone = dead_features.d_init_sweep(sweep(("ASI",)))
    assert list(named(alone)) == ["attention output", "MLP output"]


def test_the_sweep_leaves_out_what_was_not_measured_and_refuses_two_methods() -> None:
    figure = dead_features.d_init_sweep(sweep().assign(cross_entropy_delta=np.nan))
    assert y_titles(figure) == [HELD_OUT, FVU]
    with pytest.raises(DataError, match="draws one method"):
        dead_features.d_init_sweep(pd.concat([sweep(), frame([row("ASI + sparse Adam")])]))
    with pytest.raises(DataError, match="no held_out row with a d_init"):
        dead_features.d_init_sweep(sweep(("random", "ASI, automatic d_init")))


# --- dictionary_size --------------------------------------------------------------------------------


def test_sizes_are_compared_at_the_end_in_the_largest_window_of_all() -> None:
    figure = dead_features.dictionary_size(sizes())
    assert y_titles(figure) == [TRAINING.format(400), HELD_OUT, FVU, DELTA]
    band, dead = traces(figure, "random", 1)
    assert list(dead.x) == [64, 128, 256]
    np.testing.assert_allclose(dead.y, [6.9, 13.3, 26.1])
    assert (min(band.y), max(band.y)) == pytest.approx((6.4, 26.6))
    np.testing.assert_allclose(line(figure, "random + AuxK", 2).y, 10)
    assert sorted(figure.layout.xaxis4.tickvals) == pytest.approx([64, 128, 256])
    assert list(named(figure)) == list(PAPERS)
    assert "features" not in figure.layout.title.subtitle.text


def test_sizes_may_be_measured_in_part() -> None:
    table = sizes()
    assert y_titles(dead_features.dictionary_size(table[table.split == "train"])) == [TRAINING.format(400)]
    held_out = table[table.split == "held_out"].assign(cross_entropy_delta=np.nan)
    assert y_titles(dead_features.dictionary_size(held_out)) == [HELD_OUT, FVU]
    one = table[table.d_sae == 64]
    assert y_titles(dead_features.dictionary_size(one))[0] == TRAINING.format("1,000")


# --- learning_rates ---------------------------------------------------------------------------------


def test_a_method_is_drawn_over_its_learning_rates() -> None:
    figure = dead_features.learning_rates(rates())
    assert y_titles(figure) == [TRAINING.format(400), HELD_OUT, FVU, DELTA]
    assert list(line(figure, "random", 1).x) == [2e-4, 1e-3]
    np.testing.assert_allclose(line(figure, "random", 1).y, [8, 40])
    assert sorted(figure.layout.xaxis.ticktext) == ["0.0002", "0.001"]
    assert list(named(figure)) == list(PAPERS)


def test_a_method_with_one_learning_rate_has_a_bar_of_its_seeds() -> None:
    table = rates()
    table = table[(table.method != "random") | (table.lr == 1e-3)].copy()
    table.loc[table.seed == table.seed.max(), "fvu"] += 0.02
    figure = dead_features.learning_rates(table)
    [mark] = traces(figure, "random", 3)  # no band
    fvu = table[(table.method == "random") & (table.split == "held_out")].fvu
    ends = [mark.y[0] + mark.error_y.array[0], mark.y[0] - mark.error_y.arrayminus[0]]
    np.testing.assert_allclose(ends, [fvu.max(), fvu.min()])
    for trace in traces(figure, "ASI", 3):
        assert trace.error_y.array is None


# --- layers_and_sites -------------------------------------------------------------------------------


def test_layers_stand_at_their_rank_and_square_root() -> None:
    figure = dead_features.layers_and_sites(ranked())
    [marks] = traces(figure, "attn_out", 1)
    np.testing.assert_allclose(marks.x, [0.51, 0.53])
    np.testing.assert_allclose(np.square(marks.y), [37, 39])
    np.testing.assert_allclose(marks.customdata, [37, 39])
    assert [int(layer) for layer in marks.text] == [1, 3]
    assert (marks.marker.color, marks.marker.symbol) == (COLORS["attn_out"], "circle")
    axis = figure.layout.yaxis
    assert axis.title.text == HELD_OUT.replace("(%)", "(%, √ axis)")
    np.testing.assert_allclose(np.square(axis.tickvals), [float(text) for text in axis.ticktext])
    assert axis.ticktext[0] == "0"
    assert axis.range[0] < 0
    assert axis.range[1] > np.sqrt(40)
    assert "mean over seeds" in figure.layout.title.subtitle.text


def test_layers_are_paired_and_their_means_told() -> None:
    figure = dead_features.layers_and_sites(ranked())
    *pairs, random_bar, asi_bar = traces(figure, "attn_out", 2)
    assert len(pairs) == 2
    np.testing.assert_allclose(pairs[0].customdata, [37, 0.37])
    np.testing.assert_allclose(np.square(random_bar.y), 38)
    np.testing.assert_allclose(np.square(asi_bar.y), 0.38)
    assert random_bar.text[0].strip("\u00a0") == "38"
    assert asi_bar.text[1].strip("\u00a0") == "0.38"
    assert min(asi_bar.x) > max(random_bar.x)
    assert list(figure.layout.xaxis2.ticktext)[:3] == ["random", "<br>attention output", "ASI"]
    assert list(named(figure)) == ["attention output", "residual stream"]


def test_layers_need_both_methods_and_bear_a_gap() -> None:
    for method, other in (("random", "ASI"), ("ASI", "random")):
        with pytest.raises(DataError, match=f"no held_out row with the method '{method}'"):
            dead_features.layers_and_sites(ranked((other,)))
    gap = ranked()[lambda t: ~((t.site == "attn_out") & (t.method == "ASI"))]
    figure = dead_features.layers_and_sites(gap)
    bars = [trace for trace in traces(figure, "attn_out", 2) if "text" in trace.mode]
    assert len(bars) == 1
    np.testing.assert_allclose(np.square(bars[0].y), 38)
    # A layer with a random start alone has a mark, and no part in the comparison.
    one = ranked()[lambda t: ~((t.site == "attn_out") & (t.method == "ASI") & (t.layer == 1))]
    figure = dead_features.layers_and_sites(one)
    assert [int(layer) for layer in traces(figure, "attn_out", 1)[0].text] == [1, 3]
    line, random_bar, _ = traces(figure, "attn_out", 2)
    np.testing.assert_allclose(line.customdata, [39, 0.39])
    np.testing.assert_allclose(np.square(random_bar.y), 39)
    none_dead = dead_features.layers_and_sites(ranked().assign(dead_fraction=0.0))
    assert none_dead.layout.yaxis.range[1] > 0
