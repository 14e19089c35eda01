"""Random-weight models of a few thousand parameters, saved as local Hugging Face folders with a tokenizer."""

from __future__ import annotations

import importlib.metadata
import string
from pathlib import Path
from typing import Any

import torch

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
D_VOCAB = len(SPECIALS) + len(CHARACTERS)
N_CTX = 128
N_LAYERS = 3
TL4 = not importlib.metadata.version("transformer-lens").startswith("3.")

_COMMON = {
    "vocab_size": D_VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # wide enough that attention patterns, norms and soft caps all matter in the comparison
    "initializer_range": 0.3,
}
_LLAMA_LIKE = {
    **_COMMON,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
}


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(**_COMMON, n_embd=24, n_layer=3, n_head=4, n_positions=N_CTX)


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**_LLAMA_LIKE, tie_word_embeddings=True)


def _gemma2() -> Any:
    from transformers import Gemma2Config

    # d_head * n_heads = 32 is not d_model = 24; a window shorter than the texts of the tests
    return Gemma2Config(**_LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)


def _gemma3() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        **{**_LLAMA_LIKE, "num_key_value_heads": 1}, head_dim=8, query_pre_attn_scalar=8, sliding_window=8
    )


def _qwen3() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(**_LLAMA_LIKE, head_dim=8)


def _neox() -> Any:
    from transformers import GPTNeoXConfig

    shape = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
    return GPTNeoXConfig(**{**shape, "num_attention_heads": 3}, rotary_pct=0.5)


def _bert() -> Any:
    from transformers import BertConfig

    shape = {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"}
    return BertConfig(**shape)


def _mamba() -> Any:
    from transformers import MambaConfig

    shape = {"hidden_size": 24, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 4}
    return MambaConfig(**_COMMON, **shape, use_mambapy=False)


CONFIGS = {
    "gpt2": _gpt2,
    "llama": _llama,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "qwen3": _qwen3,
    "neox": _neox,
    "bert": _bert,
}
"""Transformer architectures -> builders of their configurations."""


def build(architecture: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a model with random weights (biases and norms included) and the tokenizer; returns the folder.

    `architecture` is a key of CONFIGS, or "mamba", which has no attention.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    config = {**CONFIGS, "mamba": _mamba}[architecture]()
    for key, value in changes.items():
        setattr(config, key, value)
    auto = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if (
                    parameter.ndim == 1
                ):  # zeros and ones by default, which would hide a forgotten bias or norm
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """One token per printable ASCII character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIALS, *CHARACTERS))}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    characters.decoder = decoders.Fuse()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=characters, model_max_length=N_CTX, **names)
