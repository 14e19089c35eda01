"""One recipe at several norms of its first encoder rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from asi_lens.experiments.recipes import Recipe, find_recipe
from asi_lens.experiments.runs import TrainedRun
from asi_lens.results.beyond_rows import FirstNormRow
from asi_lens.results.rows import DeadFeatureRow

_NAME = "{}, {:g} times the best norm"


def with_overshoots(recipes: Sequence[Recipe | str], overshoots: Sequence[float | int]) -> list[Recipe]:
    """Return each recipe with each factor on the norm that has the smallest first error."""
    return [
        replace(recipe, name=_NAME.format(recipe.name, overshoot), overshoot=float(overshoot))
        for recipe in map(find_recipe, recipes)
        for overshoot in overshoots
    ]


def first_norm_rows(runs: Sequence[TrainedRun], found: Sequence[DeadFeatureRow]) -> list[FirstNormRow]:
    """Return the rows `found` of runs of `with_overshoots`, under the names of the recipes before it.

    `found` are the rows of `dead_feature_rows(runs, ...)`. Raises KeyError for a row of another run.
    """
    of = {(run.recipe.name, run.seed, run.train.lr): run for run in runs}
    rows = []
    for row in found:
        run = of[row.method, row.seed, row.lr]
        overshoot = float(run.recipe.overshoot)
        about = {**asdict(row), "method": row.method.removesuffix(_NAME.format("", overshoot))}
        rows.append(FirstNormRow(**about, overshoot=overshoot, encoder_norm=run.encoder_norm))
    return rows
