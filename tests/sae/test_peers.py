"""Dictionaries of SAELens and sparsify: read as they are meant, and ours read by the real libraries."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_stores import files
from some_dictionaries import (
    D_SAE,
    METADATA,
    D,
    K,
    activations,
    assert_same,
    saelens_folder,
    sparsify_folder,
    theirs,
    trained_like,
    transcoder_like,
)
from torch.nn.functional import relu

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.formats import load_folder
from asi_lens.sae.threshold import set_threshold

# --- reading SAELens --------------------------------------------------------------------------------


@pytest.mark.parametrize("apply", [True, False, None])
@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_topk(tmp_path: Path, apply: bool | None, rescale: bool) -> None:
    values, weights = saelens_folder(
        tmp_path, apply_b_dec_to_input=apply, rescale_acts_by_decoder_norm=rescale
    )
    sae = load_folder(tmp_path)
    x = activations()
    torch.testing.assert_close(sae(x).double(), theirs(values, weights, x), rtol=1e-4, atol=1e-4)
    assert (sae.config.k, sae.config.d_sae, sae.config.metadata["model"]) == (K, D_SAE, "tiny")
    if not rescale and apply is not False:
        # nothing was folded: writing it again gives the same weights
        sae.save(tmp_path / "again")
        for name, tensor in load_file(tmp_path / "again" / "sae_weights.safetensors").items():
            assert torch.equal(tensor, weights[name])
        again = json.loads((tmp_path / "again" / "cfg.json").read_text())
        assert again["metadata"] == values["metadata"] | {"sae_lens_training_version": None}


def test_saelens_defaults_k_to_100(tmp_path: Path) -> None:
    saelens_folder(tmp_path, k=None)
    with pytest.raises(OptionError, match="k=100"):
        load_folder(tmp_path)


def test_saelens_training_checkpoints(tmp_path: Path) -> None:
    values, weights = saelens_folder(
        tmp_path, decoder_init_norm=0.1, aux_loss_coefficient=1.0, use_sparse_activations=False
    )
    x = activations()
    torch.testing.assert_close(
        load_folder(tmp_path)(x).double(), theirs(values, weights, x), rtol=1e-4, atol=1e-4
    )


def test_saelens_in_half_precision(tmp_path: Path) -> None:
    _values, weights = saelens_folder(tmp_path, dtype="bfloat16")
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(weights, tmp_path / "sae_weights.safetensors")
    sae = load_folder(tmp_path)
    assert sae.W_dec.dtype == torch.float32
    assert torch.equal(sae.W_enc, weights["W_enc"].float())


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_saelens_without_a_k(tmp_path: Path, architecture: str) -> None:
    values, weights = saelens_folder(
        tmp_path, architecture=architecture, apply_b_dec_to_input=architecture == "standard"
    )
    sae = load_folder(tmp_path)
    x = activations()
    torch.testing.assert_close(sae(x).double(), theirs(values, weights, x), rtol=1e-4, atol=1e-4)
    assert (sae.encode_dense(x) > 0).sum(1).unique().numel() > 3
    many = x.repeat(30, 1)  # several blocks, whose codes differ in width
    torch.testing.assert_close(sae(many), sae(x).repeat(30, 1), rtol=1e-5, atol=1e-5)
    # and both ways, scaled inputs included
    sae.set_normalization(x.mean(0), 0.5)
    sae.save(tmp_path / "again")
    assert sorted(files(tmp_path / "again")) == [
        "asi_lens.json",
        "asi_lens.safetensors",
        "cfg.json",
        "sae_weights.safetensors",
    ]
    assert_same(load_folder(tmp_path / "again"), sae)
    again = json.loads((tmp_path / "again" / "cfg.json").read_text())
    folded = load_file(tmp_path / "again" / "sae_weights.safetensors")
    assert again["architecture"] == architecture
    torch.testing.assert_close(sae(x).double(), theirs(again, folded, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architecture": "temporal"}, OptionError, "architecture='temporal' .* supported: topk"),
        ({"architecture": "matryoshka_batchtopk"}, OptionError, "is not supported"),
        ({"normalize_activations": "layer_norm"}, OptionError, "normalize_activations='layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, OptionError, "normalize_activations"),
        ({"reshape_activations": "fold"}, OptionError, "reshape_activations='fold'"),
        ({"finetuning_scaling_factor": True}, OptionError, "finetuning_scaling_factor"),
        ({"metadata": {}}, OptionError, "not written by SAELens 6"),
        ({"metadata": {"sae_lens_version": "5.9.1"}}, OptionError, "not written by SAELens 6"),
        ({"metadata": None}, OptionError, "not written by SAELens 6"),
        ({"aply_b_dec_to_input": False}, UnknownNameError, "did you mean 'apply_b_dec_to_input'"),
        ({"d_in": None}, DataError, "d_in=None"),
        ({"d_sae": D_SAE + 1}, DataError, "needs"),
    ],
)
def test_saelens_folders_that_are_not_supported(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    saelens_folder(tmp_path, **changes)
    with pytest.raises(error, match=message):
        load_folder(tmp_path)


def test_saelens_weights_that_do_not_fit(tmp_path: Path) -> None:
    _, weights = saelens_folder(tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    for changed in (
        {**weights, "W_dec": weights["W_dec"].T.contiguous()},
        {name: tensor for name, tensor in weights.items() if name != "b_enc"},
        {**weights, "log_threshold": torch.zeros(D_SAE)},
    ):
        save_file(changed, path)
        with pytest.raises(DataError, match=r"holds .* but its configuration needs"):
            load_folder(tmp_path)
    save_file({**weights, "b_dec": torch.full((D,), float("nan"))}, path)
    with pytest.raises(DataError, match=r"b_dec in .* holds NaN"):
        load_folder(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="cannot be read"):
        load_folder(tmp_path)


# --- reading sparsify -------------------------------------------------------------------------------


@pytest.mark.parametrize("latents", [{}, {"num_latents": 0, "expansion_factor": 3}])
def test_sparsify(tmp_path: Path, latents: dict[str, int]) -> None:
    weights = sparsify_folder(tmp_path / "layers.1.self_attn", **latents)
    if latents:
        weights = {name: t[: 3 * D] if name != "b_dec" else t for name, t in weights.items()}
        save_file(weights, tmp_path / "layers.1.self_attn" / "sae.safetensors")
    sae = load_folder(tmp_path / "layers.1.self_attn")
    x = activations()
    pre = relu((x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
    top = pre.topk(K)
    expected = torch.zeros_like(pre).scatter(1, top.indices, top.values) @ weights["W_dec"] + weights["b_dec"]
    torch.testing.assert_close(sae(x).detach(), expected, rtol=1e-4, atol=1e-4)
    assert sae.config.metadata == {"hf_hook_name": "layers.1.self_attn"}
    sae.save(tmp_path / "again")
    for name, tensor in load_file(tmp_path / "again" / "sae.safetensors").items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": "groupmax"}, OptionError, "activation='groupmax'"),
        ({"skip_connection": True}, OptionError, "skip_connection=True"),
        ({"transcode": True}, OptionError, "transcode=True"),
        ({"num_latent": 3}, UnknownNameError, "did you mean 'num_latents'"),
        ({"num_latents": 5}, DataError, "needs"),
        ({"d_in": 0}, DataError, "d_in=0"),
    ],
)
def test_sparsify_folders_that_are_not_supported(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    sparsify_folder(tmp_path, **changes)
    with pytest.raises(error, match=message):
        load_folder(tmp_path)


# --- the real libraries -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sae_lens() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


@pytest.fixture(scope="module")
def sparsify() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sparsify")


def test_saelens_opens_ours(sae_lens: ModuleType, tmp_path: Path) -> None:
    ours = trained_like()
    ours.save(tmp_path)
    x = activations()
    found = sae_lens.SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(found(x), ours(x), rtol=1e-5, atol=1e-5)
    raw = ours.encode_dense(x) / ours.input_scale
    torch.testing.assert_close(found.encode(x), raw, rtol=1e-5, atol=1e-5)
    assert type(found).__name__ == "TopKSAE"
    assert found.cfg.metadata.hook_name == "blocks.1.hook_attn_out"
    assert found.cfg.metadata.model_name == "tiny"
    assert found.cfg.k == K


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu", "gated"])
def test_saelens_opens_what_fires_freely(sae_lens: ModuleType, tmp_path: Path, activation: str) -> None:
    ours = trained_like(activation=activation)
    if activation != "relu":
        set_threshold(ours, activations(), 3)
    ours.save(tmp_path)
    x = activations()
    torch.testing.assert_close(sae_lens.SAE.load_from_disk(tmp_path)(x), ours(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "relu"])
def test_saelens_opens_our_transcoders(sae_lens: ModuleType, tmp_path: Path, activation: str) -> None:
    ours = transcoder_like(activation)
    ours.save(tmp_path)
    x = activations()
    found = sae_lens.SAE.load_from_disk(tmp_path)
    assert "Transcoder" in type(found).__name__
    torch.testing.assert_close(found(x), ours(x), rtol=1e-4, atol=1e-4)


def test_sparsify_opens_our_transcoders(sparsify: ModuleType, tmp_path: Path) -> None:
    ours = transcoder_like("topk", d_out=D)
    ours.save(tmp_path)
    x = activations()
    found = sparsify.SparseCoder.load_from_disk(tmp_path)
    assert found.cfg.transcode
    torch.testing.assert_close(found(x).sae_out, ours(x), rtol=1e-4, atol=1e-4)


def test_saelens_gives_back_what_it_got(sae_lens: ModuleType, tmp_path: Path) -> None:
    ours = trained_like()
    ours.save(tmp_path / "a")
    sae_lens.SAE.load_from_disk(tmp_path / "a").save_model(tmp_path / "b")
    for name, tensor in load_file(tmp_path / "b" / "sae_weights.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "a" / "sae_weights.safetensors")[name])
    again = load_folder(tmp_path / "b")
    assert again.config.metadata["context"] == 32
    torch.testing.assert_close(again(activations()), ours(activations()), rtol=1e-5, atol=1e-5)


def test_saelens_opens_ours_on_heads(sae_lens: ModuleType, tmp_path: Path) -> None:
    ours = trained_like(metadata={**METADATA, "hook_name": "blocks.1.attn.hook_z"})
    ours.save(tmp_path)
    x = activations()
    heads = x.view(20, 10, 5, 2)  # batch position n_heads d_head
    found = sae_lens.SAE.load_from_disk(tmp_path)(heads)
    torch.testing.assert_close(found.reshape(200, D), ours(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_ours_opens_saelens_topk(sae_lens: ModuleType, tmp_path: Path, apply: bool, rescale: bool) -> None:
    config = sae_lens.TopKSAEConfig(
        d_in=D, d_sae=D_SAE, k=K, apply_b_dec_to_input=apply, rescale_acts_by_decoder_norm=rescale
    )
    assert_opens(sae_lens.TopKSAE(config), tmp_path)


@pytest.mark.parametrize("architecture", ["Standard", "JumpReLU", "Gated"])
def test_ours_opens_saelens_without_a_k(sae_lens: ModuleType, tmp_path: Path, architecture: str) -> None:
    config = getattr(sae_lens, f"{architecture}SAEConfig")(d_in=D, d_sae=D_SAE)
    found = getattr(sae_lens, f"{architecture}SAE")(config)
    ours = assert_opens(found, tmp_path)
    ours.save(tmp_path / "back")
    x = activations()
    torch.testing.assert_close(
        sae_lens.SAE.load_from_disk(tmp_path / "back")(x), ours(x), rtol=1e-4, atol=1e-4
    )


def test_ours_opens_a_training_checkpoint_of_saelens(sae_lens: ModuleType, tmp_path: Path) -> None:
    config = sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=D_SAE, k=K)
    assert_opens(sae_lens.TopKTrainingSAE(config), tmp_path)


def test_ours_opens_batch_topk_as_saelens_saves_it(sae_lens: ModuleType, tmp_path: Path) -> None:
    found = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=D_SAE, k=K))
    found.topk_threshold.fill_(0.4)
    found.save_inference_model(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "jumprelu"
    x = activations()
    torch.testing.assert_close(
        load_folder(tmp_path)(x), sae_lens.SAE.load_from_disk(tmp_path)(x), rtol=1e-4, atol=1e-4
    )


def assert_opens(found: Any, folder: Path) -> SparseAutoencoder:
    """Random weights in all of a SAELens dictionary, saved there, read here, compared."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    found.save_model(folder)
    ours = load_folder(folder)
    x = activations()
    torch.testing.assert_close(ours(x), found(x), rtol=1e-4, atol=1e-4)
    return ours


def test_sparsify_opens_ours(sparsify: ModuleType, tmp_path: Path) -> None:
    ours = trained_like()
    ours.save(tmp_path)
    x = activations()
    found = sparsify.SparseCoder.load_from_disk(tmp_path)
    torch.testing.assert_close(found(x).sae_out, ours(x), rtol=1e-5, atol=1e-5)
    assert found.cfg.k == K
    assert found.num_latents == D_SAE
    # several hook points are several folders
    ours.save(tmp_path / "many" / "layers.1.self_attn")
    assert list(sparsify.SparseCoder.load_many(str(tmp_path / "many"), local=True)) == ["layers.1.self_attn"]


def test_ours_opens_sparsify(sparsify: ModuleType, tmp_path: Path) -> None:
    found = sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=K, num_latents=D_SAE))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    found.save_to_disk(tmp_path / "a")
    ours = load_folder(tmp_path / "a")
    x = activations()
    torch.testing.assert_close(ours(x), found(x).sae_out, rtol=1e-4, atol=1e-4)
    ours.save(tmp_path / "b")
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "b")
    for (name, a), (_, b) in zip(found.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
