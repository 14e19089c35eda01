"""Measurements of the notebook on architectures: ranks of parts of the data, W_O on the first part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from asi_lens.activations.batch_rows import Given
from asi_lens.activations.harvest import layer_at
from asi_lens.activations.harvest_store import harvest_stores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import require, require_whole
from asi_lens.base.sites import CROSS, SITES
from asi_lens.collapse.output_projection import counterfactual_records, overlap_records
from asi_lens.collapse.spectra import collect_spectra
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.media_inputs import Inputs
from asi_lens.inputs.verify import verification


class Measured(NamedTuple):
    """Rows of one model, as mappings."""

    ranks: list[dict[str, Any]]
    """`RankRow`s of every layer, site and part; of a decoder, those of its cross-attention among them."""
    projections: list[dict[str, Any]]
    """`OutputProjectionRow`s of the first part."""
    overlaps: list[dict[str, Any]]
    """`HeadOverlapRow`s of the first part."""
    cross_projections: list[dict[str, Any]]
    """`OutputProjectionRow`s of a decoder's cross-attention, first part; empty for any other model."""
    cross_overlaps: list[dict[str, Any]]
    """`HeadOverlapRow`s of a decoder's cross-attention, first part; empty for any other model."""


def cross_sites(model: nn.Module) -> list[str]:
    """Return the sites of a decoder's attention to its encoder; none for any other model."""
    found = verification(model).sites
    return [site for site in CROSS if (site, 0) in found]


def joined(measured: Sequence[Measured]) -> Measured:
    """Return the rows of several models, one model after the other."""
    return Measured(*(list(itertools.chain(*rows)) for rows in zip(*measured, strict=True)))


def overview(ranks: pd.DataFrame) -> pd.DataFrame:
    """Return means over layers and parts by model and site: width, positions, positions for each direction of
    the width, effective rank over width. Takes `RankRow`s."""
    ranks = ranks.assign(rows_per_direction=ranks.n_tokens / ranks.d)
    shown = ["d", "n_tokens", "rows_per_direction", "effective_rank_fraction"]
    return ranks.groupby(["model", "site"], sort=False)[shown].mean()


def stores(
    model: nn.Module, train: Given, held_out: Given, site: str, layer_fraction: float, budget_gb: float
) -> list[tuple[ActivationStore, ActivationStore]]:
    """Return a training and a held-out store of `site`, and two of a decoder's `cross_attn_out`.

    `layer_fraction` is the layer's share of the depth. Raises as `harvest_stores`.
    """
    names = [site, *(one for one in cross_sites(model) if CROSS[one].in_stream)]
    places = [(name, layer_at(model, layer_fraction)) for name in names]
    found = [harvest_stores(model, data, places, budget_gb=budget_gb) for data in (train, held_out)]
    return [(found[0][place], found[1][place]) for place in places]


def measure(model: nn.Module, data: Tokens | Inputs, parts: int, draws: int, seed: int) -> Measured:
    """Return ranks of `parts` parts of the data, and of changes to W_O on the first part.

    Parts are consecutive, have the same number of items (sequences, pictures, clips) and no item in common; a
    remainder is left out. Their column `corpus` is the data's name and the part's number.

    Args:
        draws, seed: of the random changes to W_O (`counterfactual_records`).

    Raises OptionError for more parts than items, and as `collect_spectra`.
    """
    require_whole("parts", parts, 1)
    require(parts <= len(data), "parts", parts, f"at most the number of items, {len(data)}")
    step = len(data) // parts
    found = Measured([], [], [], [], [])
    crossed = cross_sites(model)
    for number in range(parts):
        spectra = collect_spectra(model, data[number * step : (number + 1) * step], [*SITES, *crossed])
        name = {"corpus": f"{data.corpus}, part {number + 1}"}
        found.ranks.extend({**row, **name} for row in spectra.records())
        if number == 0:
            tables = {"z": (found.projections, found.overlaps)}
            if "cross_z" in crossed:
                tables["cross_z"] = (found.cross_projections, found.cross_overlaps)
            for site, (projections, overlaps) in tables.items():
                changed = counterfactual_records(model, spectra, draws=draws, seed=seed, site=site)
                angles = overlap_records(model, spectra, seed=seed, site=site)
                projections.extend({**row, **name} for row in changed)
                overlaps.extend({**row, **name} for row in angles)
    return found
