"""Treatments of a dictionary's inputs side by side: raw, centered, and with another spectrum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.shaped import (
    LinearStore,
    ShapedStore,
    flat_head_gains,
    lifted_tail_gains,
    power_gains,
)
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import require
from asi_lens.collapse.centering import dead_at_start, gamma, geometric_median, predicted_dead
from asi_lens.experiments.recipes import Recipe
from asi_lens.inputs.fingerprint import cached_number, number_key
from asi_lens.results.beyond_rows import DoseRow, InputRow, StartRow
from asi_lens.results.dictionary_verdicts import RANKS
from asi_lens.results.rows import DeadFeatureRow

RAW, MEAN, MEDIAN = "raw", "mean", "geometric median"
STARTS: dict[str, tuple[str, str | None]] = {"random": ("random", None), "ASI": ("asi", "auto")}
"""Starts by name: method and d_init."""
# Rows for the geometric median.
_SAMPLE = 8192
# Raise it when a change to the code changes the numbers at the start.
_FORMAT = 1


@dataclass(frozen=True)
class Treatment:
    """One treatment of the inputs: stores to train and to evaluate on, and a recipe for each start."""

    name: str
    train: ActivationStore
    held_out: ActivationStore
    recipes: tuple[Recipe, ...]

    def rows(self, found: Sequence[DeadFeatureRow], raw: ActivationStore) -> list[InputRow]:
        """Return rows of this treatment's runs, with gamma and rank of the raw activations."""
        about: dict[str, Any] = {
            "gamma": gamma(raw.spectrum),
            "effective_rank_fraction": raw.spectrum.effective_rank_fraction,
        }
        return [
            InputRow(**vars(row), input=self.name, start=row.method.split(",")[0], **about) for row in found
        ]


def treatments(train: ActivationStore, held_out: ActivationStore, powers: Sequence[float]) -> list[Treatment]:
    """Return the treatments raw, mean, geometric median, and each power of the spectrum.

    Dictionaries of powers are put back to raw activations (`Recipe.whiten`), so the FVU of all treatments is
    in raw units. Raises DataError for a power of a site with directions of zero variance.
    """
    for power in powers:
        power_gains(train.spectrum, power)  # refuses before anything is trained

    def recipes(name: str, **options: Any) -> tuple[Recipe, ...]:
        return tuple(Recipe(f"{s}, {name}", *STARTS[s], **options) for s in STARTS)

    center = geometric_median(train.sample(min(_SAMPLE, train.n)))
    one = torch.eye(train.d, dtype=torch.float64)
    shifted, held_shifted = (LinearStore(store, one, center) for store in (train, held_out))
    return [
        Treatment(RAW, train, held_out, recipes(RAW, center=False)),
        Treatment(MEAN, train, held_out, recipes(MEAN)),
        Treatment(MEDIAN, shifted, held_shifted, recipes(MEDIAN, center=False)),
        *(Treatment(_power(p), train, held_out, recipes(_power(p), whiten=float(p))) for p in powers),
    ]


def start_rows(
    stores: Mapping[SiteLayer, ActivationStore],
    *,
    d_sae: int,
    k: int,
    powers: Sequence[float],
    seeds: Sequence[int] = (0,),
    progress: bool = True,
) -> list[StartRow]:
    """Return predicted and measured shares of features that never fire at a random start, on whole stores.

    Each store's numbers are cached. Raises OptionError without a store, DataError as `treatments`.
    """
    require(len(stores) > 0, "stores", {}, "one or more")
    options: dict[str, Any] = {"d_sae": d_sae, "k": k, "powers": list(powers), "seeds": list(seeds)}
    out = []
    for (site, layer), store in tqdm(stores.items(), desc="starts", unit="place", disable=not progress):
        key = number_key("", str(store.dtype), store.fingerprint, format=_FORMAT, **options)
        for found in cached_number("starts", key, partial(_at_start, store, **options)):
            out.append(
                StartRow(
                    model=str(store.metadata["model"]),
                    corpus=str(store.metadata["corpus"]),
                    n_tokens=store.n,
                    site=site,
                    layer=layer,
                    d_sae=d_sae,
                    k=k,
                    **found,
                )
            )
    return out


def _at_start(
    store: ActivationStore, d_sae: int, k: int, powers: Sequence[float], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Return what is measured of one store: a mapping for each input and seed."""
    spectrum, rows = store.spectrum, torch.cat(list(store.in_order(8192))).float()
    # All gains come first, so that a site that cannot be whitened is told before anything is measured.
    gains = [(power, power_gains(spectrum, power)) for power in powers]
    return [
        {
            "input": name,
            "seed": seed,
            "gamma": left,
            "effective_rank_fraction": spectrum.effective_rank_fraction,
            "predicted": predicted_dead(left, k, d_sae, len(rows)),
            "dead": dead_at_start(own, k, d_sae, center=center, seed=seed),
        }
        for name, own, center, left in _inputs(store, rows, gains)
        for seed in seeds
    ]


def _inputs(
    store: ActivationStore, rows: Float[Tensor, "n d"], gains: Sequence[tuple[float, Float[Tensor, " d"]]]
) -> Iterator[tuple[str, Float[Tensor, "n d"], Float[Tensor, " d"] | None, float]]:
    """Yield name, rows, center (None: zero) and gamma of each treatment, one copy of the rows at a time."""
    median = geometric_median(rows[:: max(1, len(rows) // _SAMPLE)])
    for name, center in ((RAW, None), (MEAN, store.spectrum.mean), (MEDIAN, median)):
        yield name, rows, center, gamma(store.spectrum, center)
    for power, own in gains:
        yield _power(power), torch.cat(list(ShapedStore(store, own).in_order(8192))), None, 0.0


def _power(power: float | int) -> str:
    return f"power {power:g}"


@dataclass(frozen=True)
class Shape:
    """One change of the spectrum: the stores with it, to train and to evaluate on."""

    name: str
    train: ActivationStore
    held_out: ActivationStore

    def rows(self, found: Sequence[DeadFeatureRow]) -> list[DoseRow]:
        """Return rows of runs on these stores, with the ranks of what they were trained on."""
        ranks = self.train.spectrum.summary()
        about: dict[str, Any] = {name: ranks[name] for name in RANKS}
        return [DoseRow(**vars(row), shape=self.name, width=self.train.d, **about) for row in found]


def shapes(
    train: ActivationStore, held_out: ActivationStore, powers: Sequence[float], *, ends: bool = True
) -> list[Shape]:
    """Return stores of the same tokens whose spectrum alone differs.

    Each power of the spectrum (1: as measured), the leading tenth flattened (the participation ratio rises,
    the tail stays) and the last half lifted (the effective rank rises, the head stays); powers alone unless
    `ends`. Held-out rows are mapped as the training rows.

    Raises DataError for a site with directions of zero variance.
    """
    spectrum = train.spectrum
    gains = {"measured" if p == 1 else _power(p): power_gains(spectrum, p) for p in powers}
    if ends:
        gains |= {"flat head": flat_head_gains(spectrum), "lifted tail": lifted_tail_gains(spectrum)}
    return [
        Shape(name, ShapedStore(train, own), ShapedStore(held_out, own, spectrum))
        for name, own in gains.items()
    ]
