"""GGUF files: dequantized once into a Hugging Face folder of the cache, loaded from there afterwards."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from asi_lens.errors import CacheError, DataError, UnsupportedModelError
from asi_lens.files import locked, sha256_of, write_whole_folder
from asi_lens.paths import cache_dir

_log = logging.getLogger(__name__)

MANIFEST = "asi_lens.json"
_FORMAT = 1

# llama.cpp splits these families' text at every digit before byte-level BPE; transformers leaves that out.
_SPLIT_DIGITS = ("smollm", "starcoder", "refact", "command-r")


def dequantized(path: Path) -> tuple[Path, str]:
    """The Hugging Face folder (fp32 safetensors, tokenizer) of a `.gguf` file, and its weights in words.

    Written on first use, whole or not at all, under a lock between processes, into `cache_dir("models")`
    under the file's hash. Takes about 30 s per 100 M parameters the first time.
    Raises UnsupportedModelError naming an architecture that transformers cannot read, DataError for a file
    that is no GGUF or is cut off, CacheError for a cached folder that was changed.
    """
    architecture, bits = _describe(path)
    weights = "as released" if bits is None else f"{bits}-bit weights, dequantised"
    source = sha256_of(path)
    folder = cache_dir("models") / f"{path.stem}-{source[:16]}"
    if not folder.exists():
        with locked(folder):
            if not folder.exists():
                _log.info("dequantizing %s into %s (once)", path, folder)
                with write_whole_folder(folder) as temporary:
                    _convert(path, architecture, temporary)
                    _write_manifest(temporary, source)
    _check(folder, source)
    return folder, weights


def _describe(path: Path) -> tuple[str, int | None]:
    """Architecture and nominal bits per weight (None for 16 and 32-bit floats) from the file's header."""
    from gguf import GGUFReader, LlamaFileType

    try:
        reader = GGUFReader(path)
        architecture = str(reader.fields["general.architecture"].contents())
        file_type = reader.fields.get("general.file_type")
        name = LlamaFileType(int(file_type.contents())).name if file_type else "GUESSED"
    except OSError:
        raise
    except Exception as error:  # the reader fails in many ways on a file that is cut off
        raise DataError(f"{path} is not a whole GGUF file ({type(error).__name__}: {error})") from error
    quantized = re.search(r"MOSTLY_T?I?Q(\d)", name)
    bits = int(quantized.group(1)) if quantized else None
    return architecture, bits


def _convert(path: Path, architecture: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{path.name} has the GGUF architecture {architecture!r}, which transformers cannot read: {error}"
        ) from error
    if report["missing_keys"]:  # they would be left random
        raise DataError(f"{path} lacks the weights {', '.join(sorted(report['missing_keys']))}")
    # save_pretrained refuses a model that remembers how it was quantized
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _split_digits(path, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _split_digits(path: Path, tokenizer: Any) -> None:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    kind = GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() in _SPLIT_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _write_manifest(folder: Path, source: str) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    content = {"format": _FORMAT, "gguf_sha256": source, "bytes": sizes}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _check(folder: Path, source: str) -> None:
    repair = f"Delete the folder to have it written anew: {folder}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = dict(manifest["bytes"])
        same = manifest["format"] == _FORMAT and manifest["gguf_sha256"] == source
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{folder / MANIFEST} cannot be read ({error}). {repair}") from error
    if not same:
        raise CacheError(f"{folder} was written by another version of asi_lens. {repair}")
    for name, size in sizes.items():
        file = folder / name
        now = file.stat().st_size if file.is_file() else 0
        if now != size:
            raise CacheError(f"{file} has {now:,} bytes, was written with {size:,}. {repair}")
