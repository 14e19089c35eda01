"""Table rows of a comparison of dictionaries: training curves, held-out numbers, and the budget in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from torch import nn

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.split import Split
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import require
from asi_lens.experiments.held_out import NO_LOSSES, TWO_SITES, held_out_numbers
from asi_lens.experiments.runs import TrainedRun
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.float32 import loss_dtype
from asi_lens.inputs.models import model_info, resolve_device
from asi_lens.results.rows import DeadFeatureRow, DriftRow
from asi_lens.sae.drift import COLUMNS
from asi_lens.sae.evaluate import Evaluation, evaluate_together, evaluate_transcoders
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.transcoder import Transcoder
from asi_lens.training.metrics import Metrics


def dead_feature_rows(
    runs: Sequence[TrainedRun],
    held_out: ActivationStore | PairedStores,
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    curves: bool = True,
    progress: bool = True,
) -> list[DeadFeatureRow]:
    """Return rows of training curves and held-out numbers of dictionaries of one site.

    The table is `04_dead_feature_curves.csv`. Evaluations are cached.

    Args:
        held_out: rows of the same site that no run was trained on, for dead features and FVU in the
            `held_out` rows.
        model, tokens: give both for the language-model losses on the held-out text, or neither.
        curves: return a row for every logged step. False: only for the last. A dead window gives rows only
            from the step on at which the window was full.

    Raises as `evaluate_together`.
    """
    rows = []
    for run, found in zip(runs, _evaluations(runs, held_out, model, tokens, progress), strict=True):
        history = run.history()
        rows += table_rows(
            _about(run, held_out), history if curves else history[-1:], run.train.n_tokens, found
        )
    return rows


def table_rows(
    about: Mapping[str, Any], history: Sequence[Metrics], n_tokens: int, found: Mapping[str, Any]
) -> list[DeadFeatureRow]:
    """Return rows of one run: a row for each logged step and full dead window, and `found` on held-out data.

    `about` holds the columns that identify the run; `n_tokens` is the number of training tokens.
    """
    rows = []
    for moment in history:
        shared = {**about, **NO_LOSSES, **{key: moment[key] for key in ("tokens", "fvu", "l0")}}
        for column, dead in moment.items():
            window = re.fullmatch(r"dead_fraction_(\d+)", column)
            if window and dead is not None and int(window[1]) <= (moment["tokens"] or 0):
                seen: dict[str, Any] = {"dead_window_tokens": int(window[1]), "dead_fraction": dead}
                rows.append(DeadFeatureRow(**shared, **seen, split="train"))
    return [*rows, DeadFeatureRow(**about, tokens=n_tokens, split="held_out", **found)]


def drift_rows(
    runs: Sequence[TrainedRun],
    held_out: ActivationStore | PairedStores,
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    progress: bool = True,
) -> list[DriftRow]:
    """Return the rows of `dead_feature_rows` with the drift over training (`08_jumprelu_schedule.csv`)."""
    named = {(run.recipe.name, run.seed): run for run in runs}
    moments = {(*who, moment["tokens"]): moment for who, run in named.items() for moment in run.history()}
    out = []
    for row in dead_feature_rows(runs, held_out, model=model, tokens=tokens, progress=progress):
        run, moment = named[row.method, row.seed], moments[row.method, row.seed, row.tokens]
        start = run.recipe.sparsity.initial_l0
        inside: dict[str, Any] = {column: moment[column] for column in COLUMNS}
        out.append(
            DriftRow(
                **asdict(row),
                activation=run.config.activation,
                initial_l0=None if start is None else float(start),
                d_active=run.d_active,
                **inside,
            )
        )
    return out


def relative_times(runs: Sequence[TrainedRun]) -> pd.DataFrame:
    """Return each method's time of a step relative to the first method: ratios of medians of logged rows."""
    rows = [(run.recipe.name, row["tokens_per_s"]) for run in runs for row in run.history()]
    speeds = pd.DataFrame(rows, columns=["method", "time per step"]).groupby("method", sort=False).median()
    return speeds.iloc[0] / speeds


def seen_fvu(runs: Sequence[TrainedRun], store: ActivationStore, n: int, progress: bool = True) -> pd.Series:
    """Return the mean FVU by method on `n` rows of the training data (on all rows, if there are fewer).

    It is below the FVU on held-out text by what several passes over the same rows memorize.
    """
    sample = ActivationStore.from_tensor(store.sample(min(n, store.n)), store.metadata)
    found = _evaluations(runs, sample, None, None, progress)
    values = pd.Series([one["fvu"] for one in found], [run.recipe.name for run in runs])
    return values.groupby(level=0, sort=False).mean()


def budget(model: nn.Module, runs: Sequence[TrainedRun], data: Split, *, losses: bool = True) -> str:
    """Return the setting of some runs in words, for captions and the claims table."""
    require(len(runs) > 0, "runs", [], "one or more")
    info, store = model_info(model, fingerprint=False), next(iter(data.train.values()))
    places = [(run.config.metadata["site"], run.config.metadata["layer"]) for run in runs]
    sites, layers = dict.fromkeys(site for site, _ in places), {layer for _, layer in places}
    sizes, ks = ({getattr(run.config, name) for run in runs} for name in ("d_sae", "k"))
    train, lrs = runs[0].train, dict.fromkeys(f"{run.train.lr:g}" for run in runs)
    parts = [
        info.label,
        data.train_tokens.corpus,
        f"{', '.join(sites)} of layer{'s' * (len(layers) > 1)} {_numbers(layers)} (width {store.d})",
        f"{_numbers(sizes)} features, k {_numbers(ks)}",
        f"{train.n_tokens:,} training tokens ({train.n_tokens / store.n:.1f} passes)",
        f"lr {', '.join(lrs)}, batch {train.batch_size:,}, dead window {train.dead_window:,} tokens",
        f"{data.held_out_tokens.n_tokens:,} held-out tokens",
    ]
    out = {where: one.metadata.get("left_out") for where, one in data.train.items() if where in places}
    if any(out.values()):
        told = ", ".join(f"{n:,} at {site} {layer}" for (site, layer), n in out.items() if n)
        parts.append(f"massive activations left out of {store.n:,} training rows: {told}")
    searched = [run for run in runs if run.recipe.search != "exact"]
    found = [row["search_mass"] or 0.0 for run in searched for row in run.history()]
    if found:
        parts.append(f"top k searched in the active subspace (at least {min(found):.2%} of their mass found)")
    if losses:
        parts.append(f"losses ({loss_dtype(info.dtype)}) on {data.loss_tokens.n_tokens:,} of them")
    seeds = {run.seed for run in runs}
    return ", ".join([*parts, f"seed{'s' * (len(seeds) > 1)} {_numbers(seeds)}"])


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(values))


def _evaluations(
    runs: Sequence[TrainedRun],
    held_out: ActivationStore | PairedStores,
    model: nn.Module | None,
    tokens: Tokens | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Return the evaluated fields of `held_out` rows, a mapping for each run."""

    def evaluate(missing: list[TrainedRun]) -> list[Evaluation]:
        # Where they were trained; a dictionary moves the rows that it reads to its own device.
        saes = [run.sae().to(resolve_device("auto")) for run in missing]
        options: dict[str, Any] = {"model": model, "tokens": tokens, "progress": progress}
        if isinstance(held_out, PairedStores):
            transcoders = [sae for sae in saes if isinstance(sae, Transcoder)]
            return evaluate_transcoders(transcoders, held_out, **options)
        return evaluate_together(saes, held_out, **options)

    how = TWO_SITES if isinstance(held_out, PairedStores) else {}
    return held_out_numbers(runs, held_out.fingerprint, model, tokens, evaluate, **how)


def _about(run: TrainedRun, held_out: ActivationStore | PairedStores) -> dict[str, Any]:
    metadata = {**held_out.metadata, **run.config.metadata}
    return {
        "model": metadata["model"],
        "corpus": metadata["corpus"],
        "site": metadata["site"],
        "layer": metadata["layer"],
        "method": run.recipe.name,
        "init": run.recipe.init,
        "d_init": run.d_init,
        "optimizer": run.train.optimizer,
        "aux_k": (run.config.d_out or run.config.d_in) // 2 if run.train.aux_k == "auto" else run.train.aux_k,
        "d_sae": run.config.d_sae,
        "k": run.config.k if KINDS[run.config.activation].picks_k else None,
        "lr": run.train.lr,
        "seed": run.seed,
    }
