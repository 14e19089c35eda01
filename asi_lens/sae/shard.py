"""Dictionaries split over the ranks of a mesh: each rank holds a part of the features."""

from __future__ import annotations

from dataclasses import replace

import torch

from asi_lens.base.errors import require
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.kinds import KINDS, kinds_with
from asi_lens.training.mesh import Mesh


def part_of(config: SAEConfig, mesh: Mesh) -> SAEConfig:
    """Return the configuration of this rank's part of a dictionary.

    Raises OptionError for a kind that does not run over ranks, features that cannot be split evenly, or fewer
    than k features on a rank.
    """
    if mesh.config.size > 1:
        allowed = f"{kinds_with('over_ranks')} over several ranks"
        require(KINDS[config.activation].over_ranks, "activation", config.activation, allowed)
    first, last = mesh.features(config.d_sae)
    least = f"at least k={config.k} times model={mesh.config.model}"
    require(last - first >= config.k, "d_sae", config.d_sae, least)
    return replace(config, d_sae=last - first)


@torch.no_grad()
def shard(sae: SparseAutoencoder, mesh: Mesh) -> SparseAutoencoder:
    """Return a dictionary with copies of this rank's features. b_dec and buffers are copied whole.

    Raises OptionError as `part_of` does.
    """
    out = type(sae)(part_of(sae.config, mesh), draw=False, dtype=sae.W_dec.dtype)
    first, last = mesh.features(sae.d_sae)
    out.encoder_rows.copy_(sae.encoder_rows[first:last])
    out.b_enc.copy_(sae.b_enc[first:last])
    out.W_dec.copy_(sae.W_dec[first:last])
    out.b_dec.copy_(sae.b_dec)
    for name, buffer in sae.named_buffers():
        out.get_buffer(name).copy_(buffer)
    out.initialization = dict(sae.initialization)
    return out.to(sae.W_dec.device)
