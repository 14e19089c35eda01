"""Small dictionaries, and folders of them as SAELens and sparsify write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import relu

from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.threshold import set_threshold
from asi_lens.sae.transcoder import Transcoder

D, D_SAE, K = 10, 33, 4
METADATA = {
    "model": "tiny",
    "site": "attn_out",
    "layer": 1,
    "hook_name": "blocks.1.hook_attn_out",
    "context": 32,
    "bos": True,
}


def activations(n: int = 200) -> torch.Tensor:
    """Raw activations with a mean, of unequal variance."""
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, D) + 2


def trained_like(dtype: torch.dtype = torch.float32, **config: Any) -> SparseAutoencoder:
    """A dictionary in which no parameter is trivial."""
    options: dict[str, Any] = {"d_in": D, "d_sae": D_SAE, "k": K, "seed": 3, "metadata": METADATA}
    sae = SparseAutoencoder(SAEConfig(**{**options, **config}), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_enc.add_(0.1 * torch.randn(sae.W_enc.shape, generator=generator))
        sae.b_enc.normal_(0, 0.1, generator=generator)
        sae.b_dec.normal_(0, 0.3, generator=generator)
        for name in ("r_mag", "b_mag"):
            if hasattr(sae.activation, name):
                getattr(sae.activation, name).normal_(0, 0.3, generator=generator)
    sae.set_normalization(activations().mean(0), 0.37)
    sae.initialization = {"method": "asi", "d_init": 5}
    return sae


def transcoder_like(activation: str, d_out: int = D + 4) -> Transcoder:
    """A transcoder in which no parameter is trivial, by default to a wider site."""
    sae = Transcoder(SAEConfig(D, D_SAE, K, activation, 3, METADATA, d_out=d_out))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1, generator=generator)
        sae.b_dec.normal_(0, 0.3, generator=generator)
    sae.set_normalization(activations().mean(0), 0.37)
    sae.set_output_normalization(torch.arange(float(d_out)), 0.2)
    if activation in ("batchtopk", "jumprelu"):
        set_threshold(sae, activations(), 3)
    return sae


def theirs(values: dict[str, Any], w: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """SAELens 6's TopK, JumpReLU and standard dictionaries, as its documentation has them; float64."""
    w = {name: tensor.double() for name, tensor in w.items()}
    x = x.double() - w["b_dec"] * values.get("apply_b_dec_to_input", True)
    pre = x @ w["W_enc"] + w.get("b_enc", 0)
    norms = w["W_dec"].norm(dim=1) if values.get("rescale_acts_by_decoder_norm") else torch.ones(1).double()
    if values["architecture"] == "topk":
        top = (pre * norms).topk(values["k"])
        acts = torch.zeros_like(pre).scatter(-1, top.indices, relu(top.values))
    elif values["architecture"] == "jumprelu":
        acts = relu(pre) * (pre > w["threshold"])
    elif values["architecture"] == "gated":
        acts = (x @ w["W_enc"] + w["b_gate"] > 0) * relu(x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
    else:
        acts = relu(pre)
    return (acts / norms) @ w["W_dec"] + w["b_dec"]


def saelens_folder(
    folder: Path, *, seed: int = 0, **changes: Any
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A folder as SAELens 6 writes it; returns its configuration and its weights."""
    generator = torch.Generator().manual_seed(seed)
    w = {
        "W_enc": torch.randn(D, D_SAE, generator=generator),
        "b_enc": torch.randn(D_SAE, generator=generator),
        "W_dec": torch.randn(D_SAE, D, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
    }
    values = {
        "d_in": D,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.18.0",
            "model_name": "tiny",
            "hook_name": "blocks.1.hook_mlp_out",
        },
        "architecture": "topk",
    }
    values |= changes
    if values["architecture"] == "topk":
        values = {"k": K, "rescale_acts_by_decoder_norm": False, **values}
    if values["architecture"] == "jumprelu":
        w["threshold"] = torch.rand(D_SAE, generator=generator) * 2 - 0.5
    if values["architecture"] == "gated":
        w["b_gate"] = w.pop("b_enc")
        w |= {name: 0.5 * torch.randn(D_SAE, generator=generator) for name in ("r_mag", "b_mag")}
    values = {key: value for key, value in values.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(values))
    save_file(w, folder / "sae_weights.safetensors")
    return values, w


def sparsify_folder(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A folder as sparsify writes it; returns its weights."""
    generator = torch.Generator().manual_seed(0)
    w = {
        "W_dec": torch.randn(D_SAE, D, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
        "encoder.bias": torch.randn(D_SAE, generator=generator),
        "encoder.weight": torch.randn(D_SAE, D, generator=generator),
    }
    values = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE}
    values |= {"k": K, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(values | changes))
    save_file(w, folder / "sae.safetensors")
    return w


def assert_same(one: SparseAutoencoder, other: SparseAutoencoder) -> None:
    """The same dictionary to the bit, laid out the same way."""
    assert one.config == other.config
    assert one.initialization == other.initialization
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(
            a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)
        ), name
