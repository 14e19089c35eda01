"""Where stored rows come from: model, site, layer and corpus, in words and as what was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from asi_lens.base.errors import OptionError
from asi_lens.inputs import models


def require_origin(
    folder: Path,
    origin: Mapping[str, Any],
    model: nn.Module | str | None = None,
    site: str | None = None,
    layer: int | None = None,
) -> None:
    """Raise OptionError unless `origin`, of the store in `folder`, is what was asked for (None: anything)."""
    asked: dict[str, Any] = {}
    fits, detail = True, ""
    if isinstance(model, nn.Module):
        info = models.model_info(model)
        asked["model"] = info.name
        weights = origin.get("weights_fingerprint")
        if weights != info.fingerprint:
            fits, detail = False, f" (weights {weights}, not {info.fingerprint})"
    elif model is not None:
        asked["model"] = model
        fits &= origin.get("model") == model
    if site is not None:
        asked["site"] = site
        fits &= site in (origin.get("site"), origin.get("hook_name"))
    if layer is not None:
        asked["layer"] = layer
        fits &= origin.get("layer") == layer
    if not fits:
        raise OptionError(f"{folder} holds {describe(origin)}, not {describe({**origin, **asked})}{detail}")


def describe(origin: Mapping[str, Any]) -> str:
    """What rows are, in words."""
    words = {key: origin.get(key, "?") for key in ("site", "layer", "model", "corpus")}
    return "{site} of layer {layer} of {model} on {corpus}".format(**words)
