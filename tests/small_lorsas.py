"""A small Lorsa of a tiny model's layer, for the tests of its parts."""

from __future__ import annotations

from typing import Any

import torch

from asi_lens.inputs import models
from asi_lens.lorsa.attention import READ_SITE, write_site
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.initialize import initialize_lorsa
from asi_lens.lorsa.lorsa import Lorsa, LorsaConfig
from asi_lens.training.config import TrainConfig

LAYER, CONTEXT, N_OV, K = 1, 32, 96, 6


def config(model: Any, **changes: Any) -> LorsaConfig:
    return LorsaConfig.of(model, LAYER, **{"n_ov": N_OV, "k": K, "context": CONTEXT, **changes})


def started(
    model: Any, sample: SequencePairs, method: str = "asi", *, dtype: Any = torch.float32, **changes: Any
) -> Lorsa:
    """An initialized one; `changes` are of the configuration."""
    lorsa = Lorsa(config(model, **changes), dtype=dtype)
    initialize_lorsa(lorsa, model, LAYER, sample, method, 4 if method == "asi" else None)
    return lorsa


def quick(sequences: int = 4, steps: int = 30, **changes: Any) -> TrainConfig:
    size = sequences * (CONTEXT - 1)
    defaults = {"batch_size": size, "n_tokens": size * steps, "warmup_steps": 3, "lr": 3e-3}
    return TrainConfig(**{**defaults, "dead_window": 2 * size, **changes})


def read_and_written(model: Any, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the attention layer reads and writes on token ids."""
    names = (models.hook_name(model, READ_SITE, layer), write_site(model, layer))
    found: dict[str, torch.Tensor] = {}
    models.forward(model, ids, {name: (lambda x, name=name: found.__setitem__(name, x)) for name in names})
    return found[names[0]].clone(), found[names[1]].clone()
