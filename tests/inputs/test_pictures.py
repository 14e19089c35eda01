"""Pictures: files and arrays, what becomes of transparency and orientation, patches without CLS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_plain
import torch
from PIL import Image

import asi_lens as al
from asi_lens.base.errors import DataError, UnsupportedModelError
from asi_lens.inputs import models, pictures

pytestmark = pytest.mark.model_facing

BEFORE = {"vit": 1, "dinov2": 1, "deit": 2, "dinov2-registers": 5, "clip-vision": 1, "siglip-vision": 0}
"""Positions before the patches: CLS, distillation and register tokens."""


@pytest.mark.parametrize("kind", BEFORE)
def test_patches_are_rows_and_tokens_before_them_are_not(kind: str, plain: Any) -> None:
    inputs = al.load_inputs(small_plain.pictures(8), plain(kind))
    side = 2 if "dinov2" in kind else 4
    assert inputs.context == BEFORE[kind] + side**2
    assert inputs.kept[0].tolist() == [False] * BEFORE[kind] + [True] * side**2


def test_tokens_after_the_patches_are_not_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {**small_plain._WIDE, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 6}
    monkeypatch.setitem(small_plain.KINDS, "yolos", ("YolosModel", "YolosConfig", sizes))
    model = al.load_model(small_plain.build("yolos", tmp_path / "yolos"), dtype="float32", device="cpu")
    inputs = al.load_inputs(small_plain.pictures(8), model)
    assert inputs.kept[0].tolist() == [False] + [True] * 16 + [False] * 6


@pytest.mark.parametrize("changed", [range(17), range(1, 16), [*range(1, 9), *range(10, 18)]])
def test_positions_that_are_not_known_to_be_patches(
    changed: list[int], plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(model: Any, given: Any, found: dict[str, Any], **options: Any) -> None:
        x = torch.zeros(2, 20, 3)
        x[1, list(changed), 1] = 1.0
        found["blocks.0.hook_resid_pre"](x)

    monkeypatch.setattr(pictures.hooks, "forward", forward)
    told = f"20 positions, of which {len(changed)} depend on the picture, for 16 patches"
    with pytest.raises(UnsupportedModelError, match=told):
        al.load_inputs(small_plain.pictures(3), plain("vit"))


def test_each_row_is_its_own_patch(plain: Any) -> None:
    """Changing a patch changes, before any attention, its own row and no other."""
    model = plain("vit")
    inputs = al.load_inputs(small_plain.pictures(3), model)
    pixels = inputs.arrays["pixel_values"][:1].clone()
    pixels[0, :, 8:16, 16:24] += 1  # second row, third column of 4 x 4 patches
    streams: list[torch.Tensor] = []
    hooks = {"blocks.0.hook_resid_pre": lambda x: streams.append(x.clone())}
    for values in (inputs.arrays["pixel_values"][:1], pixels):
        models.forward(model, {"pixel_values": values}, hooks)
    before, after = (stream[0][inputs.kept[0]] for stream in streams)
    changed = (before != after).any(1).nonzero().flatten()
    assert changed.tolist() == [1 * 4 + 2]


def test_pixels_are_the_processors(plain: Any) -> None:
    model = plain("vit")
    picture = small_plain.pictures(1, size=(32, 32))[0]
    inputs = al.load_inputs([picture] * 2, model)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    wanted = ((torch.from_numpy(picture).float() / 255 - mean) / std).permute(2, 0, 1)
    torch.testing.assert_close(inputs.arrays["pixel_values"][0], wanted, rtol=1e-5, atol=1e-5)


def test_files_arrays_and_images_are_one_picture(plain: Any, tmp_path: Path) -> None:
    array = small_plain.pictures(1)[0]
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/1.png", "b/2.PNG", ".hidden/3.png"):
        Image.fromarray(array).save(tmp_path / name, format="png")
    (tmp_path / "readme.md").write_text("not a picture")
    inputs = al.load_inputs(tmp_path, plain("vit"))
    given = al.load_inputs([array, Image.fromarray(array)], plain("vit"), name=tmp_path.name)
    assert len(inputs) == 2
    assert inputs.fingerprint == given.fingerprint
    assert inputs.corpus == tmp_path.name
    assert len(al.load_inputs([tmp_path / "b/1.png", torch.from_numpy(array)], plain("vit"))) == 2


def test_transparent_parts_are_white_and_pictures_upright(tmp_path: Path) -> None:
    clear = np.zeros((4, 6, 4), np.uint8)
    clear[:2, :, 3] = 255  # an opaque black half above a transparent one
    found = np.asarray(pictures.open_picture(Image.fromarray(clear), "x"))
    assert (found[:2] == 0).all()
    assert (found[2:] == 255).all()
    lying = Image.fromarray(small_plain.pictures(1, size=(4, 6))[0])
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    lying.save(tmp_path / "lying.png", exif=exif)
    turned = np.asarray(pictures.open_picture(tmp_path / "lying.png", "x"))
    assert (turned == np.rot90(np.asarray(lying), -1)).all()
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert (np.asarray(pictures.open_picture(grey, "x")) == grey[..., None]).all()


def test_what_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    whole = tmp_path / "whole.png"
    Image.fromarray(small_plain.pictures(1)[0]).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:200])
    deep = Image.fromarray(np.zeros((4, 4), np.uint16))
    for wrong in (
        tmp_path / "text.png",
        tmp_path / "cut.png",
        tmp_path / "absent.png",
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((3, 4, 4, 3), np.uint8),
        deep,
        None,
    ):
        with pytest.raises(DataError, match="the picture is"):
            pictures.open_picture(wrong, "the picture")


def test_a_size_that_the_model_does_not_take(plain_folder: Any, tmp_path: Path) -> None:
    for file in plain_folder("vit").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    small_plain._processor(24).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="24 x 24 pixels, does not fit the model"):
        al.load_inputs(small_plain.pictures(3), al.load_model(tmp_path, dtype="float32"))
