"""One recipe at several first norms, and several rates, of its encoder rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from asi_lens.experiments.recipes import Recipe, find_recipe
from asi_lens.experiments.runs import TrainedRun
from asi_lens.results.beyond_rows import EncoderStepRow
from asi_lens.results.rows import DeadFeatureRow

_NAME = "{}, norm {:g}, encoder rate {:g}"


def with_factors(recipes: Sequence[Recipe | str], factors: Sequence[Sequence[float | int]]) -> list[Recipe]:
    """Return each recipe with each pair of `factors`.

    The first factor is on the first norm that has the smallest error (`overshoot`), the second is on the
    learning rate of the encoder's rows (`encoder_lr`).
    """
    return [
        replace(
            recipe,
            name=_NAME.format(recipe.name, overshoot, encoder_lr),
            overshoot=float(overshoot),
            encoder_lr=float(encoder_lr),
        )
        for recipe in map(find_recipe, recipes)
        for overshoot, encoder_lr in factors
    ]


def encoder_step_rows(runs: Sequence[TrainedRun], found: Sequence[DeadFeatureRow]) -> list[EncoderStepRow]:
    """Return the rows `found` of runs of `with_factors`, under the names that the recipes had before.

    `found` are the rows of `dead_feature_rows(runs, ...)`. Raises KeyError for a row of another run.
    """
    of = {(run.recipe.name, run.seed, run.train.lr): run for run in runs}
    rows = []
    for row in found:
        run = of[row.method, row.seed, row.lr]
        overshoot, rate = float(run.recipe.overshoot), float(run.recipe.encoder_lr)
        about = {**asdict(row), "method": row.method.removesuffix(_NAME.format("", overshoot, rate))}
        rows.append(
            EncoderStepRow(**about, overshoot=overshoot, encoder_lr=rate, encoder_norm=run.encoder_norm)
        )
    return rows
