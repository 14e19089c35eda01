"""Claims C1 to C5 on made-up tables: hold everywhere, somewhere, nowhere; what is missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import made_up_ranks
import pandas as pd
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from made_up_claims import holds, told

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.collapse.output_projection import counterfactual_ranks
from asi_lens.results import rank_verdicts
from asi_lens.results.judging import Verdict
from asi_lens.results.rank_verdicts import c1, c2, c3, c4, c5
from asi_lens.results.rows import HeadOverlapRow, LossRow, OutputProjectionRow, RankRow, frame

Levels = dict[str, list[float]]


def ranks(levels: Levels, model: str = "m", corpus: str = "news") -> pd.DataFrame:
    """Effective rank over width by site and layer."""
    return frame(
        [
            RankRow(model, corpus, site, layer, 100, 4096, 100 * value, value, round(100 * value), 9.0, 3.0)
            for site, values in levels.items()
            for layer, value in enumerate(values)
        ]
    )


def losses(levels: dict[str, list[list[float | None]]]) -> pd.DataFrame:
    """Loss recovered by 1/8, 1/4 and 1/2 of the width, by site and layer; random directions recover all."""
    return frame(
        [
            LossRow("m", "news", 512, site, layer, kind, None, 64, share, 3.0, 3.0, 4.0, value)
            for site, layers in levels.items()
            for layer, curve in enumerate(layers)
            for share, principal in zip((0.125, 0.25, 0.5), curve, strict=True)
            for kind, value in (("principal", principal), ("random", 1.0))
        ]
    )


def projections(levels: Levels) -> pd.DataFrame:
    return frame(
        [
            OutputProjectionRow("m", "news", 4096, layer, variant, None, value)
            for variant, values in levels.items()
            for layer, value in enumerate(values)
        ]
    )


RANKS: Levels = {"attn_out": [0.5] * 4, "mlp_out": [0.9] * 4, "resid_post": [0.8] * 4, "z": [0.1] * 4}
EARLY, MIDDLE, LATE = [0.95, 1.0, 1.0], [0.4, 0.95, 1.0], [0.1, 0.4, 0.95]
LOSSES: dict[str, Any] = {"attn_out": [EARLY] * 3, "mlp_out": [LATE] * 3, "resid_post": [MIDDLE] * 3}
# z is half as wide as d_model: its rank over its own width says nothing beside the others.
PROJECTIONS: Levels = {
    "z": [0.4] * 3,
    "attn_out": [0.5] * 3,
    "flat_spectrum": [0.8] * 3,
    "random_orthogonal": [0.8] * 3,
    "orthogonal_heads": [0.7] * 3,
}
MLP = ranks({"mlp_out": [0.9] * 3})
OVERLAPS = frame([HeadOverlapRow("m", "news", 4096, 0, 0, 1, 0.4, 0.9, 0.2, 0.3)])


# --- C1, C2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ([0.5, 0.5, 0.5, 0.5], True),
        ([0.5, 0.5, 0.5, 0.85], True),  # three quarters of the layers
        ([0.1, 0.1, 0.8, 0.8], False),  # the lowest mean alone; a tie in a layer is not below
        ([0.79, 0.79, 0.79, 0.99], False),  # three quarters of the layers alone
        ([0.85] * 4, False),
        ([0.95] * 4, False),
        ([0.75, 0.75, 0.75, 0.95], True),  # a tie of the means is not above
    ],
)
def test_c1_needs_the_mean_and_three_quarters_of_the_layers(attention: list[float], expected: bool) -> None:
    table = ranks({**RANKS, "attn_out": attention})
    assert holds(c1(table, "m", "news")) is expected


def test_c1_holds_partly_by_one_of_its_readings() -> None:
    table = ranks(RANKS)
    attention = table.site == "attn_out"
    wide = table.assign(intrinsic_dimension_99=table.intrinsic_dimension_99.where(~attention, 95))
    assert holds(c1(wide, "m", "news")) == "partly"
    high = table.assign(effective_rank_fraction=table.effective_rank_fraction.where(~attention, 0.95))
    assert holds(c1(high, "m", "news")) == "partly"
    both = wide.assign(effective_rank_fraction=high.effective_rank_fraction)
    assert holds(c1(both, "m", "news")) is False


def test_c1_is_judged_by_the_main_text_of_the_model() -> None:
    others = [ranks({**RANKS, "attn_out": [0.99] * 4}, *pair) for pair in (("m", "code"), ("n", "news"))]
    verdict = c1(pd.concat([*others, ranks({**RANKS, "attn_out": [0.4, 0.5, 0.6, 0.85]})]), "m", "news")
    assert holds(verdict) is True
    assert verdict is not None
    assert (verdict.claim, verdict.over) == ("C1", "4 layers")
    assert told(verdict) == {
        "attn_out": "0.588 (0.400 to 0.850)",
        "mlp_out": "0.9 (0.9 to 0.9)",
        "resid_post": "0.8 (0.8 to 0.8)",
        "attn_out, directions for 99 %": "0.588 (0.400 to 0.850)",
    }
    with pytest.raises(UnknownNameError, match="unknown corpus 'nws'; did you mean 'news'"):
        c1(ranks(RANKS), "m", "nws")
    with pytest.raises(UnknownNameError, match="unknown model 'x'"):
        c1(ranks(RANKS), "x", "news")


def pairs(*attention: tuple[str, str, float]) -> pd.DataFrame:
    return pd.concat([ranks({**RANKS, "attn_out": [value] * 4}, m, c) for m, c, value in attention])


def test_c2_needs_every_pair_and_two_models() -> None:
    both = pairs(("m", "news", 0.5), ("m", "code", 0.6), ("n", "news", 0.7))
    verdict = c2(both)
    assert holds(verdict) is True
    assert told(verdict) == {
        "(model, text) pairs where attention is lowest": "100.0 %",
        "layers where attention is lowest": "100.0 % (100.0 to 100.0 %)",
        "gap to the next site": "0.2 (0.1 to 0.3)",
        "attn_out": "0.6 (0.5 to 0.7)",
    }
    assert holds(c2(pairs(("m", "news", 0.5), ("n", "news", 0.8)))) is True, "a tie is not above"
    assert holds(c2(pairs(("m", "news", 0.5), ("n", "news", 0.85)))) is False
    assert holds(c2(pairs(("m", "news", 0.95), ("n", "news", 0.95)))) is False
    assert holds(c2(pairs(("m", "news", 0.5), ("m", "code", 0.5)))) is None


def test_c2_judges_means_not_layers() -> None:
    some = ranks({**RANKS, "attn_out": [0.1, 0.1, 0.85, 0.85]}, "n")
    verdict = c2(pd.concat([ranks(RANKS), some]))
    assert holds(verdict) is True
    assert told(verdict)["layers where attention is lowest"] == "75.0 % (50.0 to 100.0 %)"


# --- C3 ---------------------------------------------------------------------------------------------


def test_directions_needed_are_interpolated_in_log_r() -> None:
    curves = [[0.6, 0.8, 1.0], [0.8, 0.2, 1.0], [0.1, 0.7, 0.7], [None, 0.5, None]]
    needed = rank_verdicts.directions_needed(losses({"attn_out": curves, "mlp_out": [EARLY] * 4}), 0.9)
    half_way = math.sqrt(0.25 * 0.5)
    from_half = 0.5 * 2 ** (0.2 / 0.3)
    alone = 0.25 * 4 ** (0.4 / 0.5)
    assert needed.attn_out.tolist() == pytest.approx([half_way, half_way, from_half, alone])
    assert needed.mlp_out.tolist() == pytest.approx([0.125] * 4), "above the target at its first point"
    whole = rank_verdicts.directions_needed(losses(LOSSES), 1.0)
    assert (whole == 1).all(axis=None), "the end of a plateau at the target"
    for target in (0.0, 1.5):
        with pytest.raises(OptionError, match=f"target={target}"):
            rank_verdicts.directions_needed(losses(LOSSES), target)


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ([EARLY, EARLY, EARLY], True),
        ([EARLY, EARLY, MIDDLE], True),  # at two thirds of the layers
        ([EARLY, MIDDLE, MIDDLE], False),  # the mean alone
        ([EARLY, EARLY, LATE], False),  # two thirds of the layers alone
        ([LATE, LATE, LATE], False),
    ],
)
def test_c3_needs_the_mean_and_two_thirds_of_the_layers(attention: list[Any], expected: bool) -> None:
    levels = {**LOSSES, "attn_out": attention, "resid_post": [[0.79, 0.95, 1.0]] * 3}
    assert holds(c3(losses(levels), 0.9)) is expected


def test_c3_compares_means_over_the_same_layers() -> None:
    """Attention needs the more directions in every layer but for one, where the others were not measured."""
    unknown: list[float | None] = [None] * 3
    sites = {"attn_out": [LATE, LATE, EARLY, EARLY, EARLY, EARLY], "resid_post": [LATE] * 6}
    table = losses({**sites, "mlp_out": [MIDDLE, MIDDLE, *[unknown] * 4]})
    assert holds(c3(table, 0.9)) is False


def test_c3_needs_attention_below_every_other_site() -> None:
    verdict = c3(losses(LOSSES), 0.9)
    assert holds(verdict) is True
    assert list(told(verdict))[:3] == ["attn_out", "mlp_out", "resid_post"]
    assert told(verdict)["attn_out"] == "12.5 % (12.5 to 12.5 %)"
    for other in ("mlp_out", "resid_post"):
        assert holds(c3(losses({**LOSSES, other: [EARLY] * 3}), 0.9)) is False
    assert c3(losses({"attn_out": [EARLY]}), 0.9) is None


# --- C4, C5 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ([0.8, 0.8, 0.8], True),
        ([0.8, 0.8, 0.51], True),  # above in every layer, and by the mean
        ([0.9, 0.9, 0.45], False),  # below in one layer
        ([0.9, 0.9, 0.5], False),  # level in one layer
        ([0.9, 0.9, 0.5 + 1e-12], False),  # above by rounding
        ([0.8, 0.8], None),  # not measured in one layer
        ([0.72, 0.72, 0.6], False),  # less than half of the distance
        ([0.4, 0.4, 0.4], False),
    ],
)
def test_c4_needs_every_layer_and_half_of_the_distance(flat: list[float], expected: bool | None) -> None:
    assert holds(c4(projections({**PROJECTIONS, "flat_spectrum": flat}), MLP)) is expected


def test_c4_takes_mlp_outputs_of_the_same_model_and_text() -> None:
    others = [ranks({"mlp_out": [9.0]}, *pair) for pair in (("n", "news"), ("m", "code"))]
    measured = pd.concat([*others, ranks({**RANKS, "mlp_out": [1.0, 0.8, 1.0, 0.8]})])
    verdict = c4(projections(PROJECTIONS), measured)
    assert holds(verdict) is True
    assert told(verdict)["mlp_out"] == "0.9 (0.8 to 1.0)"
    assert told(verdict)["drop from z over the distance to mlp_out"] == "75.0 %"
    assert c4(projections(PROJECTIONS), pd.concat(others)) is None
    assert holds(c4(projections(PROJECTIONS), ranks({"mlp_out": [0.5] * 3}))) is None, "nothing to explain"


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ([0.7, 0.7, 0.7], True),
        ([0.79, 0.79, 0.4], True),  # of the drop of the means
        ([0.65, 0.65, 0.64], False),
        ([0.4, 0.4, 0.4], False),
    ],
)
def test_c5_needs_half_of_the_drop(heads: list[float], expected: bool) -> None:
    table = projections({**PROJECTIONS, "orthogonal_heads": heads})
    assert holds(c5(table, OVERLAPS)) is expected


def flattened(attention: list[float], flat: list[float], heads: list[float]) -> pd.DataFrame:
    levels = {"z": flat, "attn_out": attention, "orthogonal_heads": heads}
    return projections({**levels, "flat_spectrum": flat, "random_orthogonal": flat})


@pytest.mark.parametrize("level", [0.582, 0.582 + 2e-16, 0.582 - 1e-9, 0.5])
def test_without_a_drop_nothing_can_be_taken_back(level: float) -> None:
    """A W_O with orthonormal rows: what differs is rounding."""
    table = flattened([0.582], [level], [0.582 + 3e-16])
    assert holds(c5(table, OVERLAPS)) is None
    assert holds(c4(table, ranks({"mlp_out": [0.8]}))) is False


def test_heads_that_cannot_be_orthogonal_take_nothing_back() -> None:
    """Where z is wider than d_model, no W_O has orthonormal rows, so random ones differ from draw to draw."""
    table = projections({**PROJECTIONS, "random_orthogonal": [0.8, 0.8, 0.79]})
    assert holds(c5(table, OVERLAPS)) is None
    assert holds(c4(table, MLP)) is True


@pytest.mark.parametrize("narrow", [1, 2])
def test_z_of_another_width_is_measured_in_the_units_of_the_output(narrow: int) -> None:
    """An isometry squeezes nothing, however wide z is; an outer product with one direction squeezes all."""
    d_model = 24
    made = torch.Generator().manual_seed(0)
    x = (
        torch.randn(24 // narrow, 400, generator=made, dtype=torch.float64)
        * torch.arange(1, 24 // narrow + 1)[:, None]
    )
    rows = torch.linalg.qr(torch.randn(d_model, 24 // narrow, generator=made, dtype=torch.float64)).Q.T
    flat = rearrange(rows, "(head d_head) d_model -> head d_head d_model", head=2)
    found = counterfactual_ranks(flat, x @ x.T)
    table = projections({name: [value] for name, value in found.items()})
    verdict = c4(table, ranks({"mlp_out": [0.9]}))
    assert holds(verdict) is False
    assert told(verdict)["drop from z over the distance to mlp_out"] == "0.0 %"
    assert holds(c5(table, OVERLAPS)) is None


def test_exactly_half_is_not_more_than_half() -> None:
    table = flattened([0.5], [0.75], [0.625])
    assert holds(c4(table, ranks({"mlp_out": [1.0]}))) is False
    assert holds(c5(table, OVERLAPS)) is False


def test_the_share_taken_back_is_told_by_layer() -> None:
    table = flattened([0.5] * 3, [0.8, 0.6, 0.5 + 1e-15], [0.7, 0.5, 0.5])
    back = rank_verdicts.drop_taken_back(table).orthogonal_heads
    assert back.tolist()[:2] == pytest.approx([2 / 3, 0])
    assert math.isnan(back[2]), "nothing to take back"
    assert told(c5(table, OVERLAPS)) == {
        "drop taken back by orthogonal heads": "50.0 % (0.0 to 66.7 %)",
        "rank with orthogonal heads": "0.567 (0.500 to 0.700)",
        "mean cosine between heads": "0.4",
        "mean cosine between random subspaces": "0.3",
    }


def test_draws_of_a_variant_are_averaged_in_the_order_of_the_figure() -> None:
    wide = rank_verdicts.projection_ranks(made_up_ranks.projections(("z", "attn_out", "gaussian")))
    assert wide.columns.tolist() == ["z", "attn_out", "gaussian"]
    assert wide.loc[2].tolist() == pytest.approx([0.47] * 3)


# --- what is missing --------------------------------------------------------------------------------

TWO = pairs(("m", "news", 0.5), ("n", "news", 0.5))
JUDGED: dict[str, tuple[pd.DataFrame, Callable[[pd.DataFrame], Verdict | None], str, str]] = {
    "C1": (ranks(RANKS), lambda table: c1(table, "m", "news"), "effective_rank_fraction", "site"),
    "C2": (TWO, c2, "effective_rank_fraction", "site"),
    "C3": (losses(LOSSES), lambda table: c3(table, 0.9), "loss_recovered", "site"),
    "C4": (projections(PROJECTIONS), lambda table: c4(table, MLP), "effective_rank_fraction", "variant"),
    "C5": (projections(PROJECTIONS), lambda table: c5(table, OVERLAPS), "effective_rank_fraction", "variant"),
}
NEEDED = {
    "C1": ("attn_out", "mlp_out", "resid_post"),
    "C2": ("attn_out", "mlp_out", "resid_post"),
    "C3": ("attn_out",),
    "C4": ("attn_out", "flat_spectrum"),
    "C5": ("attn_out", "flat_spectrum", "random_orthogonal", "orthogonal_heads"),
}


@pytest.mark.parametrize("claim", JUDGED)
def test_no_verdict_without_what_is_compared(claim: str) -> None:
    table, judge, measure, key = JUDGED[claim]
    assert holds(judge(table)) is True
    for name in NEEDED[claim]:
        assert judge(table[table[key] != name]) is None, name
    with pytest.raises(DataError, match=measure):
        judge(table.drop(columns=measure))


@pytest.mark.parametrize("claim", JUDGED)
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_what_was_not_measured_is_not_judged(claim: str, nothing: float | None) -> None:
    table, judge, measure, key = JUDGED[claim]
    empty = judge(table.assign(**{measure: pd.Series([nothing] * len(table), index=table.index)}))
    assert holds(empty) is None
    for name in NEEDED[claim]:
        part = table.assign(**{measure: table[measure].where(table[key] != name)})
        assert holds(judge(part)) is None, name


@given(st.sampled_from(sorted(JUDGED)), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(claim: str, random: Any) -> None:
    table, judge, _, _ = JUDGED[claim]
    order = list(range(len(table)))
    random.shuffle(order)
    assert judge(table.iloc[order]) == judge(table)
