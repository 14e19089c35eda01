"""Activations made of known features inside a subspace: does a dictionary find the right ones?

x = sum_i a_i f_i + noise. The f_i are unit directions, uniform inside a random subspace of r dimensions.
Feature i is active on a row with probability p_i, proportional to 1 / i (Zipf), with a value a_i uniform
between 1 and 2. Isotropic noise holds a share of the variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import require, require_whole
from asi_lens.experiments.recipes import find_recipe
from asi_lens.experiments.rows import dead_feature_rows
from asi_lens.experiments.runs import TrainedRun, train_recipes
from asi_lens.results.beyond_rows import KnownFeatureRow
from asi_lens.sae.firings import find_firings
from asi_lens.sae.matching import match_features
from asi_lens.training.config import TrainConfig

MODEL = "known features"
FOUND = 0.9
"""Cosine with the true direction from which a feature is recovered."""
NOISE = 0.02
"""Share of the variance that the noise adds."""
_MOST_OFTEN = 0.5
_BLOCK = 8192
_FIFTHS = 5


@dataclass(frozen=True)
class KnownFeatures:
    """True features of made-up activations.

    Attributes:
        directions: unit rows [n d]. frequencies: shares of rows on which each is active [n], falling.
        r: dimensions of the subspace. seed: seed of the directions and of every draw of rows.
    """

    directions: Float[Tensor, "n d"]
    frequencies: Float[Tensor, " n"]
    r: int
    seed: int

    def store(self, n_rows: int, part: int) -> ActivationStore:
        """Return a store of `n_rows` rows, drawn independently for each number `part`."""
        generator = torch.Generator().manual_seed(2 * (1_000 * self.seed + part) + 1)
        blocks = []
        for begin in range(0, n_rows, _BLOCK):
            n = min(_BLOCK, n_rows - begin)
            shape = (n, len(self.directions))
            active = torch.rand(shape, generator=generator) < self.frequencies
            blocks.append((active * (1 + torch.rand(shape, generator=generator))) @ self.directions)
        rows = torch.cat(blocks)
        deviation = (NOISE * rows.var(0).mean()).sqrt()
        rows += deviation * torch.randn(rows.shape, generator=generator)
        about = {"model": MODEL, "corpus": f"rank {self.r}", "site": "known", "layer": 0}
        return ActivationStore.from_tensor(rows, {**about, "truth": self.seed, "part": part})


def known_features(width: int, r: int, n_features: int, n_active: float | int, seed: int) -> KnownFeatures:
    """Return true features of which `n_active` are active on a row, on average.

    Each is active on at most half of the rows, so with few features the average is lower.

    Raises OptionError for numbers out of range.
    """
    for name, value in (("width", width), ("n_features", n_features)):
        require_whole(name, value, 2)
    require(1 <= r <= width, "r", r, f"from 1 to width={width}")
    require(0 < n_active < n_features, "n_active", n_active, f"above 0 and below n_features={n_features}")
    generator = torch.Generator().manual_seed(2 * seed)
    square = torch.randn(width, width, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q[:, :r]
    drawn = torch.randn(n_features, r, generator=generator, dtype=torch.float64) @ basis.T
    rare = 1 / torch.arange(1, n_features + 1)
    frequencies = (n_active * rare / rare.sum()).clamp(max=_MOST_OFTEN)
    return KnownFeatures(torch.nn.functional.normalize(drawn).float(), frequencies, r, seed)


def known_feature_rows(
    ranks: Sequence[int],
    *,
    width: int,
    n_features: int,
    n_active: int,
    n_rows: int,
    n_held_out: int,
    seeds: Sequence[int],
    train: TrainConfig,
    methods: Sequence[str] = ("random", "ASI"),
    log_every: int = 64,
    progress: bool = True,
) -> list[KnownFeatureRow]:
    """Return what dictionaries of `n_features` features (k = `n_active`) find, at each rank and seed.

    Each seed has its own true features and rows. Raises OptionError as `known_features`, UnknownNameError for
    a method that is not in `RECIPES`, and the errors of training.
    """
    out = []
    for r in ranks:
        for seed in seeds:
            truth = known_features(width, r, n_features, n_active, seed)
            store, held_out = truth.store(n_rows, 0), truth.store(n_held_out, 1)
            runs = train_recipes(
                store,
                [find_recipe(name) for name in methods],
                d_sae=n_features,
                k=n_active,
                seeds=[seed],
                train=replace(train, seed=seed),
                log_every=log_every,
                progress=progress,
            )
            found = dead_feature_rows(runs, held_out, curves=False, progress=progress)
            ends = {row.method: row for row in found if row.split == "held_out"}
            for run in runs:
                end = ends[run.recipe.name]
                out += _rows(run, truth, store, held_out, {"silent": end.dead_fraction, "fvu": end.fvu})
    return out


def _rows(
    run: TrainedRun,
    truth: KnownFeatures,
    store: ActivationStore,
    held_out: ActivationStore,
    whole: dict[str, Any],
) -> list[KnownFeatureRow]:
    """Return a row for all true features, and one for each fifth."""
    sae = run.sae()
    match = match_features(truth.directions, sae.W_dec.detach())
    good = match.cosine >= FOUND
    fires = find_firings(sae, held_out, top=1, sampled=1, progress=False).counts > 0
    live = fires[match.partner]
    about: dict[str, Any] = {
        "model": MODEL,
        "corpus": held_out.metadata["corpus"],
        "n_tokens": store.n,
        "width": store.d,
        "r": truth.r,
        "effective_rank_fraction": store.spectrum.effective_rank_fraction,
        "method": run.recipe.name,
        "d_init": run.d_init,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "lr": run.train.lr,
        "seed": run.seed,
    }
    whole["live_recovered"] = (good & live).sum().item() / max(1, int(live.sum()))
    part: dict[str, Any] = dict.fromkeys(whole)
    groups = {None: torch.arange(len(good))}
    groups |= dict(enumerate(torch.arange(len(good)).tensor_split(_FIFTHS), start=1))  # type: ignore[arg-type]
    return [
        KnownFeatureRow(
            **about,
            fifth=fifth,
            n_features=len(own),
            frequency=truth.frequencies[own].mean().item(),
            matched=match.cosine[own].mean().item(),
            recovered=good[own].double().mean().item(),
            **(whole if fifth is None else part),
        )
        for fifth, own in groups.items()
    ]
