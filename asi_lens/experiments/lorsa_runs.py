"""Lorsas of one attention layer, initialized in several ways and trained side by side, for notebook 09.

As in `runs`, every Lorsa is trained once and cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asi_lens.base.errors import require, require_known
from asi_lens.base.files import cache_key
from asi_lens.experiments.held_out import TWO_SITES, held_out_numbers
from asi_lens.experiments.rows import table_rows
from asi_lens.experiments.run_folders import run_folder
from asi_lens.experiments.runs import train_missing, train_seeds
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.models import model_info, resolve_device
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.evaluate import evaluate_lorsas
from asi_lens.lorsa.initialize import LORSA_METHODS, initialize_lorsa, require_norm
from asi_lens.lorsa.lorsa import Lorsa, LorsaConfig
from asi_lens.lorsa.train import LorsaTrainer
from asi_lens.results.rows import DeadFeatureRow
from asi_lens.sae.evaluate import Evaluation
from asi_lens.training.config import TrainConfig
from asi_lens.training.metrics import METRICS_FILE, Metrics, read_metrics

# Raise it when a change to training, initialization or evaluation changes the results of the same options.
FORMAT = 3
_WEIGHTS = "lorsa.safetensors"
# Sequences for the subspaces and the norm search.
_SAMPLE = 32


@dataclass(frozen=True)
class LorsaRecipe:
    """A way to initialize a Lorsa, named as in the figures' legends.

    Raises UnknownNameError for an unknown method, OptionError for a fraction that does not fit the
    method and for a norm that `initialize_lorsa` does not take.
    """

    name: str
    init: str = "random"
    """Method of `initialize_lorsa`."""
    d_init_fraction: float | int | None = None
    """Dimensions of each head's active subspace, as a fraction of the width of a head. For "asi" only."""
    norm: float | int | str = 1.0
    """As in `initialize_lorsa`."""

    def __post_init__(self) -> None:
        require_known([self.init], LORSA_METHODS, "initialization method")
        fraction = self.d_init_fraction
        require_norm(self.norm)
        fits = (fraction is None) == (self.init == "random") and (fraction is None or 0 < fraction <= 1)
        require(fits, "d_init_fraction", fraction, "above 0 to 1 for 'asi', left out for 'random'")


@dataclass(frozen=True)
class LorsaRun:
    """One trained Lorsa in the cache."""

    recipe: LorsaRecipe
    config: LorsaConfig
    train: TrainConfig
    d_init: int | None
    """Dimensions of each head's active subspace; None for "random"."""
    folder: Path

    @property
    def seed(self) -> int:
        """Seed of the initial units and of the order of the data."""
        return self.config.seed

    def history(self) -> list[Metrics]:
        """Return the logged metrics, as `LorsaTrainer.fit` returned them."""
        return read_metrics(self.folder / METRICS_FILE)

    def lorsa(self) -> Lorsa:
        """Return the trained Lorsa, read from the cache."""
        return Lorsa.load(self.folder / _WEIGHTS)


def train_lorsas(
    model: nn.Module,
    layer: int,
    pairs: SequencePairs,
    recipes: Sequence[LorsaRecipe],
    *,
    n_ov: int,
    k: int,
    seeds: Sequence[int] = (0,),
    train: TrainConfig | None = None,
    log_every: int = 50,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> list[LorsaRun]:
    """Train a Lorsa for each recipe and seed. Lorsas of a seed share one stream of sequences.

    Args:
        pairs: data of that layer.
        train: options of training. `seeds` replaces the value of `seed`.
        n_ov, k: as in `LorsaConfig`. log_every: as in `train_together`.

    Returns runs in order of seeds, then recipes. Raises CacheError for a run's folder that cannot be read,
    and the errors of initialization and training.
    """
    target, base = resolve_device(device), train or TrainConfig()

    def runs_of(seed: int) -> list[LorsaRun]:
        config = LorsaConfig.of(model, layer, n_ov=n_ov, k=k, context=pairs.context, seed=seed)
        return [_run(recipe, config, replace(base, seed=seed), pairs, log_every) for recipe in recipes]

    def start(run: LorsaRun) -> tuple[LorsaTrainer, dict[str, Any]]:
        lorsa = Lorsa(run.config).to(target)
        sample = pairs[: min(_SAMPLE, len(pairs))]
        initialize_lorsa(lorsa, model, layer, sample, run.recipe.init, run.d_init, norm=run.recipe.norm)
        about = {"format": FORMAT, "recipe": asdict(run.recipe), "initialization": lorsa.initialization}
        return LorsaTrainer(lorsa, run.train), about

    def save(run: LorsaRun, trainer: LorsaTrainer) -> dict[str, Any]:
        trainer.lorsa.save(run.folder / _WEIGHTS)
        return {}

    options = {"log_every": log_every, "progress": progress}
    return train_seeds(
        seeds, runs_of, lambda runs: train_missing(runs, [_WEIGHTS], pairs, start, save, **options)
    )


def lorsa_rows(
    runs: Sequence[LorsaRun],
    held_out: SequencePairs,
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    progress: bool = True,
) -> list[DeadFeatureRow]:
    """Return rows of training curves and held-out numbers (`09_lorsa.csv`).

    In the rows, features are units and the site is `attention`. Evaluations are cached.

    Args:
        held_out: sequences of the same layer that no run was trained on.
        model, tokens: give both for the language-model losses, or neither.

    Raises as `evaluate_lorsas`.
    """
    found = _evaluations(runs, held_out, model, tokens, progress)
    return [
        row
        for run, measured in zip(runs, found, strict=True)
        for row in table_rows(_about(run, held_out), run.history(), run.train.n_tokens, measured)
    ]


def lorsa_budget(
    model: nn.Module, runs: Sequence[LorsaRun], pairs: SequencePairs, held_out: SequencePairs, losses: Tokens
) -> str:
    """Return the setting of runs of one layer and size in words, for captions and the claims table."""
    info, run = model_info(model, fingerprint=False), runs[0]
    config, train = run.config, run.train
    d_init = ", ".join(str(one) for one in sorted({one.d_init for one in runs if one.d_init}))
    seeds = sorted({one.seed for one in runs})
    parts = [
        info.label,
        str(pairs.metadata["corpus"]),
        f"attention of layer {config.metadata['layer']} (width {config.d_in})",
        f"{config.n_ov:,} units under {config.n_qk_heads} heads, k {config.k}",
        f"d_init {d_init} of {config.d_qk} a head",
        f"{train.n_tokens:,} training positions ({train.n_tokens / pairs.n:.1f} passes) in sequences of "
        f"{pairs.context}",
        f"lr {train.lr:g}, batch {train.batch_size:,}, dead window {train.dead_window:,} positions",
        f"{held_out.n:,} held-out positions",
        f"losses on {losses.n_tokens:,} tokens of them",
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
    ]
    return ", ".join(parts)


def _run(
    recipe: LorsaRecipe, config: LorsaConfig, train: TrainConfig, pairs: SequencePairs, log_every: int
) -> LorsaRun:
    fraction = recipe.d_init_fraction
    d_init = None if fraction is None else max(1, round(fraction * config.d_qk))
    key = cache_key(
        format=FORMAT,
        pairs=pairs.fingerprint,
        config=asdict(config),
        init=recipe.init,
        d_init=d_init,
        norm=recipe.norm,
        train=train.as_dict(),
        sample=_SAMPLE,
        log_every=log_every,
    )
    about = config.metadata
    folder = run_folder([about["model"], "lorsa", about["layer"], config.n_ov, recipe.init], key)
    return LorsaRun(recipe, config, train, d_init, folder)


def _evaluations(
    runs: Sequence[LorsaRun],
    held_out: SequencePairs,
    model: nn.Module | None,
    tokens: Tokens | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """Return the evaluated fields of `held_out` rows, a mapping for each run."""

    def evaluate(missing: list[LorsaRun]) -> list[Evaluation]:
        lorsas = [run.lorsa().to(resolve_device("auto")) for run in missing]
        return evaluate_lorsas(lorsas, held_out, model=model, tokens=tokens, progress=progress)

    return held_out_numbers(runs, held_out.fingerprint, model, tokens, evaluate, **TWO_SITES)


def _about(run: LorsaRun, held_out: SequencePairs) -> dict[str, Any]:
    return {
        "model": run.config.metadata["model"],
        "corpus": held_out.metadata["corpus"],
        "site": "attention",
        "layer": run.config.metadata["layer"],
        "method": run.recipe.name,
        "init": run.recipe.init,
        "d_init": run.d_init,
        "optimizer": run.train.optimizer,
        "aux_k": 0,
        "d_sae": run.config.n_ov,
        "k": run.config.k,
        "lr": run.train.lr,
        "seed": run.seed,
    }
