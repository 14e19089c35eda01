"""Dictionaries trained in several ways on one store, side by side: what notebooks 04 to 07 compare.

Every dictionary is trained once. Its weights and training curve stay in the cache under a key of all that
they depend on, so that a notebook that asks again reads them, and one that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from asi_lens.activation_store import ActivationStore
from asi_lens.errors import require, unknown_name
from asi_lens.files import cache_key
from asi_lens.models import resolve_device, resolve_dtype
from asi_lens.run_folders import about_run, finish, is_finished, run_folder
from asi_lens.sae.checkpoints import held
from asi_lens.sae.dictionary import ACTIVATIONS, SAEConfig, SparseAutoencoder
from asi_lens.sae.drift import Drift
from asi_lens.sae.fit import train_together
from asi_lens.sae.initialize import METHODS, InitReport, auto_d_init, initialize
from asi_lens.sae.metrics import METRICS_FILE, Row, read_metrics
from asi_lens.sae.sparsity import SparsityConfig, has_threshold
from asi_lens.sae.subspace import SubspaceStore, expand
from asi_lens.sae.train import Trainer
from asi_lens.sae.train_config import TrainConfig

# Raise it when a change to training, initialization or evaluation makes other numbers of the same options.
FORMAT = 1
_SAE = "sae"
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
    center: bool = True
    """Take the mean out of the input; else it is left in, and `b_dec` starts at zero."""
    inside: bool = False
    """Train on the coordinates in the active subspace alone (`sae.subspace`), for "asi"."""
    activation: str = "topk"
    """As in `SAEConfig`."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """How it is kept sparse (`sae.sparsity`)."""

    def __post_init__(self) -> None:
        if self.init not in METHODS:
            raise unknown_name("initialization method", self.init, METHODS)
        TrainConfig(optimizer=self.optimizer, aux_k=self.aux_k)
        if self.activation not in ACTIVATIONS:
            raise unknown_name("activation", self.activation, ACTIVATIONS)
        fits = not self.inside or (self.init == "asi" and self.d_init is not None and self.center)
        require(fits, "inside", self.inside, "False but for a centered 'asi' with a d_init")


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("random"),
        Recipe("random + AuxK", aux_k="auto"),
        Recipe("ASI", "asi", "auto"),
        Recipe("ASI + sparse Adam", "asi", "auto", "sparse_adam"),
        Recipe("random, not centered", center=False),
        Recipe("inside the subspace", "asi", "auto", inside=True),
    )
}
"""The paper's comparison (C7, C9), what centering alone does, and training in the subspace alone."""


DICTIONARIES = ("TopK", "BatchTopK", "Matryoshka BatchTopK", "JumpReLU", "Gated", "ReLU with L1")
"""Kinds of dictionary that `dictionary_recipe` knows."""


def dictionary_recipe(kind: str, d_sae: int) -> Recipe:
    """A kind of dictionary from a random start, under its own name; `dataclasses.replace` changes the start.

    Matryoshka's prefixes are a sixteenth, an eighth, a quarter and half of the dictionary. Raises
    UnknownNameError for a name that is not in `DICTIONARIES`.
    """
    if kind not in DICTIONARIES:
        raise unknown_name("kind of dictionary", kind, DICTIONARIES)
    prefixes = tuple(d_sae // part for part in (16, 8, 4, 2))
    activation, sparsity = {
        "TopK": ("topk", SparsityConfig()),
        "BatchTopK": ("batchtopk", SparsityConfig()),
        "Matryoshka BatchTopK": ("batchtopk", SparsityConfig(prefixes=prefixes)),
        "JumpReLU": ("jumprelu", SparsityConfig(bandwidth=0.5)),
        "Gated": ("gated", SparsityConfig(coefficient=0.05)),
        "ReLU with L1": ("relu", SparsityConfig(coefficient=0.05)),
    }[kind]
    return Recipe(kind, activation=activation, sparsity=sparsity)


@dataclass(frozen=True)
class Run:
    """One trained dictionary in the cache."""

    recipe: Recipe
    config: SAEConfig
    train: TrainConfig
    d_init: int | None
    """Dimensions that the recipe's `d_init` came to."""
    d_active: int
    """Dimensions that drift is measured in: `d_init`, or what "auto" comes to."""
    folder: Path
    """Holds the dictionary (`sae`), its curve (`metrics.csv`) and what it is (`run.json`)."""

    @property
    def seed(self) -> int:
        """Of the initial directions and of the order of the data."""
        return self.config.seed

    @property
    def subspace(self) -> int | None:
        """Dimensions that it was trained in, none for all."""
        return self.d_init if self.recipe.inside else None

    def history(self) -> list[Row]:
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
    config = SAEConfig(store.d, d_sae, k, recipe.activation, seed, store.metadata)
    train = replace(base, optimizer=recipe.optimizer, aux_k=recipe.aux_k, seed=seed)
    automatic = auto_d_init(store.spectrum)
    d_init = automatic if recipe.d_init == "auto" else recipe.d_init
    key = cache_key(
        format=FORMAT,
        store=store.fingerprint,
        d_sae=d_sae,
        k=k,
        # Recipes of the same options are one run, whatever they are called and however they came to d_init.
        recipe={**asdict(recipe), "name": None, "d_init": d_init},
        train=asdict(train),
        sample=_SAMPLE,
        **logging,
    )
    known = [store.metadata[name] for name in ("model", "site", "layer") if name in store.metadata]
    folder = run_folder([*known, d_sae, recipe.init], key)
    assert not isinstance(d_init, str)  # "auto" was the only one that `initialize` takes
    return Run(recipe, config, train, d_init, d_init or automatic, folder)


def _train(
    store: ActivationStore,
    runs: Sequence[Run],
    logging: Mapping[str, Any],
    device: torch.device,
    progress: bool,
) -> None:
    """Train what is missing: together where dictionaries read the same rows."""
    for r in dict.fromkeys(run.subspace for run in runs):
        missing = {
            run.folder: run
            for run in runs
            if run.subspace == r and not is_finished(run.folder, (METRICS_FILE, _SAE))
        }
        if not missing:
            continue
        rows = store if r is None else SubspaceStore(store, r)
        trainers, reports = [], []
        for run in missing.values():
            trainer, report = _start(run, rows, device)
            trainers.append(trainer)
            reports.append(report)
        train_together(trainers, rows, folders=list(missing), progress=progress, **logging)
        for run, trainer, report in zip(missing.values(), trainers, reports, strict=True):
            _finish(run, trainer.sae, report, rows)


def _start(run: Run, rows: ActivationStore, device: torch.device) -> tuple[Trainer, InitReport]:
    sae = SparseAutoencoder(replace(run.config, d_in=rows.d))
    # Inside the subspace any direction is one of ASI's.
    method, d_init = (run.recipe.init, run.d_init) if run.subspace is None else ("random", None)
    center = run.recipe.center
    report = initialize(
        sae,
        method,
        rows.spectrum,
        d_init,
        rows.sample(min(_SAMPLE, rows.n)),
        center=center,
        b_dec="mean" if center else "zeros",
        initial_l0=run.recipe.sparsity.initial_l0 if has_threshold(sae) else None,
    )
    # Of all, also those that did not begin there; inside the subspace there is nowhere else to go.
    drift = Drift(rows.spectrum, min(run.d_active, rows.d))
    return Trainer(sae.to(device), run.train, run.recipe.sparsity, drift), report


def _finish(run: Run, sae: SparseAutoencoder, report: InitReport, rows: ActivationStore) -> None:
    """Put the trained dictionary into the run's folder, at full width."""
    about = {"format": FORMAT, "recipe": asdict(run.recipe), "initialization": asdict(report)}
    if isinstance(rows, SubspaceStore):
        sae = expand(sae, rows.basis, rows.center)
        about["discarded"] = rows.discarded
    with held(run.folder):
        sae.save(run.folder / _SAE)
        finish(run.folder, about)
