"""What tests of models and of forwards share."""

from __future__ import annotations

from typing import Any

import torch

from asi_lens.inputs import models

N_LAYERS = 3
"""Of every tiny model."""


def recorded(
    model: Any, ids: torch.Tensor, names: dict[Any, str], **options: Any
) -> tuple[dict[Any, torch.Tensor], torch.Tensor | None]:
    """Activations by key of `names` (key -> hook name), and what `forward` returned."""
    values: dict[Any, torch.Tensor] = {}
    hooks = {name: (lambda x, key=key: values.__setitem__(key, x)) for key, name in names.items()}
    return values, models.forward(model, ids, hooks, **options)


def all_sites(model: Any) -> dict[tuple[str, int], str]:
    return {(s, layer): models.hook_name(model, s, layer) for s in models.SITES for layer in range(N_LAYERS)}
