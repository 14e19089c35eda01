"""Starts side by side: dictionaries that differ in the geometry of their first rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import require
from asi_lens.experiments.recipes import Recipe
from asi_lens.experiments.runs import TrainedRun
from asi_lens.results.beyond_rows import TriedStartRow
from asi_lens.results.rows import DeadFeatureRow

TEXT, LAYER = "another text", "another layer"
"""Names of the stores whose subspaces two of the starts take (`train_recipes(subspaces=...)`)."""

METHODS = (
    Recipe("random"),
    Recipe("orthogonal", "orthogonal"),
    Recipe("random, aligned", aligned="start"),
    Recipe("random, kept aligned", aligned="training"),
    Recipe("random, white inputs", whiten=0.0),
    Recipe("variance", "variance"),
    Recipe("data points", "datapoint"),
    Recipe("ASI", "asi", "auto"),
    Recipe("ASI, aligned", "asi", "auto", aligned="start"),
    Recipe("ASI, as its authors", "asi_authors", "auto"),
    Recipe("ASI + data points", "asi_datapoint", "auto"),
    Recipe("ASI of another text", "asi", "auto", subspace_of=TEXT),
    Recipe("ASI of another layer", "asi", "auto", subspace_of=LAYER),
)
"""Every start of the comparison. All but "random, kept aligned" and "random, white inputs" differ in the
first weights alone; these two differ all through training."""

_SIDES = ("decoder", "encoder")


def subspaces(
    here: ActivationStore, text: ActivationStore, layer: ActivationStore
) -> dict[str, ActivationStore]:
    """Return the stores that `METHODS` take other subspaces from.

    `text` is of the same place as `here`, `layer` of the same site at another layer. Raises OptionError for a
    text or a layer that is not another one.
    """
    for key, other, name in (("other_corpus", text, "corpus"), ("other_layer_fraction", layer, "layer")):
        own, theirs = here.metadata.get(name), other.metadata.get(name)
        require(own != theirs, key, f"of {name} {theirs}", f"of another {name} than the store's")
    return {TEXT: text, LAYER: layer}


def tried_rows(runs: Sequence[TrainedRun], found: Sequence[DeadFeatureRow]) -> list[TriedStartRow]:
    """Return the rows `found` of runs, with the first norm of their encoder rows, the share of their rows
    inside the subspace, and the time.

    `found` are the rows of `dead_feature_rows(runs, ...)`. Raises KeyError for a row of another run.
    """
    about = {(run.recipe.name, run.seed): _course(run) for run in runs}
    return [TriedStartRow(**asdict(row), **about[row.method, row.seed]) for row in found]


def _course(run: TrainedRun) -> dict[str, Any]:
    history = run.history()
    first, last = history[0], history[-1]
    seconds, before = 0.0, 0
    for row in history:
        tokens, speed = int(row["tokens"] or 0), row["tokens_per_s"]
        seconds += (tokens - before) / speed if speed else 0.0
        before = tokens
    shares = {
        f"{side}_inside_{when}": row[f"{side}_inside"]
        for side in _SIDES
        for when, row in (("start", first), ("end", last))
    }
    return {"encoder_norm": run.encoder_norm, **shares, "train_seconds": round(seconds, 2)}
