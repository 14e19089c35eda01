"""Folders of dictionaries: ours to the bit, written whole, damage found."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_stores import files
from some_dictionaries import D_SAE, METADATA, D, K, activations, assert_same, theirs, trained_like

from asi_lens.base import safetensors_io
from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.sae import formats
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.formats import load_folder
from asi_lens.sae.threshold import set_threshold

# --- ours -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_round_trip_changes_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = trained_like(dtype)
    with torch.no_grad():
        sae.b_enc[0] = -0.0
    sae.save(tmp_path / "a")
    again = SparseAutoencoder.load(tmp_path / "a")
    assert_same(sae, again)
    again.save(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert torch.equal(sae(activations()), again(activations()))
    assert again.W_dec.requires_grad


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory in use is read from Linux")
def test_writing_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's checkpoint that fits into no memory is exported from mapped files."""
    monkeypatch.setattr(safetensors_io, "_PIECE_BYTES", 2**20)
    sae = SparseAutoencoder(SAEConfig(d_in=256, d_sae=65_536, k=K), draw=False)  # 64 MiB of each weight
    with torch.no_grad():
        sae.W_enc.fill_(0.5)
        sae.W_dec.fill_(0.5)

    def in_use() -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    written = threading.Event()
    peak = before = in_use()

    def watch() -> None:
        nonlocal peak
        while not written.wait(0.001):
            peak = max(peak, in_use())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        sae.save(tmp_path / "a")
    finally:
        written.set()
        watching.join()
    assert peak - before < 16 * 1024  # a mask of one weight has 16 MiB


def test_weights_are_kept_once(tmp_path: Path) -> None:
    trained_like().save(tmp_path / "a")
    own = load_file(tmp_path / "a" / "asi_lens.safetensors")
    assert sorted(own) == ["b_dec", "b_enc", "input_mean", "input_scale"]
    plain = SparseAutoencoder(SAEConfig(d_in=D, d_sae=D_SAE, k=K))
    plain.save(tmp_path / "b")
    assert sorted(load_file(tmp_path / "b" / "asi_lens.safetensors")) == ["input_mean", "input_scale"]
    assert_same(plain, SparseAutoencoder.load(tmp_path / "b"))


def test_the_folded_weights_are_the_same_function_in_both_conventions(tmp_path: Path) -> None:
    sae = trained_like()
    sae.save(tmp_path / "a")
    x = activations()
    values = json.loads((tmp_path / "a" / "cfg.json").read_text())
    weights = load_file(tmp_path / "a" / "sae_weights.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {
        "W_enc": (D, D_SAE),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D),
        "b_dec": (D,),
    }
    torch.testing.assert_close(theirs(values, weights, x).float(), sae(x).detach(), rtol=1e-5, atol=1e-5)
    twin = load_file(tmp_path / "a" / "sae.safetensors")
    assert torch.equal(twin["encoder.weight"].T, weights["W_enc"])
    assert torch.equal(twin["encoder.bias"], weights["b_enc"])
    for name in ("W_dec", "b_dec"):
        assert torch.equal(twin[name], weights[name])
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(D_SAE))


def test_the_shared_configuration_has_what_both_libraries_need(tmp_path: Path) -> None:
    trained_like().save(tmp_path / "a")
    values = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert values["metadata"]["sae_lens_version"] >= "6"
    assert values["metadata"]["model_name"] == "tiny"
    assert values["metadata"]["hook_name"] == "blocks.1.hook_attn_out"
    assert (values["metadata"]["context_size"], values["metadata"]["prepend_bos"]) == (32, True)
    assert (values["k"], values["num_latents"], values["d_sae"], values["d_in"]) == (K, D_SAE, D_SAE, D)
    assert values["normalize_decoder"] is True
    assert values["reshape_activations"] == "none"
    z = trained_like(metadata={**METADATA, "hook_name": "blocks.1.attn.hook_z"})
    z.save(tmp_path / "z")
    assert json.loads((tmp_path / "z" / "cfg.json").read_text())["reshape_activations"] == "hook_z"
    with torch.no_grad():
        z.W_dec.mul_(2)
    z.save(tmp_path / "z")
    assert json.loads((tmp_path / "z" / "cfg.json").read_text())["normalize_decoder"] is False


def test_a_folder_without_our_files_is_read_as_the_same_function(tmp_path: Path) -> None:
    sae = trained_like()
    sae.save(tmp_path / "a")
    for name in ("asi_lens.json", "asi_lens.safetensors"):
        (tmp_path / "a" / name).unlink()
    for kept in ("sae_weights.safetensors", "sae.safetensors"):
        found = load_folder(tmp_path / "a")
        torch.testing.assert_close(found(activations()), sae(activations()), rtol=1e-5, atol=1e-5)
        assert found.config.metadata["hook_name" if kept.startswith("sae_w") else "hf_hook_name"]
        if kept.startswith("sae_w"):
            assert found.config.metadata["context"] == 32
            (tmp_path / "a" / kept).unlink()
            values = json.loads((tmp_path / "a" / "cfg.json").read_text())
            names = ("activation", "num_latents", "k", "d_in", "normalize_decoder", "transcode")
            (tmp_path / "a" / "cfg.json").write_text(json.dumps({name: values[name] for name in names}))


# --- writing ----------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = trained_like()
    sae.save(tmp_path / "a")
    before = files(tmp_path / "a")

    def full(path: Path, tensors: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(formats, "write_tensors", full)
    with torch.no_grad():
        sae.b_dec.zero_()
    with pytest.raises(OSError, match="No space left"):
        sae.save(tmp_path / "a")
    assert files(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_replaced_only_if_nothing_else_is_in_it(tmp_path: Path) -> None:
    sae = trained_like()
    sae.save(tmp_path / "a")
    other = trained_like(seed=9)
    other.save(tmp_path / "a")
    assert_same(load_folder(tmp_path / "a"), other)
    (tmp_path / "a" / "checkpoint.safetensors").write_bytes(b"dear")
    with pytest.raises(OptionError, match=r"holds other files.*checkpoint.safetensors"):
        sae.save(tmp_path / "a")
    assert_same(load_folder(tmp_path / "a"), other)
    with pytest.raises(OptionError, match="holds other files"):
        sae.save(tmp_path / "a" / "checkpoint.safetensors")
    (tmp_path / "empty").mkdir()
    sae.save(tmp_path / "empty")


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="JSON"):
        trained_like(metadata={"folder": tmp_path}).save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    sae = trained_like()
    sae.save(tmp_path / "a")
    before = files(tmp_path / "a")
    with pytest.raises(OptionError, match=r"dtype=torch.bfloat16 .* float32 or float64"):
        trained_like().bfloat16().save(tmp_path / "a")
    pruned = trained_like()
    pruned.W_dec = torch.nn.Parameter(pruned.W_dec.detach()[:5].clone())
    with pytest.raises(OptionError, match=rf"W_dec='of shape \(5, {D}\)' .* \({D_SAE}, {D}\)"):
        pruned.save(tmp_path / "a")
    assert files(tmp_path / "a") == before
    assert_same(load_folder(tmp_path / "a"), sae)


# --- reading what is damaged ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cfg.json", "sae_weights.safetensors", "sae.safetensors", "asi_lens.safetensors"]
)
def test_an_edited_or_missing_file_is_found(tmp_path: Path, name: str) -> None:
    trained_like().save(tmp_path / "a")
    path = tmp_path / "a" / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} was changed since the folder was written"):
        load_folder(tmp_path / "a")
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        load_folder(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 2}, DataError, "has format 2, but this version reads 1"),
        ({"colour": 1}, DataError, "not written by this version: unexpected or missing colour"),
        ({"dtype": "int8"}, DataError, "not written by this version: .* dtype='int8'"),
        ({"in_sae_weights": []}, DataError, "its configuration needs W_dec, W_enc, b_dec"),
        ({"config": {"d_in": D, "d_sae": D_SAE, "kk": 3}}, UnknownNameError, "did you mean 'k'"),
        ({"config": {"d_in": D, "d_sae": D_SAE, "k": 99}}, OptionError, "k=99"),
        ({"config": {"d_in": D + 1, "d_sae": D_SAE}}, DataError, "needs"),
    ],
)
def test_our_json_edited(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    trained_like().save(tmp_path / "a")
    path = tmp_path / "a" / "asi_lens.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        load_folder(tmp_path / "a")


def test_folders_that_are_no_dictionary(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not the folder of a dictionary"):
        load_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_folder(tmp_path / "none")
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / "ae.pt").write_bytes(b"\x80\x04")
    with pytest.raises(FileNotFoundError, match=r"sae_weights.safetensors \(SAELens\)"):
        load_folder(tmp_path)
    for text, message in (("{", "is not JSON"), ("[]", "not a JSON object")):
        (tmp_path / "asi_lens.json").write_text(text)
        with pytest.raises(DataError, match=message):
            load_folder(tmp_path)


def test_thresholds_below_zero_are_not_written(tmp_path: Path) -> None:
    sae = trained_like(activation="jumprelu")
    sae.get_parameter("activation.threshold").data[3] = -0.1
    with pytest.raises(OptionError, match="thresholds below zero"):
        sae.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_batchtopk_is_written_as_jumprelu_and_read_as_itself(tmp_path: Path) -> None:
    sae, x = trained_like(activation="batchtopk"), activations()
    set_threshold(sae, x, 3)
    sae.save(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert values["architecture"] == "jumprelu"
    assert weights["threshold"].unique().numel() == 1
    torch.testing.assert_close(theirs(values, weights, x).float(), sae(x), rtol=1e-4, atol=1e-4)
    again = load_folder(tmp_path)
    assert again.config.activation == "batchtopk"
    assert torch.equal(again(x), sae(x))
