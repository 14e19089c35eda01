"""Pictures to patches: what a vision transformer takes, made by its own image processor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from asi_lens.base.errors import DataError, UnsupportedModelError
from asi_lens.inputs import hooks
from asi_lens.inputs.media_items import Made, label

if TYPE_CHECKING:
    from PIL.Image import Image

    from asi_lens.inputs.plain import PlainModel

# Modes whose conversion to RGB keeps the picture; others hold more than 8 bits a channel, or no colours.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def open_picture(item: Any, name: str) -> Image:
    """Return an RGB picture, upright, transparent parts on white.

    `item`: a file that Pillow reads, a Pillow image, or an array of bytes [height width] or [height width 3].
    Raises DataError for anything else.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(item, Tensor):
        item = item.cpu().numpy()
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or not (item.ndim == 2 or (item.ndim == 3 and item.shape[2] == 3)):
            raise DataError(
                f"{name} is no picture: an array of {item.dtype} {item.shape}, not of uint8 [height width 3]"
            )
        item = Image.fromarray(item)
    if isinstance(item, str | Path):
        try:
            with Image.open(item) as file:
                item = ImageOps.exif_transpose(file)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{name} is no picture that can be read: {error}") from error
    if not isinstance(item, Image.Image):
        raise DataError(f"{name} is no picture: a {type(item).__name__}")
    if item.mode not in _MODES:
        raise DataError(f"{name} is a picture of mode {item.mode!r}; allowed are {', '.join(_MODES)}")
    item = ImageOps.exif_transpose(item)
    if item.mode in ("LA", "PA", "RGBA") or "transparency" in item.info:
        item = item.convert("RGBA")
        item = Image.alpha_composite(Image.new("RGBA", item.size, "white"), item)
    return item.convert("RGB")


def made(model: PlainModel, items: Iterable[Any], offset: int = 0) -> Iterator[Made]:
    """Yield each picture's pixels [channel height width], and which positions are patches.

    One crop of each picture, as the processor cuts it. Positions before and after the patches (CLS, registers
    and detection tokens) are not rows.
    """
    if model.processor is None:
        raise UnsupportedModelError(
            f"the folder of {model.cfg.model_name!r} has no preprocessor_config.json, which says how "
            "pictures become its inputs"
        )
    kept: Tensor | None = None
    first: tuple[int, ...] = ()
    for number, item in itertools.islice(enumerate(items), offset, None):
        name = label("picture", number, item)
        image = open_picture(item, name)
        try:
            pixels = model.processor(images=image, return_tensors="pt")["pixel_values"][0]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{name}: the model's processor refuses it: {error}") from error
        if kept is None:
            kept, first = _patches(model, pixels, name), tuple(pixels.shape)
        if tuple(pixels.shape) != first:
            raise DataError(
                f"{name} becomes {tuple(pixels.shape)}, earlier pictures {first}: the processor does not cut "
                "pictures to one size"
            )
        yield Made({"pixel_values": pixels}, kept)


def _patches(model: PlainModel, pixels: Tensor, name: str) -> Tensor:
    """Return which positions of a model are patches: those that change with the picture before layer 0."""
    (height, width), (down, across) = pixels.shape[1:], model.patch_size
    n = (height // down) * (width // across)
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    try:
        hooks.forward(
            model,
            {"pixel_values": torch.stack([pixels, pixels + noise])},
            {"blocks.0.hook_resid_pre": lambda x: seen.append((x[0] != x[1]).any(-1).cpu())},
            stop_after_layer=0,
        )
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{name}, {height} x {width} pixels, does not fit the model: {error}") from error
    at = seen[0].nonzero().flatten().tolist()
    if seen[0].ndim != 1 or len(at) != n or at[-1] - at[0] != n - 1:
        raise UnsupportedModelError(
            f"{model.cfg.model_name}: {seen[0].numel()} positions, of which {len(at)} depend on the picture, "
            f"for {n} patches; which are patches is not known"
        )
    return seen[0]
