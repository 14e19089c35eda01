"""Measurements of the notebook on architectures: ranks of parts of the data, W_O on the first part."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from asi_lens.base.errors import require, require_whole
from asi_lens.collapse.output_projection import counterfactual_records, overlap_records
from asi_lens.collapse.spectra import collect_spectra
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.media_inputs import Inputs


class Measured(NamedTuple):
    """Rows of one model, as mappings."""

    ranks: list[dict[str, Any]]
    """`RankRow`s of every layer, site and part."""
    projections: list[dict[str, Any]]
    """`OutputProjectionRow`s of the first part."""
    overlaps: list[dict[str, Any]]
    """`HeadOverlapRow`s of the first part."""


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
    found = Measured([], [], [])
    for number in range(parts):
        spectra = collect_spectra(model, data[number * step : (number + 1) * step])
        name = {"corpus": f"{data.corpus}, part {number + 1}"}
        found.ranks.extend({**row, **name} for row in spectra.records())
        if number == 0:
            changed = counterfactual_records(model, spectra, draws=draws, seed=seed)
            found.projections.extend({**row, **name} for row in changed)
            found.overlaps.extend({**row, **name} for row in overlap_records(model, spectra, seed=seed))
    return found
