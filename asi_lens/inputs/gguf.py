"""GGUF files: dequantized once into a Hugging Face folder in the cache, later loaded from that folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from asi_lens.base.cache import cached_folder
from asi_lens.base.errors import DataError, UnsupportedModelError
from asi_lens.base.files import cache_key, file_name, sha256_of
from asi_lens.base.paths import cached
from asi_lens.inputs.fingerprint import versions
from asi_lens.inputs.gguf_rules import carry_over
from asi_lens.inputs.loading import require_whole

_log = logging.getLogger(__name__)

_FORMAT = 4
_HEADER = ("general.architecture", "general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.pre")

# Rules by which llama.cpp (`llm_tokenizer_bpe`) splits text before byte-level BPE. transformers knows others,
# and splits by GPT-2's rule what it does not know. "default" is none of them: llama.cpp's is not GPT-2's.
_AS_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais", "gigachat", "a.x-4.0", "mellum", "trillion", "exaone4")
# GPT-2's rule, and at every digit.
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")


def dequantized(path: Path) -> tuple[Path, str]:
    """Return the Hugging Face folder (fp32 safetensors, tokenizer) of a `.gguf` file, and a description of
    its weights ("4-bit weights, dequantised").

    The first call writes the folder into the cache (`models`) under the file's hash and the version of
    transformers, atomically and under a lock between processes; it takes about 30 s per 100 M parameters.
    Raises UnsupportedModelError naming an architecture that transformers cannot read, and what it would read
    wrong (`gguf_rules`, the rule to split text); DataError for a file that is not a GGUF, is truncated or
    does not fit its own sizes; and CacheError for a cached folder that was changed.
    """
    path = path.absolute()  # transformers opens the file by this name
    # transformers 5.17 and 5.23 write different tokenizers from one file.
    about = {"format": _FORMAT, "gguf_sha256": sha256_of(path), "transformers": versions()["transformers"]}
    folder = cached("models", file_name(path.stem, key=cache_key(**about)))

    def fill(temporary: Path) -> dict[str, str]:
        _log.info("dequantizing %s into %s (once)", path, folder)
        with _parsed_once():
            header = read_header(path)
            _convert(path, header, temporary)
        weights = "as released" if header.bits is None else f"{header.bits}-bit weights, dequantised"
        return {"weights": weights}

    repair = f"Delete the folder to have it written anew: {folder}"
    return folder, str(cached_folder(folder, about, fill, repair)["weights"])


@dataclass(frozen=True)
class Header:
    """Metadata of a GGUF file."""

    architecture: str
    bits: int | None
    """Nominal bits per weight; None for 16 and 32-bit floats."""
    pre_tokenizer: str | None
    """Rule by which text is split before byte-level BPE, "" if not stated; None for other tokenizers."""


def read_header(path: Path) -> Header:
    """Return a file's metadata. Raises DataError if the file does not contain all its tensors."""
    import gguf

    try:
        fields = gguf.GGUFReader(str(path)).fields
        values = {key: fields[key].contents() for key in _HEADER if key in fields}
        architecture = str(values["general.architecture"])
    except (IndexError, KeyError, MemoryError, OverflowError, ValueError) as error:
        reason = f"{path.stat().st_size:,} bytes; {type(error).__name__}: {error}"
        raise DataError(f"{path} is not a whole GGUF file ({reason})") from error
    names = {member.value: member.name for member in gguf.LlamaFileType}
    quantized = re.search(r"MOSTLY_T?I?Q(\d)", names.get(values.get("general.file_type", -1), ""))
    by_bytes = values.get("tokenizer.ggml.model") == "gpt2"
    return Header(
        architecture,
        int(quantized.group(1)) if quantized else None,
        str(values.get("tokenizer.ggml.pre", "")) if by_bytes else None,
    )


def _convert(path: Path, header: Header, folder: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{path.name} has the GGUF architecture {header.architecture!r}, "
            f"which transformers cannot read: {error}"
        ) from error
    require_whole(str(path), model, report)
    metadata, unused = _unread(path, model)
    carry_over(path.name, metadata, unused, model.config)
    rule, gpt2 = header.pre_tokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = tokenizer.backend_tokenizer.pre_tokenizer
    if rule in _SPLIT_DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, gpt2])
    elif rule is not None and rule not in _AS_GPT2 and str(split) == str(gpt2):
        raise UnsupportedModelError(
            f"{path.name} has the tokenizer.ggml.pre {rule!r}, a rule to split text that is not known here; "
            "load the model from its Hugging Face folder"
        )
    # save_pretrained refuses a model with quantization settings
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # for example on a full disk
        raise OSError(f"cannot write {folder.parent}: {error}") from error


def _unread(path: Path, model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of a file's architecture, and its tensors that are no weights of the model, by name."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    reader = gguf.GGUFReader(str(path))
    architecture = str(reader.fields["general.architecture"].contents())
    start = f"{architecture}."
    metadata = {
        key.removeprefix(start): field.contents()
        for key, field in reader.fields.items()
        if key.startswith(start)
    }
    processor = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)(config={})
    weights = reading.get_gguf_hf_weights_map(model, processor)
    # Experts' weights are joined under other names; a missing one is a missing weight.
    return metadata, {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
        if tensor.name not in weights and not re.search(r"_exps\.(weight|bias)$", tensor.name)
    }


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Parse a file only once inside the context.

    transformers would parse it for the configuration, for the weights and for the tokenizer (20 s each for a
    vocabulary of 262,144).
    """
    import gguf

    reader_class = gguf.GGUFReader
    vars(gguf)["GGUFReader"] = cache(reader_class)
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = reader_class
