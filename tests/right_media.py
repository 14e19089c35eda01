"""Right arguments of the public functions that load what is no text (see `right_inputs`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import small_plain
import torch
from small_world import World

import asi_lens as al


def _encoder(world: World) -> Any:
    """A model of sequences."""
    if "encoder" not in world.kept:
        world.kept["encoder"] = al.load_model(small_plain.build("bert-model", world.root / "encoder"))
    return world.kept["encoder"]


def _load_inputs(world: World) -> tuple[Callable[..., Any], dict[str, Any]]:
    data = {"data": ["ACDEFGHIKLMNPQ"] * 4, "model": _encoder(world), "n_rows": 30}
    return al.load_inputs, {**data, "offset": 1, "name": "c", "join": False}


def _inputs(world: World) -> tuple[Callable[..., Any], dict[str, Any]]:
    kept = torch.ones(2, 3, dtype=torch.bool)
    given = {"arrays": {"x": torch.ones(2, 3)}, "kept": kept, "corpus": "c", "kind": "sequences"}
    return al.Inputs, {**given, "tokenizer": "t"}


def _batch(world: World) -> tuple[Callable[..., Any], dict[str, Any]]:
    make, arguments = _inputs(world)
    return make(**arguments).batch, {"items": slice(0, 1)}


DOORS = {"load_inputs": _load_inputs, "Inputs": _inputs, "Inputs.batch": _batch}
