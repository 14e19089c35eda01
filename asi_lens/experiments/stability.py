"""Whether active subspaces and features stay put: between texts, layers, and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from asi_lens.activations.shaped import LinearStore
from asi_lens.activations.spectrum import Spectrum
from asi_lens.activations.store import ActivationStore
from asi_lens.base.cache import cached_jsons
from asi_lens.base.errors import require
from asi_lens.collapse.spectra import Spectra
from asi_lens.collapse.subspaces import direct_rotation, overlap
from asi_lens.experiments.runs import TrainedRun, started
from asi_lens.inputs.models import resolve_device
from asi_lens.results.rows import DeadFeatureRow
from asi_lens.results.stability_rows import Against, Inputs, OverlapRow, SeedMatchRow, TransferRow
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.firings import codes_in_order
from asi_lens.sae.matching import match_features

ALIKE = 0.7
"""Cosine of decoder rows from which two features count as alike."""
# Raise it when a change to the code changes the numbers of a match.
_FORMAT = 1


def overlap_rows(
    own: Spectra, half: Spectra, others: Sequence[Spectra], *, site: str, layer: int, r: int
) -> list[OverlapRow]:
    """Return overlaps of `own`'s top r directions at every layer with those of other spectra.

    Args:
        own: spectra of a text. half: of the next part of the same text: the floor.
        others: of other texts, by the same model.
        site, layer: the site; the layer that all layers of `own` are compared with.
        r: dimensions of all subspaces.

    Raises OptionError for an `r` out of range, KeyError for spectra without the site or a layer.
    """
    layers = [n for name, n in own if name == site]
    rows = [_overlap(own, n, half[site, n], "half", half.corpus, site, r) for n in layers]
    for other in others:
        rows += [_overlap(own, n, other[site, n], "text", other.corpus, site, r) for n in layers]
    told, reference = f"layer {layer}", own[site, layer]
    return rows + [_overlap(own, n, reference, "layer", told, site, r) for n in layers if n != layer]


def _overlap(
    own: Spectra, layer: int, other: Spectrum, against: Against, name: str, site: str, r: int
) -> OverlapRow:
    spectrum = own[site, layer]
    mine, covariance = spectrum.active_subspace(r), other.covariance
    found = overlap(mine, other.active_subspace(r))
    inside = (mine.T @ covariance.to(mine) @ mine).diagonal().sum() / covariance.diagonal().sum()
    return OverlapRow(
        model=own.model.name,
        corpus=own.corpus,
        n_tokens=spectrum.n + spectrum.left_out,
        site=site,
        layer=layer,
        against=against,
        other=name,
        width=spectrum.d,
        r=r,
        **asdict(found),
        captured=inside.item(),
        captured_by_its_own=other.explained_variance(r),
    )


@dataclass(frozen=True)
class Reading:
    """Held-out activations of a text as a dictionary reads them."""

    text: str
    inputs: Inputs
    """As in `TransferRow`."""
    store: ActivationStore

    def rows(self, found: Sequence[DeadFeatureRow]) -> list[TransferRow]:
        """Return the held-out rows among `found` as rows of this text."""
        about: dict[str, Any] = {"text": self.text, "inputs": self.inputs}
        return [TransferRow(**vars(row), **about) for row in found if row.split == "held_out"]


def readings(
    text: str,
    store: ActivationStore,
    other: Spectrum,
    own: Spectrum,
    r: int,
) -> list[Reading]:
    """Return a text's held-out rows as they are, with the mean of `own`, and rotated onto its subspace.

    The maps follow from the spectra alone: `other` of this text, `own` of the training text. Rotated rows
    are R (x - mean of other) + mean of own, with R the direct rotation of their top r directions. Distances
    do not change, so the FVU stays in raw units. Raises as `direct_rotation`.
    """
    one = torch.eye(own.d, dtype=torch.float64)
    R = direct_rotation(other.active_subspace(r).cpu(), own.active_subspace(r).cpu())
    mean, target = other.mean.to(one), own.mean.to(one)
    # A store maps rows by (x - center) M, so what is added stands in the center.
    return [
        Reading(text, "as they are", store),
        Reading(text, "its own mean", LinearStore(store, one, mean - target)),
        Reading(text, "rotated", LinearStore(store, R.T, mean - target @ R)),
    ]


def match_rows(
    runs: Sequence[TrainedRun], store: ActivationStore, held_out: ActivationStore
) -> list[SeedMatchRow]:
    """Return matches of every two seeds of each recipe, at the start and after training, from the cache if
    they were made before.

    `store`: rows that the runs were trained on. Raises OptionError for recipes of a single seed, and as
    `at_start` and `match_features`.
    """
    by_recipe: dict[str, list[TrainedRun]] = {}
    for run in runs:
        by_recipe.setdefault(run.recipe.name, []).append(run)
    require(len(by_recipe) > 0, "runs", [], "two seeds or more of a recipe")
    for name, own in by_recipe.items():
        require(len(own) > 1, "runs", f"one seed of {name}", "two seeds or more of each recipe")
    pairs = [pair for own in by_recipe.values() for pair in combinations(own, 2)]
    cases = [(a, b, trained) for trained in (False, True) for a, b in pairs]
    keys = [
        {
            "format": _FORMAT,
            "runs": [a.folder.name, b.folder.name],
            "trained": trained,
            "held_out": held_out.fingerprint,
            "alike": ALIKE,
        }
        for a, b, trained in cases
    ]

    def compute(missing: list[int]) -> list[dict[str, Any]]:
        kept: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}

        def decoder(run: TrainedRun, trained: bool) -> tuple[Tensor, Tensor]:
            key = (run.folder.name, trained)
            if key not in kept:
                sae = run.sae().to(resolve_device("auto")) if trained else at_start(run, store)
                kept[key] = sae.W_dec.detach(), fires(sae, held_out)
            return kept[key]

        return [_match(*(decoder(run, cases[i][2]) for run in cases[i][:2])) for i in missing]

    found = cached_jsons("matches", keys, compute)
    return [_row(a, b, trained, held_out, one) for (a, b, trained), one in zip(cases, found, strict=True)]


def at_start(run: TrainedRun, store: ActivationStore) -> SparseAutoencoder:
    """Return the dictionary of a run as it was before its first step, made anew.

    `store`: rows that the run was trained on. Raises OptionError for a run inside the subspace, on whitened
    inputs or of a transcoder, whose rows are others.
    """
    recipe = run.recipe
    fits = not recipe.inside and recipe.whiten is None and recipe.reader is None
    require(fits, "recipe", recipe.name, "an autoencoder's, at full width, on the store's rows")
    return started(run, store, resolve_device("auto"), None)[0].sae


@torch.no_grad()
def fires(sae: SparseAutoencoder, store: ActivationStore) -> Bool[Tensor, " d_sae"]:
    """Return which features fire on any row of a store."""
    out = torch.zeros(sae.d_sae, dtype=torch.bool)
    for _, code in codes_in_order(sae, store):
        out[code.indices[code.values > 0]] = True
    return out.to(sae.W_dec.device)


def _match(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> dict[str, Any]:
    (W_a, fires_a), (W_b, fires_b) = a, b
    found = match_features(W_a, W_b)
    both = fires_a & fires_b[found.partner]
    return {
        "matched": found.cosine.mean().item(),
        "gap": found.gap,
        "best": found.best,
        "alike": (found.cosine >= ALIKE).float().mean().item(),
        "alive": both.float().mean().item(),
        "matched_alive": found.cosine[both].mean().item() if bool(both.any()) else None,
    }


def _row(
    a: TrainedRun, b: TrainedRun, trained: bool, held_out: ActivationStore, found: Mapping[str, Any]
) -> SeedMatchRow:
    about = {**held_out.metadata, **a.config.metadata}
    return SeedMatchRow(
        **{name: about[name] for name in ("model", "corpus", "site", "layer")},
        method=a.recipe.name,
        d_sae=a.config.d_sae,
        k=a.config.k,
        seed=a.seed,
        other_seed=b.seed,
        tokens=a.train.n_tokens if trained else 0,
        **found,
    )
