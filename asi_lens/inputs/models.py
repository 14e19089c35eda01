"""Models by name, and their descriptions.

A model is a TransformerBridge **without weight processing**, since folding layer norms and centering weights
change the spectra of activations. A HookedTransformer (TransformerLens 3) is used as given.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asi_lens.base.doors import checked
from asi_lens.base.errors import (
    DataError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
    require,
    unknown_name,
)
from asi_lens.base.facts import facts_html
from asi_lens.base.files import existing, plain_name
from asi_lens.inputs import gguf, twin, verify
from asi_lens.inputs.conversions import packaged_weights
from asi_lens.inputs.fingerprint import model_fingerprint
from asi_lens.inputs.hooks import (
    SITES,
    attention_write_site,
    capture_resume,
    forward,
    hook_name,
    normalizes_attn_out,
    output_bias,
    output_projection,
    site_width,
)
from asi_lens.inputs.loading import ORIGINS, boot_bridge
from asi_lens.inputs.passes import Hook, ResumePoint
from asi_lens.inputs.plain import PlainModel
from asi_lens.inputs.plain_loading import boot_plain, plain_class
from asi_lens.inputs.sources import SOURCES
from asi_lens.inputs.twin import held

__all__ = [
    "SITES",
    "Hook",
    "ModelInfo",
    "ResumePoint",
    "attention_write_site",
    "capture_resume",
    "forward",
    "held",
    "hook_name",
    "load_model",
    "model_info",
    "output_bias",
    "output_projection",
    "resolve_dtype",
    "site_width",
    "tokenizer_of",
]

# Old hub names without an owner.
_OLD_HUB_NAMES = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "distilgpt2": "distilbert/distilgpt2",
    **{
        f"bert-{kind}": f"google-bert/bert-{kind}" for kind in ("base-uncased", "base-cased", "large-uncased")
    },
}


@checked
@dataclass(frozen=True)
class ModelInfo:
    """Description of a model, for captions, table columns and cache keys."""

    name: str
    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_vocab: int
    """0 for a model that does not take token ids."""
    n_ctx: int
    dtype: str
    """Dtype of the parameters and of the computation: float32, bfloat16 ..."""
    weights: str
    """Origin of the weights' precision: "4-bit weights, dequantised", "as released", "as given" ..."""
    fingerprint: str
    """16 hex digits of every byte of weights and buffers, the configuration and all modules; another text at
    every call while hooks that somebody added are in force (`fingerprint.is_fixed`)."""
    normalizes_attn_out: bool
    """Attention's output is normalized before it is added (Gemma 2 and 3); z W_O is then `attn.hook_out`."""
    causal: bool
    """True for left-to-right language models (measured: later tokens do not change earlier outputs); False
    for encoders, and for every model of pictures or speech: they do not predict the next token of a text."""

    def _repr_html_(self) -> str:
        heads = f"{self.n_heads} of width {self.d_head}"
        facts = {
            "architecture": self.architecture,
            "layers": self.n_layers,
            "width d_model": self.d_model,
            "heads": heads if self.n_kv_heads == self.n_heads else f"{heads}, {self.n_kv_heads} for keys",
            "vocabulary": self.d_vocab or None,
            "longest context": self.n_ctx,
            "dtype": self.dtype,
            "weights": self.weights,
            "attention output": "normalized before it is added" if self.normalizes_attn_out else None,
            "predicts": "the next token" if self.causal else "not the next token (an encoder)",
            "fingerprint": self.fingerprint or None,
        }
        return facts_html(f"Model {self.name}", facts)

    @property
    def label(self) -> str:
        """Name, precision of the weights and dtype, for captions and records."""
        return f"{self.name} ({self.weights}, {self.dtype})"


@checked
def load_model(
    model: str | Path | nn.Module,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    part: str | None = None,
) -> nn.Module:
    """Return a model by name, as a TransformerBridge without weight processing, or as a PlainModel.

    A model of pictures or speech, and a text encoder that TransformerLens does not bridge, is a
    `plain.PlainModel`: its sites have the same names. `part` is "encoder" (also None) or "decoder" of a
    model that has both (Whisper); no other model has parts.

    `model` is a packaged name (`smollm2-135m`), a hub name (`meta-llama/Llama-3.1-8B`), a local Hugging Face
    folder, a `.gguf` file, or a TransformerBridge or HookedTransformer, which is returned as it is.
    dtype "auto" is bfloat16 on a GPU that supports bf16 and on a CPU with bf16 instructions (AVX512-BF16,
    AMX), else float32: on other CPUs bf16 is many times slower than float32. device "auto" is CUDA if
    available.

    Raises UnknownNameError (with the packaged names), UnsupportedModelError (an architecture that
    transformers or TransformerLens does not have), FetchError (the hub cannot be reached), DataError (a
    folder or file that is not a complete model), CacheError (a changed file in the cache), OptionError.
    """
    target = resolve_device(device)
    if isinstance(model, nn.Module):
        require(part is None, "part", part, "None for a ready model")
        return _as_given(model, dtype, device)
    boot = partial(
        _boot,
        part=part,
        dtype=resolve_dtype(dtype, target),
        device=str(target),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    name = str(model)
    if name in SOURCES and SOURCES[name].kind == "model":
        folder, weights = packaged_weights(SOURCES[name])
        return boot(folder, name, weights)
    path = existing(model)
    if path is not None and path.is_file():
        require(path.suffix == ".gguf", "model", name, "a folder if it is not a `.gguf` file")
        folder, weights = gguf.dequantized(path)
        return boot(folder, plain_name(path).removesuffix(path.suffix), weights)
    if path is not None and path.is_dir():
        if not (path / "config.json").is_file():
            raise DataError(f"{path} is not a Hugging Face model folder: it has no config.json")
        return boot(path, plain_name(path))
    if (on_hub := hub_name(name)) is not None:
        return boot(on_hub, name)
    packaged = [key for key, source in SOURCES.items() if source.kind == "model"]
    raise UnknownNameError(
        f"{unknown_name('model', name, packaged)}. A model is also a hub name (owner/name), a Hugging Face "
        "folder, a `.gguf` file (neither is at that path), or a TransformerBridge or HookedTransformer object"
    )


def hub_name(name: str) -> str | None:
    """Return the hub's name of a model ("owner/name"), or None for a name that cannot be on the hub.

    Packaged names and existing paths come before names of the hub; that is not looked at here.
    """
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not name.endswith(".gguf"):
        return name
    return _OLD_HUB_NAMES.get(name)


def _boot(
    source: str | Path,
    name: str,
    weights: str | None = None,
    *,
    part: str | None,
    revision: str | None,
    trust_remote_code: bool,
    **options: Any,
) -> nn.Module:
    """Return the model in a folder or on the hub as the kind of model that it is."""
    plain = plain_class(source, name, revision, trust_remote_code)
    if plain is not None:
        return boot_plain(plain, source, name, weights, part=part, revision=revision, **options)
    require(part is None, "part", part, f"None for {name!r}, which is not of two parts")
    options |= {"revision": revision, "trust_remote_code": trust_remote_code}
    return boot_bridge(source, name, weights, **options)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype for "auto" on a device, or the given dtype. Raises OptionError."""
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
        return torch.bfloat16 if fast else torch.float32
    for allowed in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if dtype in (allowed, str(allowed).removeprefix("torch.")):
            return allowed
    raise OptionError(
        f"dtype={dtype!r} is not allowed; dtype must be 'auto', 'float32', 'bfloat16', 'float16' or 'float64'"
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device for "auto" on this machine, or the given device. Raises OptionError."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise OptionError(
            f"device={device!r} is not allowed; device must be 'auto', 'cpu' or 'cuda'"
        ) from error
    if target.type == "mps" and not os.environ.get("ASI_LENS_ALLOW_MPS"):
        raise OptionError(
            "device='mps' is refused: PyTorch has computed silently wrong activations there (TransformerLens "
            "issue 1178). Use 'cpu', or set ASI_LENS_ALLOW_MPS=1 to take the risk"
        )
    if target.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"device={str(device)!r} is not allowed here: PyTorch finds no CUDA device")
    if target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        raise OptionError(f"device={str(device)!r} is not allowed here: PyTorch finds {n}, counted from 0")
    return target


def _as_given(model: nn.Module, dtype: str | torch.dtype, device: str | torch.device) -> nn.Module:
    twin.require_model(model)
    parameter = next(model.parameters())
    if dtype != "auto":
        require(
            resolve_dtype(dtype, parameter.device) == parameter.dtype,
            "dtype",
            dtype,
            "'auto' for a ready model",
        )
    if device != "auto":
        require(
            resolve_device(device).type == parameter.device.type, "device", device, "'auto' for a ready model"
        )
    return model


@checked
def model_info(model: nn.Module, *, fingerprint: bool = True) -> ModelInfo:
    """Return name, shape, precision and fingerprint of a model.

    The fingerprint reads every byte of the weights; `fingerprint=False` leaves it empty.
    """
    twin.require_model(model)
    cfg: Any = model.cfg
    name, weights = ORIGINS.get(model, (str(cfg.model_name), "as given"))
    if str(cfg.normalization_type).endswith("Pre") or getattr(model, "compatibility_mode", False):
        weights += ", processed by TransformerLens"
    architecture = str(getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", ""))
    return ModelInfo(
        name=name,
        architecture=architecture,
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        n_heads=int(cfg.n_heads),
        n_kv_heads=int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads),
        d_head=int(cfg.d_head),
        d_vocab=int(cfg.d_vocab),
        n_ctx=int(cfg.n_ctx),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        weights=weights,
        fingerprint=model_fingerprint(model) if fingerprint else "",
        normalizes_attn_out=normalizes_attn_out(model),
        causal=verify.verification(model).causal
        and "ForMaskedLM" not in architecture
        and not isinstance(model, PlainModel),
    )


def tokenizer_of(model: nn.Module) -> Any:
    """Return the model's Hugging Face tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise UnsupportedModelError(f"model {model_info(model, fingerprint=False).name!r} has no tokenizer")
    return tokenizer
