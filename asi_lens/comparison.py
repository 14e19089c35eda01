"""Dictionaries trained in several ways on one store, side by side: what notebooks 04 to 07 compare.

Every dictionary is trained once. Its weights and training curve stay in the cache under a key of all that
they depend on, so that a notebook that asks again reads them, and one that was stopped goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asi_lens.activation_store import ActivationStore
from asi_lens.cache import cached_json
from asi_lens.corpora import Tokens
from asi_lens.errors import CacheError, require, unknown_name
from asi_lens.files import cache_key, write_whole
from asi_lens.models import model_info, resolve_device, resolve_dtype
from asi_lens.paths import cache_dir
from asi_lens.results import DeadFeatureRow
from asi_lens.sae.checkpoints import CHECKPOINT_FILE, held
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.evaluate import evaluate_together
from asi_lens.sae.fit import train_together
from asi_lens.sae.initialize import METHODS, auto_d_init, initialize
from asi_lens.sae.metrics import METRICS_FILE, Row, read_metrics
from asi_lens.sae.train import Trainer
from asi_lens.sae.train_config import TrainConfig
from asi_lens.split import Split

# Raise it when a change to training, initialization or evaluation makes other numbers of the same options.
_FORMAT = 1
_ABOUT = "run.json"
# Rows for the norm search.
_SAMPLE = 8192


@dataclass(frozen=True)
class Recipe:
    """One way of training, named as in the figures' legends. Raises OptionError or UnknownNameError."""

    name: str
    init: str = "random"
    """Method of `sae.initialize`."""
    d_init: int | str | None = None
    """Dimensions of the active subspace, or "auto"."""
    optimizer: str = "adam"
    """As in `TrainConfig`."""
    aux_k: int | str = 0
    """As in `TrainConfig`."""

    def __post_init__(self) -> None:
        if self.init not in METHODS:
            raise unknown_name("initialization method", self.init, METHODS)
        TrainConfig(optimizer=self.optimizer, aux_k=self.aux_k)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("random"),
        Recipe("random + AuxK", aux_k="auto"),
        Recipe("ASI", "asi", "auto"),
        Recipe("ASI + sparse Adam", "asi", "auto", "sparse_adam"),
    )
}
"""The paper's comparison (C7, C9)."""


@dataclass(frozen=True)
class Run:
    """One trained dictionary in the cache."""

    recipe: Recipe
    config: SAEConfig
    train: TrainConfig
    d_init: int | None
    """Dimensions that the recipe's `d_init` came to."""
    folder: Path
    """Holds the dictionary (`sae`), its curve (`metrics.csv`) and what it is (`run.json`)."""

    @property
    def seed(self) -> int:
        """Of the initial directions and of the order of the data."""
        return self.config.seed

    def history(self) -> list[Row]:
        """Logged metrics, as `Trainer.fit` returned them."""
        return read_metrics(self.folder / METRICS_FILE)

    def sae(self) -> SparseAutoencoder:
        """The trained dictionary."""
        return SparseAutoencoder.load(self.folder / "sae")


def train_recipes(
    store: ActivationStore,
    recipes: Sequence[Recipe | str],
    *,
    d_sae: int,
    k: int = 32,
    seeds: Sequence[int] = (0,),
    train: TrainConfig | None = None,
    windows: Sequence[int] = (),
    log_every: int = 50,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> list[Run]:
    """Train a dictionary per recipe and seed, those of a seed on one stream of batches.

    Recipes that come to the same options are one run. Those that are in the cache are not trained again.

    Args:
        recipes: recipes, or names in `RECIPES`.
        train: everything but `optimizer`, `aux_k` and `seed`, which recipes and `seeds` say.
        windows, log_every: as in `train_together`.
        device: where to train; "auto" is CUDA if there is one.

    Returns runs in order of seeds, then recipes. Raises what the parts raise, and CacheError for a run's
    folder that cannot be read.
    """
    chosen = [_recipe(recipe) for recipe in recipes]
    require(len(chosen) > 0, "recipes", [], "one or more")
    require(len(seeds) > 0, "seeds", [], "one or more")
    target = resolve_device(device)
    base = train or TrainConfig()
    # "auto" means different things on different machines: what it means here is part of the run's key.
    dtype = resolve_dtype(base.compute_dtype, target)
    base = replace(base, compute_dtype=str(dtype).removeprefix("torch."))
    logging = {"windows": sorted({*windows, base.dead_window}), "log_every": log_every}
    out = []
    for seed in seeds:
        runs = [_run(store, recipe, d_sae, k, seed, base, logging) for recipe in chosen]
        _train(store, runs, logging, target, progress)
        out += runs
    return out


def dead_feature_rows(
    runs: Sequence[Run],
    held_out: ActivationStore,
    *,
    model: nn.Module | None = None,
    tokens: Tokens | None = None,
    curves: bool = True,
    progress: bool = True,
) -> list[DeadFeatureRow]:
    """Training curves and held-out numbers of dictionaries of one site (`04_dead_feature_curves.csv`).

    Args:
        held_out: rows of the same site that no run was trained on: the dead features and FVU of the
            `held_out` rows.
        model, tokens: both or none: for `cross_entropy_delta`, on text of the held-out rows.
        curves: all logged moments; else the last one. A moment before a window was full has no row of it.

    Evaluations are cached. Raises as `evaluate_together`.
    """
    rows = []
    for seed in dict.fromkeys(run.seed for run in runs):
        group = [run for run in runs if run.seed == seed]
        for run, found in zip(group, _evaluations(group, held_out, model, tokens, progress), strict=True):
            about = _about(run, held_out)
            history = run.history()
            for moment in history if curves else history[-1:]:
                shared = {**about, "tokens": moment["tokens"], "fvu": moment["fvu"], "l0": moment["l0"]}
                for column, dead in moment.items():
                    window = re.fullmatch(r"dead_fraction_(\d+)", column)
                    if window and dead is not None and int(window[1]) <= (moment["tokens"] or 0):
                        rows.append(
                            DeadFeatureRow(
                                **shared,
                                split="train",
                                dead_window_tokens=int(window[1]),
                                dead_fraction=dead,
                                cross_entropy_delta=None,
                            )
                        )
            rows.append(DeadFeatureRow(**about, tokens=run.train.n_tokens, split="held_out", **found))
    return rows


def budget(model: nn.Module, runs: Sequence[Run], data: Split, *, losses: bool = True) -> str:
    """What stands behind the numbers of some runs, for captions and the claims table."""
    info, store = model_info(model), next(iter(data.train.values()))
    sites = dict.fromkeys(run.config.metadata["site"] for run in runs)
    layers = {run.config.metadata["layer"] for run in runs}
    sizes, ks = ({getattr(run.config, name) for run in runs} for name in ("d_sae", "k"))
    train = runs[0].train
    parts = [
        f"{info.name} ({info.weights}, {info.dtype})",
        data.train_tokens.corpus,
        f"{', '.join(sites)} of layer{'s' * (len(layers) > 1)} {_numbers(layers)} (width {store.d})",
        f"{_numbers(sizes)} features, k {_numbers(ks)}",
        f"{train.n_tokens:,} training tokens ({train.n_tokens / store.n:.1f} passes)",
        f"lr {train.lr:g}, batch {train.batch_size:,}, dead window {train.dead_window:,} tokens",
        f"{data.held_out_tokens.n_tokens:,} held-out tokens",
    ]
    if losses:
        parts.append(f"losses on {data.loss_tokens.n_tokens:,} of them")
    seeds = {run.seed for run in runs}
    return ", ".join([*parts, f"seed{'s' * (len(seeds) > 1)} {_numbers(seeds)}"])


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in sorted(values))


def _recipe(given: Recipe | str) -> Recipe:
    if isinstance(given, Recipe):
        return given
    if given not in RECIPES:
        raise unknown_name("recipe", given, RECIPES)
    return RECIPES[given]


def _run(
    store: ActivationStore,
    recipe: Recipe,
    d_sae: int,
    k: int,
    seed: int,
    base: TrainConfig,
    logging: Mapping[str, Any],
) -> Run:
    config = SAEConfig(store.d, d_sae, k, seed=seed, metadata=store.metadata)
    train = replace(base, optimizer=recipe.optimizer, aux_k=recipe.aux_k, seed=seed)
    d_init = auto_d_init(store.spectrum) if recipe.d_init == "auto" else recipe.d_init
    key = cache_key(
        format=_FORMAT,
        store=store.fingerprint,
        d_sae=d_sae,
        k=k,
        init=recipe.init,
        d_init=d_init,
        train=asdict(train),
        sample=_SAMPLE,
        **logging,
    )
    known = (str(store.metadata[name]) for name in ("model", "site", "layer") if name in store.metadata)
    name = re.sub(r"[^\w.-]+", "-", "-".join([*known, str(d_sae), recipe.init, key]))
    assert not isinstance(d_init, str)  # "auto" was the only one that `initialize` takes
    return Run(recipe, config, train, d_init, cache_dir("runs") / name)


def _train(
    store: ActivationStore,
    runs: Sequence[Run],
    logging: Mapping[str, Any],
    device: torch.device,
    progress: bool,
) -> None:
    missing = {run.folder: run for run in runs if not _is_done(run)}
    if not missing:
        return
    trainers, reports = [], []
    for run in missing.values():
        sae = SparseAutoencoder(run.config)
        sample = store.sample(min(_SAMPLE, store.n))
        reports.append(initialize(sae, run.recipe.init, store.spectrum, run.d_init, sample))
        trainers.append(Trainer(sae.to(device), run.train))
    train_together(trainers, store, folders=list(missing), progress=progress, **logging)
    for run, trainer, report in zip(missing.values(), trainers, reports, strict=True):
        with held(run.folder):
            trainer.sae.save(run.folder / "sae")
            about = {"format": _FORMAT, "recipe": asdict(run.recipe), "initialization": asdict(report)}
            with write_whole(run.folder / _ABOUT) as temporary:
                temporary.write_text(json.dumps(about, indent=1), encoding="utf-8")
            # Moments of the optimizer: three times the dictionary, for nothing once it is trained.
            (run.folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def _is_done(run: Run) -> bool:
    path = run.folder / _ABOUT
    if not path.exists():
        return False
    for needed in (run.folder / METRICS_FILE, run.folder / "sae"):
        if not needed.exists():
            raise CacheError(f"{path} tells of a finished run, but {needed} is missing; delete {run.folder}")
    return True


def _evaluations(
    runs: Sequence[Run],
    held_out: ActivationStore,
    model: nn.Module | None,
    tokens: Tokens | None,
    progress: bool,
) -> list[dict[str, Any]]:
    """The fields of a `held_out` row that come from the evaluation."""
    key = {
        "format": _FORMAT,
        "runs": [run.folder.name for run in runs],
        "held_out": held_out.fingerprint,
        "model": None if model is None else model_info(model).fingerprint,
        "tokens": None if tokens is None else tokens.fingerprint,
    }

    def measure() -> list[dict[str, Any]]:
        saes = [run.sae() for run in runs]
        found = evaluate_together(saes, held_out, model=model, tokens=tokens, progress=progress)
        return [
            {
                "dead_window_tokens": one.n_tokens,
                "dead_fraction": one.dead_fraction,
                "fvu": one.fvu,
                "l0": one.l0,
                "cross_entropy_delta": one.losses.cross_entropy_delta if one.losses else None,
            }
            for one in found
        ]

    return cached_json("evaluations", key, measure)


def _about(run: Run, held_out: ActivationStore) -> dict[str, Any]:
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
        "aux_k": run.config.d_in // 2 if run.train.aux_k == "auto" else run.train.aux_k,
        "d_sae": run.config.d_sae,
        "k": run.config.k,
        "lr": run.train.lr,
        "seed": run.seed,
    }
