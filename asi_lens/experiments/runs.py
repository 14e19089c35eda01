"""Dictionaries trained in several ways on one store, side by side, for the notebooks from 04 on.

Every dictionary is trained once. Its weights and training curve are cached. The cache key covers everything
they depend on, so a notebook that runs again reads them, and a notebook that was stopped continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.shaped import ShapedStore, power_gains
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import require, require_known
from asi_lens.base.files import cache_key
from asi_lens.experiments.held_out import AnyRun
from asi_lens.experiments.recipes import Recipe, find_recipe
from asi_lens.experiments.run_folders import about_run, alone, finish, is_finished, run_folder
from asi_lens.inputs.models import resolve_device, resolve_dtype
from asi_lens.sae.aligned import AlignedTrainer
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.drift import Drift
from asi_lens.sae.initialize import auto_d_init, initialize
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.row_states import row_states
from asi_lens.sae.subspace import SubspaceStore, expand
from asi_lens.sae.train import Trainer
from asi_lens.sae.transcoder import Transcoder
from asi_lens.sae.transcoder_init import initialize_transcoder
from asi_lens.training.checkpoint import held
from asi_lens.training.config import TrainConfig
from asi_lens.training.last_firings import FOLDER as FIRINGS
from asi_lens.training.last_firings import LastFirings
from asi_lens.training.learner import Learner
from asi_lens.training.loop import train_together
from asi_lens.training.metrics import METRICS_FILE, Metrics, read_metrics

# Raise it when a change to training, initialization or evaluation changes the results of the same options.
FORMAT = 1
_SAE = "sae"
# Rows for the norm search.
_SAMPLE = 8192

AnyLearner = TypeVar("AnyLearner", bound=Learner[Any, Any])


@dataclass(frozen=True)
class TrainedRun:
    """One trained dictionary in the cache."""

    recipe: Recipe
    config: SAEConfig
    train: TrainConfig
    d_init: int | None
    """Dimensions of the active subspace, with the recipe's "auto" resolved; None without a subspace."""
    d_active: int
    """Dimensions of the subspace for measuring drift: `d_init`, or the value of "auto"."""
    folder: Path
    """Folder of the dictionary (`sae`), its curve (`metrics.csv`) and its description (`finished.json`)."""
    elsewhere: ActivationStore | None = None
    """Store whose active subspace the start takes; None for the store of the training data."""

    @property
    def seed(self) -> int:
        """Seed of the initial directions and of the order of the data."""
        return self.config.seed

    @property
    def subspace(self) -> int | None:
        """Dimensions of the subspace that the run was trained in; None for training at full width."""
        return self.d_init if self.recipe.inside else None

    @property
    def encoder_norm(self) -> float:
        """Mean norm of the encoder rows that training began with, to four decimals."""
        return round(float(about_run(self.folder)["initialization"]["encoder_norm"]), 4)

    def history(self) -> list[Metrics]:
        """Return logged metrics, as `Trainer.fit` returned them. The FVU is that of whole activations in raw
        units; None for whitened inputs, where that is measured on held-out rows only."""
        history = read_metrics(self.folder / METRICS_FILE)
        if self.recipe.whiten is not None:  # the step's FVU is of whitened activations
            history = [{**row, "fvu": None} for row in history]
        if self.subspace is not None:
            floor = about_run(self.folder)["discarded"]
            for row in history:
                row["fvu"] = None if row["fvu"] is None else floor + (1 - floor) * row["fvu"]
        return history

    def sae(self) -> SparseAutoencoder:
        """Return the trained dictionary, read from the cache."""
        return SparseAutoencoder.load(self.folder / _SAE)


def train_recipes(
    store: ActivationStore | PairedStores,
    recipes: Sequence[Recipe | str],
    *,
    d_sae: int,
    k: int = 32,
    seeds: Sequence[int] = (0,),
    train: TrainConfig | None = None,
    windows: Sequence[int] = (),
    log_every: int = 50,
    checkpoint_every: int | None = None,
    keep_firings: bool = False,
    keep_rows: bool = False,
    subspaces: Mapping[str, ActivationStore] | None = None,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> list[TrainedRun]:
    """Train a dictionary for each recipe and seed. Dictionaries of a seed share one stream of batches.

    Recipes with the same resulting options are one run. Runs in the cache are not trained again.

    Args:
        store: rows of one site, or paired stores for transcoders.
        recipes: recipes, or names in `recipes.RECIPES`; recipes of transcoders have a `reader`.
        train: options of training. The recipes replace `optimizer`, `aux_k` and `encoder_lr`, and `seeds`
            replaces `seed`.
        windows, log_every, checkpoint_every: as in `train_together`.
        keep_firings: keep each feature's last firing at every logged row (`experiments.lives`). Such runs of
            dictionaries are trained apart from runs without it.
        keep_rows: keep, with the firings, bias, norm and angle to the mean of every encoder row
            (`sae.row_states`); such runs are trained apart, too.
        subspaces: stores by the names in `Recipe.subspace_of`, as wide as `store`.
        device: device of training; "auto" is CUDA if it is available.

    Returns runs in order of seeds, then recipes. Raises CacheError for a run's folder that cannot be read,
    and the errors of initialization and training.
    """
    chosen = [find_recipe(recipe) for recipe in recipes]
    keep_firings = keep_firings or keep_rows
    fits = not keep_firings or isinstance(store, ActivationStore)
    require(fits, "keep_firings", keep_firings, "False for paired stores")
    target = resolve_device(device)
    base = train or TrainConfig()
    # "auto" depends on the machine, so the resolved dtype is part of the run's key.
    dtype = resolve_dtype(base.compute_dtype, target)
    base = replace(base, compute_dtype=str(dtype).removeprefix("torch."))
    logging = {"windows": sorted({*windows, base.dead_window}), "log_every": log_every}
    options = {**logging, "checkpoint_every": checkpoint_every, "progress": progress}
    # Only in the key of runs that keep firings, so the keys of other runs stay.
    keyed = {**logging, "keep_firings": True} if keep_firings else logging
    keyed = {**keyed, "keep_rows": True} if keep_rows else keyed
    kept = LastFirings(row_states if keep_rows else None) if keep_firings else None
    return train_seeds(
        seeds,
        lambda seed: [_run(store, recipe, d_sae, k, seed, base, keyed, subspaces or {}) for recipe in chosen],
        lambda runs: _train(store, runs, options, target, kept),
    )


def train_seeds(
    seeds: Sequence[int], runs_of: Callable[[int], list[AnyRun]], train: Callable[[list[AnyRun]], None]
) -> list[AnyRun]:
    """Return the runs of all seeds, in order. Runs of a seed are trained while their folders are locked.

    Raises OptionError without seeds or without recipes.
    """
    require(len(seeds) > 0, "seeds", [], "one or more")
    out: list[AnyRun] = []
    for seed in seeds:
        runs = runs_of(seed)
        require(len(runs) > 0, "recipes", [], "one or more")
        # Finished runs are not locked: they may be in a read-only cache.
        with alone(run.folder for run in runs if not is_finished(run.folder, ())):
            train(runs)
        out += runs
    return out


def train_missing(
    runs: Iterable[AnyRun],
    files: Iterable[str],
    data: Any,
    start: Callable[[AnyRun], tuple[AnyLearner, Mapping[str, Any]]],
    save: Callable[[AnyRun, AnyLearner], Mapping[str, Any]],
    **options: Any,
) -> None:
    """Train the runs that are not finished, together on `data`, and mark them as finished.

    Args:
        files: names of the files that a finished run's folder holds besides its curve.
        start: returns the learner of a run, and facts for the run's description.
        save: writes the learned weights to the run's folder; returns more facts for the description.
        options: options of `train_together`.
    """
    needed = (METRICS_FILE, *files)
    missing = {run.folder: run for run in runs if not is_finished(run.folder, needed)}
    if not missing:
        return
    started = [start(run) for run in missing.values()]
    learners = [learner for learner, _ in started]
    # The weights are saved below, so a checkpoint of the end (14 GB of a million features) would not be read.
    train_together(learners, data, folders=list(missing), checkpoint_last=False, **options)
    for run, (learner, about) in zip(missing.values(), started, strict=True):
        with held(run.folder):
            finish(run.folder, {**about, **save(run, learner)})


def _run(
    store: ActivationStore | PairedStores,
    recipe: Recipe,
    d_sae: int,
    k: int,
    seed: int,
    base: TrainConfig,
    logging: Mapping[str, Any],
    subspaces: Mapping[str, ActivationStore],
) -> TrainedRun:
    d_out = store.d_out if isinstance(store, PairedStores) else None
    fits = (d_out is not None) == (recipe.reader is not None)
    require(fits, "reader", recipe.reader, "given for paired stores, None for rows of one site")
    config = SAEConfig(store.d, d_sae, k, recipe.activation, seed, store.metadata, d_out)
    rate = float(recipe.encoder_lr)
    train = replace(base, optimizer=recipe.optimizer, aux_k=recipe.aux_k, encoder_lr=rate, seed=seed)
    automatic = auto_d_init(store.spectrum)
    d_init = automatic if recipe.d_init == "auto" else recipe.d_init
    # Recipes with the same options are one run, whatever their names and however d_init was chosen.
    options = {**asdict(recipe), "name": None, "d_init": d_init}
    if not KINDS[recipe.activation].threshold_learns:
        del options["sparsity"]["threshold_lr"]
    # Options at their defaults are left out: keeps the keys of runs from before these options existed.
    for name in ("search", "whiten", "subspace_of", "aligned", "overshoot", "encoder_lr"):
        if options[name] == Recipe.__dataclass_fields__[name].default:
            del options[name]
    elsewhere = None
    if recipe.subspace_of is not None:
        require_known([recipe.subspace_of], subspaces, "name in subspaces")
        elsewhere = subspaces[recipe.subspace_of]
        options["subspace_of"] = elsewhere.fingerprint
    if options.pop("reader") is not None:
        options["init"] = f"{recipe.init}, reads {recipe.reader}"
    sizes = {"d_sae": d_sae, "k": k, "sample": _SAMPLE, **logging}
    about = {"store": store.fingerprint, "recipe": options, "train": train.as_dict()}
    key = cache_key(format=FORMAT, **about, **sizes)
    known = [store.metadata[name] for name in ("model", "site", "layer") if name in store.metadata]
    folder = run_folder([*known, d_sae, recipe.init], key)
    assert not isinstance(d_init, str)  # "auto" is the only string that `initialize` takes
    return TrainedRun(recipe, config, train, d_init, d_init or automatic, folder, elsewhere)


def _train(
    store: ActivationStore | PairedStores,
    runs: Sequence[TrainedRun],
    options: Mapping[str, Any],
    device: torch.device,
    kept: LastFirings | None,
) -> None:
    """Train the missing runs; dictionaries that read the same rows are trained together."""
    files = [_SAE, *([] if kept is None else [FIRINGS])]
    for r, power in dict.fromkeys((run.subspace, run.recipe.whiten) for run in runs):
        own = [run for run in runs if (run.subspace, run.recipe.whiten) == (r, power)]
        if all(is_finished(run.folder, (METRICS_FILE, *files)) for run in own):
            continue
        rows = store
        if r is not None and isinstance(store, ActivationStore):
            rows = SubspaceStore(store, r)
        elif power is not None and isinstance(store, ActivationStore):
            rows = ShapedStore(store, power_gains(store.spectrum, power))
        train_missing(
            own,
            files,
            rows,
            partial(started, rows=rows, device=device, kept=kept),
            partial(_save, rows=rows),
            on_log=kept,
            **options,
        )


def started(
    run: TrainedRun, rows: ActivationStore | PairedStores, device: torch.device, kept: LastFirings | None
) -> tuple[Trainer, dict[str, Any]]:
    """Return a run's trainer before its first step, and facts for the run's description."""
    recipe, sae = run.recipe, _undrawn(run, rows, device)
    l0 = recipe.sparsity.initial_l0 if sae.activation.has_threshold else None
    how: dict[str, Any] = {"overshoot": recipe.overshoot, "initial_l0": l0}
    drift, search = None, "exact"
    if isinstance(rows, PairedStores):
        assert isinstance(sae, Transcoder)
        assert recipe.reader is not None  # checked by `_run`
        report = initialize_transcoder(sae, rows, recipe.init, recipe.reader, run.d_init, **how)
    else:
        # Inside the subspace every direction is in ASI's active subspace, so "random" draws ASI's directions.
        method, d_init = (recipe.init, run.d_init) if run.subspace is None else ("random", None)
        sample = rows.sample(min(_SAMPLE, rows.n))
        how |= {"center": recipe.center, "b_dec": "mean" if recipe.center else "zeros"}
        how["norm_search"] = recipe.aligned is None
        if run.elsewhere is not None:
            how["subspace_of"] = run.elsewhere.spectrum
        report = initialize(sae, method, rows.spectrum, d_init, sample, **how)
        # Drift is measured for all recipes, also for those without ASI. Inside the subspace it is constant.
        drift, search = Drift(rows.spectrum, min(run.d_active, rows.d)), recipe.search
    about = {"format": FORMAT, "recipe": asdict(recipe), "initialization": asdict(report)}
    trainer_of = AlignedTrainer if recipe.aligned == "training" else Trainer
    trainer = trainer_of(sae.to(device), run.train, recipe.sparsity, drift, search=search)
    if kept is not None and drift is not None:
        kept.begin(trainer, run.folder, {"inside": drift.shares(sae)[1]})
    return trainer, about


def _undrawn(
    run: TrainedRun, rows: ActivationStore | PairedStores, device: torch.device
) -> SparseAutoencoder:
    """Return a dictionary whose weights are undefined: a start draws its own."""
    if isinstance(rows, PairedStores):
        return Transcoder(run.config, draw=False)
    with device:
        return SparseAutoencoder(replace(run.config, d_in=rows.d), draw=False)


def _save(run: TrainedRun, trainer: Trainer, rows: ActivationStore | PairedStores) -> dict[str, Any]:
    """Write the trained dictionary to the run's folder, at full width."""
    sae, about = trainer.sae, {}
    if isinstance(rows, ShapedStore):
        sae = expand(sae, rows.matrix, rows.center, rows.inverse)
    elif isinstance(rows, SubspaceStore):
        sae, about = expand(sae, rows.basis, rows.center), {"discarded": rows.discarded}
    sae.save(run.folder / _SAE)
    return about
