"""Tiny random models of pictures, speech and sequences, in Hugging Face folders with their processors."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch

N_LAYERS = 3
D_MODEL, N_HEADS = 24, 4
RATE, HOP = 16_000, 160
"""Samples a second of tiny speech, and samples of a log-mel frame."""
POSITIONS = 50
"""Positions of the tiny Whisper's encoder: one second, 50 a second."""
LETTERS = "ACDEFGHIKLMNPQRSTVWY"
_SHAPE = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS}
_WIDE = {**_SHAPE, "intermediate_size": 40, "initializer_range": 0.3}
_PICTURE = {**_WIDE, "image_size": 32, "patch_size": 8}
_DINO = {**_SHAPE, "initializer_range": 0.3, "mlp_ratio": 2, "image_size": 42, "patch_size": 14}
_IDS = {"vocab_size": 25, "pad_token_id": 0, "max_position_embeddings": 40}
_WHISPER = {
    "d_model": D_MODEL,
    "encoder_layers": 2,
    "decoder_layers": N_LAYERS,
    "encoder_attention_heads": N_HEADS,
    "decoder_attention_heads": N_HEADS,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "init_std": 0.3,
    "num_mel_bins": 8,
    "max_source_positions": POSITIONS,
    "max_target_positions": 32,
    "vocab_size": tiny_models.D_VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTModel", "ViTConfig", _PICTURE),
    "vit-labels": ("ViTForImageClassification", "ViTConfig", _PICTURE),
    "dinov2": ("Dinov2Model", "Dinov2Config", _DINO),
    "dinov2-registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", _DINO),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", {**_DINO, "use_swiglu_ffn": True}),
    "deit": ("DeiTModel", "DeiTConfig", _PICTURE),
    "beit": ("BeitModel", "BeitConfig", _PICTURE),
    "clip-vision": ("CLIPVisionModel", "CLIPVisionConfig", _PICTURE),
    "siglip-vision": ("SiglipVisionModel", "SiglipVisionConfig", _PICTURE),
    "swin": (
        "SwinModel",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
    ),
    "bert-model": ("BertModel", "BertConfig", {**_WIDE, **_IDS}),
    "bert-masked": ("BertForMaskedLM", "BertConfig", {**_WIDE, **_IDS}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {**_IDS, "dim": D_MODEL, "hidden_dim": 40, "n_layers": N_LAYERS, "n_heads": N_HEADS},
    ),
    "esm": (
        "EsmForMaskedLM",
        "EsmConfig",
        {**_WIDE, **_IDS, "mask_token_id": 4, "position_embedding_type": "rotary"},
    ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", _WHISPER),
    "whisper-model": ("WhisperModel", "WhisperConfig", _WHISPER),
}
"""Name -> (class of transformers, class of its configuration, options)."""


def build(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a model with random weights (biases, norms and LayerScale included) and its processor."""
    import transformers

    model_class, config_class, options = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                # Ones and zeros would hide a forgotten factor or bias; every LayerScale entry is another.
                scale = 0.3 if parameter.ndim == 1 else 0.05
                parameter.add_(torch.randn_like(parameter) * scale)
    model.save_pretrained(folder)
    if model.main_input_name == "pixel_values":
        _processor(28 if "dinov2" in kind else 32).save_pretrained(folder)
    elif model.main_input_name == "input_features":
        extractor(transformers).save_pretrained(folder)
        tiny_models.tokenizer().save_pretrained(folder)
    else:
        residues().save_pretrained(folder)
    return folder


def _processor(size: int) -> Any:
    from transformers import BitImageProcessorPil

    return BitImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4],
    )


def extractor(transformers: Any) -> Any:
    """Log-mel frames of one second of 16,000 samples."""
    return transformers.WhisperFeatureExtractor(
        feature_size=8, n_fft=400, hop_length=HOP, chunk_length=1, sampling_rate=RATE
    )


def residues() -> Any:
    """A tokenizer of single residues that are set apart by spaces, [CLS] before and [SEP] after them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    vocabulary = {token: number for number, token in enumerate((*specials, *LETTERS))}
    found = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(
        zip(("pad_token", "cls_token", "sep_token", "unk_token", "mask_token"), specials, strict=True)
    )
    return PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=40, **names)


def pictures(n: int = 6, size: tuple[int, int] = (40, 36), seed: int = 0) -> list[np.ndarray]:
    """Random pictures, uint8 [height width 3]."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(n)]


def clips(seconds: tuple[float, ...] = (1.0, 0.5, 0.25), rate: int = RATE) -> list[tuple[np.ndarray, int]]:
    """Noise of the given lengths, float from -1 to 1."""
    generator = np.random.default_rng(1)
    return [(generator.uniform(-1, 1, round(length * rate)).astype(np.float32), rate) for length in seconds]


def sequences(lengths: tuple[int, ...] = (12, 7, 20, 15), seed: int = 2) -> list[str]:
    """Random proteins."""
    generator = np.random.default_rng(seed)
    return ["".join(generator.choice(list(LETTERS), length)) for length in lengths]


def summary(model: Any) -> str:
    """What a model, or the error of loading it, offers: one cell of the table in `docs/architectures.md`."""
    from asi_lens.base import sites
    from asi_lens.inputs import verify

    if isinstance(model, Exception):
        return "refused: no single stack of attention and MLP layers"
    found = verify.verify(model)
    layers = range(model.cfg.n_layers)
    if found.failure:
        return "refused: it does not run"
    whole = [site for site in sites.ALL if all((site, layer) in found.sites for layer in layers)]
    return ", ".join(whole) + ("" if whole != list(sites.SITES) else " (all)")


def rows(load: Callable[[str, str | None], Any]) -> list[str]:
    """The table's rows. `load(kind, part)` returns a model, or the error of loading it."""
    found = ["| | class | sites |", "|---|---|---|"]
    for kind, (name, _, _) in KINDS.items():
        for part in (None, "decoder") if kind.startswith("whisper") else (None,):
            shown = f"`{kind}`{f' ({part})' if part else ''}"
            found.append(f"| {shown} | {name} | {summary(load(kind, part))} |")
    return found


def write(path: Path) -> None:
    """Write the table into a page: `python tests/small_plain.py` does so for `docs/architectures.md`."""
    import tempfile

    from asi_lens.base.errors import UnsupportedModelError
    from asi_lens.inputs.models import load_model

    with tempfile.TemporaryDirectory() as root:

        def load(kind: str, part: str | None) -> Any:
            folder = Path(root, kind)
            if not folder.exists():
                build(kind, folder)
            try:
                return load_model(folder, dtype="float32", device="cpu", part=part)
            except UnsupportedModelError as error:
                return error

        table = rows(load)
    text = path.read_text(encoding="utf-8")
    start = text.index(table[0])
    end = text.find("\n\n", start)
    path.write_text(text[:start] + "\n".join(table) + (text[end:] if end >= 0 else "\n"), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent.parent / "docs" / "architectures.md")


def write_wav(path: Path, samples: np.ndarray, rate: int, width: int = 2) -> Path:
    """Write samples [n] or [n channels] of `width` bytes as a `.wav` file; return its path."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path
