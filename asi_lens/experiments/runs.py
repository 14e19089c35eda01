"""Dictionaries trained in several ways on one store, side by side: what the notebooks from 04 on compare.

Every dictionary is trained once. Its weights and training curve stay in the cache under a key of all that
they depend on, so that a notebook that asks again reads them, and one that was stopped goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import CacheError, require
from asi_lens.base.files import cache_key, locked, write_whole
from asi_lens.base.paths import cache_dir
from asi_lens.experiments.held_out import AnyRun
from asi_lens.experiments.recipes import Recipe, find_recipe
from asi_lens.inputs.models import resolve_device, resolve_dtype
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.drift import Drift
from asi_lens.sae.initialize import InitReport, auto_d_init, initialize
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.subspace import SubspaceStore, expand
from asi_lens.sae.train import Trainer
from asi_lens.sae.transcoder import Transcoder
from asi_lens.sae.transcoder_init import TranscoderInitReport, initialize_transcoder
from asi_lens.training.checkpoint import CHECKPOINT_FILE, held
from asi_lens.training.config import TrainConfig
from asi_lens.training.learner import Learner
from asi_lens.training.loop import train_together
from asi_lens.training.metrics import METRICS_FILE, Metrics, read_metrics

# Raise it when a change to training, initialization or evaluation makes other numbers of the same options.
FORMAT = 1
FINISHED_FILE = "finished.json"
_EARLIER_FILE = "run.json"
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
    """Dimensions that the recipe's `d_init` came to."""
    d_active: int
    """Dimensions that drift is measured in: `d_init`, or what "auto" comes to."""
    folder: Path
    """Holds the dictionary (`sae`), its curve (`metrics.csv`) and what it is (`finished.json`)."""

    @property
    def seed(self) -> int:
        """Of the initial directions and of the order of the data."""
        return self.config.seed

    @property
    def subspace(self) -> int | None:
        """Dimensions that it was trained in, none for all."""
        return self.d_init if self.recipe.inside else None

    def history(self) -> list[Metrics]:
        """Logged metrics, as `Trainer.fit` returned them; FVU is always of whole activations."""
        history = read_metrics(self.folder / METRICS_FILE)
        if self.subspace is not None:
            floor = about_run(self.folder)["discarded"]
            for row in history:
                row["fvu"] = None if row["fvu"] is None else floor + (1 - floor) * row["fvu"]
        return history

    def sae(self) -> SparseAutoencoder:
        """The trained dictionary."""
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
    checkpoint_every: int = 250_000,
    device: str | torch.device = "auto",
    progress: bool = True,
) -> list[TrainedRun]:
    """Train a dictionary per recipe and seed, those of a seed on one stream of batches.

    Recipes that come to the same options are one run. Those that are in the cache are not trained again.

    Args:
        store: rows of one site, or paired stores for transcoders.
        recipes: recipes, or names in `recipes.RECIPES`; transcoders have a `reader`.
        train: everything but `optimizer`, `aux_k` and `seed`, which recipes and `seeds` say.
        windows, log_every, checkpoint_every: as in `train_together`.
        device: where to train; "auto" is CUDA if there is one.

    Returns runs in order of seeds, then recipes. Raises what the parts raise, and CacheError for a run's
    folder that cannot be read.
    """
    chosen = [find_recipe(recipe) for recipe in recipes]
    target = resolve_device(device)
    base = train or TrainConfig()
    # "auto" means different things on different machines: what it means here is part of the run's key.
    dtype = resolve_dtype(base.compute_dtype, target)
    base = replace(base, compute_dtype=str(dtype).removeprefix("torch."))
    logging = {"windows": sorted({*windows, base.dead_window}), "log_every": log_every}
    return train_seeds(
        seeds,
        lambda seed: [_run(store, recipe, d_sae, k, seed, base, logging) for recipe in chosen],
        lambda runs: _train(store, runs, {**logging, "checkpoint_every": checkpoint_every}, target, progress),
    )


def train_seeds(
    seeds: Sequence[int],
    runs_of: Callable[[int], list[AnyRun]],
    train: Callable[[list[AnyRun]], None],
) -> list[AnyRun]:
    """The runs of all seeds in order, those of a seed trained while no other process has their folders.

    Raises OptionError where there are no seeds or no recipes.
    """
    require(len(seeds) > 0, "seeds", [], "one or more")
    out: list[AnyRun] = []
    for seed in seeds:
        runs = runs_of(seed)
        require(len(runs) > 0, "recipes", [], "one or more")
        with alone(run.folder for run in runs):
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
        files: what a finished run's folder holds beside its curve.
        start: the learner of a run, and what there is to say of it.
        save: puts what a learner has learned into the run's folder; returns what else there is to say.
        options: of `train_together`.
    """
    needed = (METRICS_FILE, *files)
    missing = {run.folder: run for run in runs if not is_finished(run.folder, needed)}
    if not missing:
        return
    started = [start(run) for run in missing.values()]
    train_together([learner for learner, _ in started], data, folders=list(missing), **options)
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
) -> TrainedRun:
    d_out = store.d_out if isinstance(store, PairedStores) else None
    fits = (d_out is not None) == (recipe.reader is not None)
    require(fits, "reader", recipe.reader, "given for paired stores, and for nothing else")
    config = SAEConfig(store.d, d_sae, k, recipe.activation, seed, store.metadata, d_out)
    train = replace(base, optimizer=recipe.optimizer, aux_k=recipe.aux_k, seed=seed)
    automatic = auto_d_init(store.spectrum)
    d_init = automatic if recipe.d_init == "auto" else recipe.d_init
    # Recipes of the same options are one run, whatever they are called and however they came to d_init.
    options = {**asdict(recipe), "name": None, "d_init": d_init}
    if not KINDS[recipe.activation].threshold_learns:
        del options["sparsity"]["threshold_lr"]
    if recipe.search == "exact":  # runs from before there was a choice are those of this key
        del options["search"]
    if options.pop("reader") is not None:
        options["init"] = f"{recipe.init}, reads {recipe.reader}"
    key = cache_key(
        format=FORMAT,
        store=store.fingerprint,
        d_sae=d_sae,
        k=k,
        recipe=options,
        train=asdict(train),
        sample=_SAMPLE,
        **logging,
    )
    known = [store.metadata[name] for name in ("model", "site", "layer") if name in store.metadata]
    folder = run_folder([*known, d_sae, recipe.init], key)
    assert not isinstance(d_init, str)  # "auto" was the only one that `initialize` takes
    return TrainedRun(recipe, config, train, d_init, d_init or automatic, folder)


def _train(
    store: ActivationStore | PairedStores,
    runs: Sequence[TrainedRun],
    options: Mapping[str, Any],
    device: torch.device,
    progress: bool,
) -> None:
    """Train what is missing: together where dictionaries read the same rows."""
    for r in dict.fromkeys(run.subspace for run in runs):
        rows = SubspaceStore(store, r) if r is not None and isinstance(store, ActivationStore) else store
        train_missing(
            [run for run in runs if run.subspace == r],
            [_SAE],
            rows,
            partial(_start, rows=rows, device=device),
            partial(_save, rows=rows),
            progress=progress,
            **options,
        )


def _start(
    run: TrainedRun, rows: ActivationStore | PairedStores, device: torch.device
) -> tuple[Trainer, dict[str, Any]]:
    recipe, sae = run.recipe, _untrained(run, rows)
    l0 = recipe.sparsity.initial_l0 if sae.activation.has_threshold else None
    drift, search = None, "exact"
    report: InitReport | TranscoderInitReport
    if isinstance(rows, PairedStores):
        assert isinstance(sae, Transcoder)
        assert recipe.reader is not None  # `_run` has seen to it
        report = initialize_transcoder(sae, rows, recipe.init, recipe.reader, run.d_init, initial_l0=l0)
    else:
        # Inside the subspace any direction is one of ASI's.
        method, d_init = (recipe.init, run.d_init) if run.subspace is None else ("random", None)
        sample = rows.sample(min(_SAMPLE, rows.n))
        b_dec = "mean" if recipe.center else "zeros"
        center: dict[str, Any] = {"center": recipe.center, "b_dec": b_dec}
        report = initialize(sae, method, rows.spectrum, d_init, sample, initial_l0=l0, **center)
        # Of all, also those that did not begin there; inside the subspace there is nowhere else to go.
        drift, search = Drift(rows.spectrum, min(run.d_active, rows.d)), recipe.search
    about = {"format": FORMAT, "recipe": asdict(recipe), "initialization": asdict(report)}
    return Trainer(sae.to(device), run.train, recipe.sparsity, drift, search=search), about


def _untrained(run: TrainedRun, rows: ActivationStore | PairedStores) -> SparseAutoencoder:
    if isinstance(rows, PairedStores):
        return Transcoder(run.config)
    return SparseAutoencoder(replace(run.config, d_in=rows.d))


def _save(run: TrainedRun, trainer: Trainer, rows: ActivationStore | PairedStores) -> dict[str, Any]:
    """Put the trained dictionary into the run's folder, at full width."""
    if not isinstance(rows, SubspaceStore):
        trainer.sae.save(run.folder / _SAE)
        return {}
    expand(trainer.sae, rows.basis, rows.center).save(run.folder / _SAE)
    return {"discarded": rows.discarded}


def run_folder(words: Iterable[object], key: str) -> Path:
    """The folder of a run under a key of all that it depends on; `words` are for those who look there."""
    return cache_dir("runs") / re.sub(r"[^\w.-]+", "-", "-".join([*map(str, words), key]))


@contextmanager
def alone(folders: Iterable[Path]) -> Iterator[None]:
    """Hold the folders of runs; a process that wants one of them too waits, and then finds it finished."""
    with ExitStack() as stack:
        # In one order, so that two processes never wait for each other.
        for folder in sorted(set(folders)):
            stack.enter_context(locked(folder))
        yield


def finish(folder: Path, about: Mapping[str, Any]) -> None:
    """Mark a run as finished: everything else is in its folder by now. `about` are JSON values."""
    with write_whole(folder / FINISHED_FILE) as temporary:
        temporary.write_text(json.dumps(about, indent=1), encoding="utf-8")
    # Moments of the optimizer: three times the weights, for nothing once they are trained.
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def is_finished(folder: Path, needed: Iterable[str]) -> bool:
    """Whether a run is marked as finished. Raises CacheError if it is, but files that it needs are missing.

    The mark of earlier versions, `run.json`, is renamed where it is found.
    """
    earlier = folder / _EARLIER_FILE
    if earlier.exists() and not (folder / FINISHED_FILE).exists():
        earlier.rename(folder / FINISHED_FILE)
    if not (folder / FINISHED_FILE).exists():
        return False
    for name in needed:
        if not (folder / name).exists():
            raise CacheError(
                f"{folder / FINISHED_FILE} tells of a finished run, but {folder / name} is missing; "
                f"delete {folder}"
            )
    return True


def about_run(folder: Path) -> dict[str, Any]:
    """What a finished run says of itself."""
    return json.loads((folder / FINISHED_FILE).read_text(encoding="utf-8"))
