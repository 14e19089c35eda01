"""The tables of design.md."""

from __future__ import annotations

import jaxtyping
import pytest
from made_up_ranks import ranks

from asi_lens.base.errors import UnknownNameError
from asi_lens.results import rows
from asi_lens.results.claims import ClaimRow
from asi_lens.results.rows import DeadFeatureRow, LossRow, OutputProjectionRow, RankRow, columns, left_out

# Under test jaxtyping sees a wrong word before the row does (test_tables has rows that it does not see).
REFUSED = (UnknownNameError, jaxtyping.TypeCheckError)


@pytest.mark.parametrize(
    ("row_type", "promised"),
    [
        (
            RankRow,
            "model corpus site layer d n_tokens effective_rank effective_rank_fraction "
            "intrinsic_dimension_99 participation_ratio stable_rank",
        ),
        (
            LossRow,
            "model corpus site layer rank rank_fraction cross_entropy cross_entropy_clean "
            "cross_entropy_mean_ablated loss_recovered subspace seed n_tokens",
        ),
        (OutputProjectionRow, "model corpus layer variant effective_rank_fraction n_tokens seed"),
        (
            DeadFeatureRow,
            "model corpus site layer method init d_init optimizer aux_k d_sae k lr seed tokens "
            "dead_window_tokens dead_fraction fvu l0 cross_entropy_delta cross_entropy_delta_error kl",
        ),
        (ClaimRow, "claim statement paper_value our_value spread budget verdict notebook"),
    ],
)
def test_tables_have_the_columns_that_others_rely_on(row_type: type, promised: str) -> None:
    assert set(promised.split()) <= set(columns(row_type))


def test_every_variant_is_known_and_only_those() -> None:
    for variant in rows.VARIANTS:
        OutputProjectionRow("m", "c", 1, 0, variant, None, 0.5)  # type: ignore[arg-type]
    with pytest.raises(REFUSED, match="flat_spectrum"):
        OutputProjectionRow("m", "c", 1, 0, "flat_spectra", None, 0.5)  # type: ignore[arg-type]


def test_massive_activations_are_told_in_words() -> None:
    table = ranks()
    assert left_out(table) == "no massive activations were found"
    table.loc[[7, 9], "n_left_out"] = [3, 11]
    told = left_out(table)
    assert told.startswith(
        "massive activations are left out at 2 of 24 places (most at mlp_out of layer 3: 11 of"
    )
