"""C1, C4 and C5 on several architectures: made-up tables where they hold on all, on some, on none."""

from __future__ import annotations

import made_up_ranks
import made_up_tables
import pandas as pd
import pytest
from made_up_claims import holds, told

from asi_lens.base.errors import DataError
from asi_lens.results.architecture_verdicts import architectures, c1_on_each, c4_on_each, c5_on_each
from asi_lens.results.rows import OutputProjectionRow, frame

MODELS = ("a", "b", "c")
LEVELS = {"z": 0.8, "attn_out": 0.5, "flat_spectrum": 0.8, "random_orthogonal": 0.8, "orthogonal_heads": 0.75}


def ranks(high: tuple[str, ...] = ()) -> pd.DataFrame:
    """Attention is lowest in both readings, but for the models in `high`."""
    table = made_up_ranks.ranks(MODELS)
    attention = table.site == "attn_out"
    table.loc[attention, "intrinsic_dimension_99"] = 30
    changed = attention & table.model.isin(high)
    table.loc[changed, ["effective_rank_fraction", "intrinsic_dimension_99"]] = [0.99, 63]
    return table


def projections(without: tuple[str, ...] = (), variants: tuple[str, ...] = tuple(LEVELS)) -> pd.DataFrame:
    """The drop from z and what orthogonal heads take back; models in `without` have neither."""
    return frame(
        [
            OutputProjectionRow(
                model, "news", 4096, layer, variant, None, 0.8 if model in without else LEVELS[variant]
            )
            for model in MODELS
            for layer in range(3)
            for variant in variants
        ]
    )


def overlaps() -> pd.DataFrame:
    return pd.concat([made_up_ranks.overlaps().assign(model=model) for model in MODELS])


def trained(dead: float = 0.1, models: tuple[str, ...] = MODELS) -> pd.DataFrame:
    """ASI leaves `dead` silent, the random start 40 %."""
    rows = [
        made_up_tables.row(method, model=model, seed=seed, dead_fraction=0.4 if method == "random" else dead)
        for model in models
        for method in ("random", "ASI")
        for seed in (0, 1)
    ]
    return frame(rows)


@pytest.mark.parametrize(
    ("without", "expected", "share"),
    [((), True, "100.0 %"), (("b",), "partly", "66.7 %"), (MODELS, False, "0.0 %")],
)
def test_on_all_on_some_on_none(without: tuple[str, ...], expected: object, share: str) -> None:
    verdict = c1_on_each(ranks(without))
    assert holds(verdict) == expected
    assert verdict is not None
    assert (verdict.claim, verdict.over) == ("C1", "3 architectures")
    assert told(verdict)["architectures where it holds"] == share
    assert list(told(verdict)) == ["architectures where it holds", "attn_out", "mlp_out", "resid_post"]
    assert holds(c4_on_each(projections(without), ranks())) == expected


def test_c5_needs_the_drop_to_be_taken_back() -> None:
    table = projections()
    assert holds(c5_on_each(table, overlaps())) is True
    low = (table.variant == "orthogonal_heads") & (table.model == "c")
    table.loc[low, "effective_rank_fraction"] = 0.5
    assert holds(c5_on_each(table, overlaps())) == "partly"
    table.loc[table.variant.isin(["flat_spectrum", "random_orthogonal"]), "effective_rank_fraction"] = (
        0.5  # no drop: nothing to take back
    )
    assert holds(c5_on_each(table, overlaps())) is None


def test_a_number_that_one_model_lacks_is_not_averaged_with_another() -> None:
    table = projections()
    no_drop = table.variant.isin(["flat_spectrum", "random_orthogonal"]) & (table.model == "b")
    table.loc[no_drop, "effective_rank_fraction"] = 0.5
    whole, lacking = c5_on_each(projections(), overlaps()), c5_on_each(table, overlaps())
    assert whole is not None
    assert lacking is not None
    heads = "rank with orthogonal heads"
    assert "drop taken back by orthogonal heads" in told(whole)
    assert "drop taken back by orthogonal heads" not in told(lacking)
    assert told(lacking)[heads] == told(whole)[heads]


def test_what_is_missing_is_not_judged() -> None:
    table = ranks()
    assert c1_on_each(table[table.site != "mlp_out"]) is None
    # One model without a site: nothing is said of all architectures.
    assert c1_on_each(table[(table.site != "mlp_out") | (table.model != "b")]) is None
    assert c4_on_each(projections(variants=("z",)), table) is None
    with pytest.raises(DataError, match="no column site"):
        c1_on_each(table.drop(columns="site"))


def test_answers_for_each_architecture() -> None:
    found = architectures(ranks(("b",)), projections(("c",)), overlaps(), trained())
    answers = {row.question: row.answer for row in found}
    assert answers == {
        **{f"C1 on {model}": "no" if model == "b" else "yes" for model in MODELS},
        **{f"C4 on {model}": "no" if model == "c" else "yes" for model in MODELS},
        **{f"C5 on {model}": "not testable here" if model == "c" else "yes" for model in MODELS},
        **{f"ASI keeps more features alive than a random start on {model}": "yes" for model in MODELS},
    }
    last = found[-1].numbers
    assert "silent 40.0% from a random start, 10.0% from ASI" in last
    assert "better in 2 of 2 seeds" in last


def test_cross_attention_is_answered_under_its_own_name_and_counts_for_no_claim() -> None:
    one = ranks()
    crossed = one[(one.model == "c") & (one.site == "attn_out")]
    crossed = crossed.assign(site="cross_attn_out", effective_rank_fraction=0.99, intrinsic_dimension_99=63)
    table = pd.concat([one, crossed])
    assert holds(c1_on_each(table)) is True
    assert told(c1_on_each(table)) == told(c1_on_each(one))
    cross = (
        projections(without=("c",))[lambda t: t.model == "c"],
        overlaps()[lambda t: t.model == "c"],
    )
    at_both = pd.concat([trained(), trained(0.6, ("c",)).assign(site="cross_attn_out")])
    found = architectures(table, projections(), overlaps(), at_both, cross)
    answers = {row.question: row.answer for row in found}
    gain = "ASI keeps more features alive than a random start on"
    name = "c (cross-attention)"
    assert answers == {
        **{f"{claim} on {model}": "yes" for claim in ("C1", "C4", "C5") for model in MODELS},
        **{f"{gain} {model}": "yes" for model in MODELS},
        f"C1 on {name}": "no",  # 0.99, above the MLP
        f"C4 on {name}": "no",
        f"C5 on {name}": "not testable here",  # nothing drops
        f"{gain} {name}": "no",
    }


@pytest.mark.parametrize(
    ("table", "answer"),
    [
        (trained(0.4), "no"),  # a tie is not fewer
        (trained(0.6), "no"),
        (trained().assign(fvu=lambda t: t.fvu.where(t.method == "random", 0.9)), "no"),
        (trained().query("method == 'ASI'"), "not testable here"),
        (trained().query("method == 'ASI' or seed == 0"), "not testable here"),
    ],
)
def test_asi_must_be_better_in_every_seed(table: pd.DataFrame, answer: str) -> None:
    found = architectures(ranks(), projections(), overlaps(), table)
    assert {row.answer for row in found if row.question.startswith("ASI")} == {answer}


def test_a_claim_that_holds_in_part_says_so() -> None:
    table = ranks()
    table.loc[(table.model == "a") & (table.site == "attn_out"), "intrinsic_dimension_99"] = 63
    (row,) = (
        row for row in architectures(table, projections(), overlaps(), trained()) if row.question == "C1 on a"
    )
    assert (row.answer, row.numbers.split(":")[0]) == ("no", "in part")
