"""Lives of features over training: who never fired, who died, who came back, and where they began."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from asi_lens.experiments.recipes import RECIPES, Recipe
from asi_lens.experiments.runs import TrainedRun
from asi_lens.results.beyond_rows import LastStepRow, LifeRow
from asi_lens.sae.row_states import STATES
from asi_lens.training.last_firings import read_kept, read_last_firings, read_start

METHODS = (
    RECIPES["random"],
    Recipe("random + sparse Adam", optimizer="sparse_adam"),
    RECIPES["ASI"],
    RECIPES["ASI + sparse Adam"],
)
"""Both starts with both optimizers."""
OPTIMIZERS = METHODS[:2]
"""The random start with both optimizers."""
BEFORE, AFTER = 6, 2
"""Logged rows before and after a last firing that `last_step_rows` tells of."""
N_GROUPS = 10
"""Groups of features by where their rows began."""


def life_rows(runs: Sequence[TrainedRun]) -> list[LifeRow]:
    """Return the lives of features at each logged row, for all of a run and for each tenth of a random start.

    Tenths are by the share of an encoder row's squared norm outside the top `d_active` directions before the
    first step. A start in the active subspace has no row outside, so it has no tenths. Takes runs of
    `train_recipes(..., keep_firings=True)`; raises CacheError for other runs.
    """
    return [row for run in runs for row in _rows(run)]


def _rows(run: TrainedRun) -> list[LifeRow]:
    tokens = [int(moment["tokens"] or 0) for moment in run.history()]
    fired = read_last_firings(run.folder, tokens)
    tail = 1 - read_start(run.folder)["inside"]
    groups: dict[int | None, Tensor] = {None: torch.arange(len(tail))}
    if run.d_init is None:
        groups |= dict(enumerate(torch.tensor_split(tail.argsort(stable=True), N_GROUPS), start=1))
    window = run.train.dead_window
    dead, once_dead = _deaths(fired, torch.tensor(tokens), window)
    out = []
    for i, n in enumerate(tokens):
        for tenth, own in groups.items():
            seen, last = fired[i, own], fired[-1, own]
            found: dict[str, Any] = dict.fromkeys(("dead", "died", "once_dead", "came_back"))
            if n >= window:
                found = {
                    "dead": _share(dead[i, own]),
                    "died": _share(dead[i, own] & (seen > 0)),
                    "once_dead": _share(once_dead[i, own]),
                    "came_back": _share(once_dead[i, own] & ~dead[i, own]),
                }
            out.append(
                LifeRow(
                    **_about(run),
                    tenth=tenth,
                    tail_share=tail[own].mean().item(),
                    n_features=len(own),
                    tokens=n,
                    n_tokens=tokens[-1],
                    dead_window_tokens=window,
                    fires_later=_share(last > n),
                    never_fired=_share(seen == 0),
                    **found,
                )
            )
    return out


def last_step_rows(runs: Sequence[TrainedRun]) -> list[LastStepRow]:
    """Return what encoder rows do around the last firing of features that die, beside rows of live features.

    Features that died are those that fired and are dead at the end of a run. Their last firing is placed at
    the first logged row that has seen it; those with fewer than `BEFORE` evenly spaced rows before it are
    left out. Where none is left, numbers are None.

    Takes runs of `train_recipes(..., keep_rows=True)`; raises CacheError for other runs.
    """
    return [row for run in runs for row in _last_steps(run)]


def _last_steps(run: TrainedRun) -> list[LastStepRow]:
    tokens = torch.tensor([int(moment["tokens"] or 0) for moment in run.history()])
    kept = read_kept(run.folder, tokens.tolist(), STATES)
    last = read_last_firings(run.folder, tokens[-1:].tolist())[0]
    dead = last <= int(tokens[-1]) - run.train.dead_window
    place = torch.searchsorted(tokens, last)
    # The first row is logged after one step: it is nearer to the second than others to the next.
    died = dead & (last > 0) & (place > BEFORE) & (place + AFTER < len(tokens))
    about = {name: value for name, value in _about(run).items() if name != "init"}
    spacing = int(tokens.diff().median()) if len(tokens) > 1 else 0
    out = []
    for offset in range(-BEFORE, AFTER + 1):
        where = place[died] + offset
        groups = {
            "died": {name: values[where, died.nonzero()[:, 0]] for name, values in kept.items()},
            # The mean of the live features at the same rows, as often as features died there.
            "alive": {name: values[:, ~dead].mean(1)[where] for name, values in kept.items()},
        }
        for group, found in groups.items():
            means: dict[str, Any] = {name: values.double().mean().item() for name, values in found.items()}
            out.append(
                LastStepRow(
                    **about,
                    n_tokens=int(tokens[-1]),
                    dead_window_tokens=run.train.dead_window,
                    group=group,  # type: ignore[arg-type]
                    n_features=int((died if group == "died" else ~dead).sum()),
                    tokens=offset * spacing,
                    **means,
                )
            )
    return out


def _deaths(
    fired: Int[Tensor, "rows d_sae"], tokens: Int[Tensor, " rows"], window: int
) -> tuple[Bool[Tensor, "rows d_sae"], Bool[Tensor, "rows d_sae"]]:
    """Return who is dead at each row, and who is dead there or was at an earlier row."""
    dead = fired <= tokens[:, None] - window
    return dead, dead.cumsum(0) > 0


def _share(chosen: Bool[Tensor, " n"]) -> float:
    return chosen.double().mean().item()


def _about(run: TrainedRun) -> dict[str, Any]:
    about = {name: run.config.metadata[name] for name in ("model", "corpus", "site", "layer")}
    return about | {
        "method": run.recipe.name,
        "init": run.recipe.init,
        "optimizer": run.train.optimizer,
        "d_sae": run.config.d_sae,
        "k": run.config.k,
        "lr": run.train.lr,
        "seed": run.seed,
    }
