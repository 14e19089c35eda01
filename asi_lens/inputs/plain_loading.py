"""A `PlainModel` from a Hugging Face folder or a hub name: which models, weights, processor, tokenizer.

Every weight that the model needs must be in the folder, as for a TransformerBridge.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from asi_lens.base.errors import DataError, require
from asi_lens.base.offline import no_hub
from asi_lens.inputs.loading import ORIGINS, named_errors, require_whole
from asi_lens.inputs.plain import PlainModel

_MODALITIES = ({"image"}, {"audio"}, {"audio", "text"})


def plain_class(source: str | Path, name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Return transformers' class for a model that is a `PlainModel`, or None for a TransformerBridge.

    A PlainModel takes pictures or speech and nothing else (a text beside speech is a decoder's), or is an
    encoder of token ids that TransformerLens does not bridge. A folder or a name that cannot be read gives
    None: `boot_bridge` says what is wrong with it.
    """
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    no_hub()
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(source), revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception:  # boot_bridge meets the same error, and names it
        return None
    names = getattr(config, "architectures", None) or [""]
    found: Any = getattr(transformers, str(names[0]), None)
    if found is None or getattr(config, "auto_map", None):
        return None
    modalities = getattr(found, "input_modalities", ())
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    if modalities in _MODALITIES and found.main_input_name in ("pixel_values", "input_features"):
        return found
    encodes = found.main_input_name == "input_ids" and not found.can_generate()
    two = bool(getattr(config, "is_encoder_decoder", False))
    return found if encodes and not two and names[0] not in SUPPORTED_ARCHITECTURES else None


class _Load:
    """What is being loaded, for errors."""

    kind = "model of transformers with hooks"
    done = False


def boot_plain(
    kind: Any,
    source: str | Path,
    name: str,
    weights: str | None = None,
    *,
    part: str | None,
    dtype: torch.dtype,
    device: str,
    revision: str | None,
) -> PlainModel:
    """Return the model in a folder (a Path) or on the hub (a string). Raises as `models.load_model` does."""
    if isinstance(source, Path):
        require(revision is None, "revision", revision, "left out for a model that is not on the hub")
    load = _Load()
    with named_errors(source, name, load):
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        found, report = kind.from_pretrained(str(source), dtype=dtype, revision=revision, **options)
        require_whole(str(source), found, report)
        load.done = True
        pictures = found.main_input_name == "pixel_values"
        processor = _optional(_processor(pictures), source, revision, "preprocessor_config.json")
        takes_ids = found.main_input_name == "input_ids" or getattr(found.config, "is_encoder_decoder", False)
        tokenizer = _optional(_tokenizer, source, revision, "tokenizer_config.json") if takes_ids else None
        model = PlainModel(found.to(device), name, part, processor, tokenizer)
    shown = f"{name} decoder" if model.part == "decoder" else name
    ORIGINS[model] = (shown, weights or "as released")
    return model


def _processor(pictures: bool) -> Callable[..., Any]:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    if not pictures:
        return AutoFeatureExtractor.from_pretrained
    # Pillow's resize, on every machine: torchvision's gives other pixels.
    return lambda source, **options: AutoImageProcessor.from_pretrained(source, backend="pil", **options)


def _tokenizer(source: str, **options: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, **options)


def _optional(load: Callable[..., Any], source: str | Path, revision: str | None, file: str) -> Any:
    """Return a processor or a tokenizer, or None for a model that was released without one."""
    if isinstance(source, Path):
        if not (source / file).is_file():
            return None
    else:
        from transformers.utils import cached_file

        if cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False) is None:
            return None
    try:
        return load(str(source), revision=revision)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"cannot read the {file} of {source}: {error}") from error
