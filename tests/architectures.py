"""Tiny configurations of every causal and masked architecture that TransformerLens bridges (random weights).

Architectures that need code from a hub (Baichuan, InternLM 2, OpenELM, Qwen 1 ...) cannot be built offline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_models
import torch
from tiny_models import D_VOCAB, N_CTX, N_LAYERS

_IDS = {
    "vocab_size": D_VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
_LLAMA = {
    **_IDS,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
}
_ONE_KV = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_GPT = {**_IDS, "n_embd": 24, "n_layer": N_LAYERS, "n_head": 4, "n_positions": N_CTX}
_MOE = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_MOE = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    **_LLAMA,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 6,
    "head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 12, "mamba_n_groups": 1, "mamba_d_state": 4}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("Apertus", _LLAMA),
    "bert": ("Bert", _ONE_KV),
    "bloom": ("Bloom", {**_IDS, "hidden_size": 24, "n_layer": N_LAYERS, "n_head": 4}),
    "codegen": ("CodeGen", {**_GPT, "n_embd": 64, "rotary_dim": 4}),
    "cohere": ("Cohere", {**_LLAMA, "logit_scale": 0.5}),
    "deepseek-v2": ("DeepseekV2", {**_MLA, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "deepseek-v3": ("DeepseekV3", {**_MLA, "n_group": 1, "topk_group": 1}),
    "falcon": ("Falcon", {**_ONE_KV, "new_decoder_architecture": False, "multi_query": True}),
    "falcon-alibi": (
        "Falcon",
        {**_ONE_KV, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon-new": ("Falcon", {**_ONE_KV, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma": ("Gemma", {**_LLAMA, "head_dim": 8}),
    "gemma2": ("Gemma2", {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "glm4-moe": (
        "Glm4Moe",
        {**_MOE, "n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8, "use_qk_norm": True},
    ),
    "gpt2": ("GPT2", _GPT),
    "gpt-bigcode": ("GPTBigCode", {**_GPT, "multi_query": True}),
    "gpt-j": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeo",
        {
            **_ONE_KV,
            "num_layers": N_LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 8,
        },
    ),
    "gpt-neox": ("GPTNeoX", {**_ONE_KV, "rotary_pct": 0.5}),
    "gpt-neox-sequential": ("GPTNeoX", {**_ONE_KV, "rotary_pct": 0.5, "use_parallel_residual": False}),
    "gpt-oss": ("GptOss", {**_LOCAL_MOE, "head_dim": 8, "sliding_window": 8}),
    "granite": (
        "Granite",
        {**_LLAMA, "residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.2},
    ),
    "granite-moe": ("GraniteMoe", {**_LOCAL_MOE, "residual_multiplier": 0.22}),
    "granite-moe-hybrid": (
        "GraniteMoeHybrid",
        {
            **_LOCAL_MOE,
            **_MAMBA2,
            "shared_intermediate_size": 24,
            "residual_multiplier": 0.22,
            "layer_types": ["mamba", "attention", "mamba"],
        },
    ),
    "hunyuan": ("HunYuanDenseV1", {**_LLAMA, "head_dim": 8}),
    "lfm2-moe": (
        "Lfm2Moe",
        {**_MOE, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "llama": ("Llama", _LLAMA),
    "llama-scaled": (
        "Llama",
        {**_LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    ),
    "mamba": ("Mamba", {**_IDS, "hidden_size": 24, "num_hidden_layers": N_LAYERS, "state_size": 4}),
    "mamba2": (
        "Mamba2",
        {
            **_IDS,
            "hidden_size": 24,
            "num_hidden_layers": N_LAYERS,
            "state_size": 4,
            "head_dim": 12,
            "num_heads": 4,
            "n_groups": 1,
        },
    ),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 8}),
    "mixtral": ("Mixtral", _LOCAL_MOE),
    "mpt": ("Mpt", {**_IDS, "d_model": 24, "n_heads": 4, "n_layers": N_LAYERS, "max_seq_len": N_CTX}),
    "nemotron-h": (
        "NemotronH",
        {
            **_LLAMA,
            "head_dim": 6,
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 12,
            "ssm_state_size": 4,
            "n_groups": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "olmo": ("Olmo", {**_LLAMA, "clip_qkv": 0.5}),
    "olmo2": ("Olmo2", _LLAMA),
    "olmo3": ("Olmo3", {**_LLAMA, "sliding_window": 8}),
    "olmoe": ("Olmoe", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPT", {**_ONE_KV, "ffn_dim": 40, "word_embed_proj_dim": 24}),
    "opt-post-norm": (
        "OPT",
        {**_ONE_KV, "ffn_dim": 40, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "phi": ("Phi", {**_LLAMA, "hidden_size": 32}),
    "phi3": ("Phi3", {**_LLAMA, "sliding_window": 8}),
    "phimoe": ("Phimoe", _LOCAL_MOE),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 8}),
    "qwen3-moe": ("Qwen3Moe", {**_MOE, "head_dim": 8}),
    "qwen3-next": ("Qwen3Next", {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 16}),
    "qwen3.5": ("Qwen3_5Text", {**_LLAMA, **_LINEAR}),
    "smollm3": ("SmolLM3", _LLAMA),
    "stablelm": ("StableLm", _LLAMA),
    "stablelm-parallel": (
        "StableLm",
        {**_LLAMA, "qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
    "xglm": (
        "XGLM",
        {**_IDS, "d_model": 24, "ffn_dim": 40, "num_layers": N_LAYERS, "attention_heads": 4},
    ),
    # TransformerLens 4 only
    "afmoe": ("Afmoe", {**_MOE, "head_dim": 8, "num_dense_layers": 1, "sliding_window": 8}),
    "arcee": ("Arcee", _LLAMA),
    "bamba": ("Bamba", {**_LLAMA, **_MAMBA2, "attn_layer_indices": [1]}),
    "bert-causal": ("Bert", {**_ONE_KV, "is_decoder": True}),
    "bitnet": ("BitNet", _LLAMA),
    "cohere2": ("Cohere2", {**_LLAMA, "sliding_window": 8}),
    "ernie4.5": ("Ernie4_5", {**_LLAMA, "head_dim": 8}),
    "ernie4.5-moe": ("Ernie4_5_Moe", {**_MOE, "moe_num_experts": 4, "moe_k": 2}),
    "exaone4": ("Exaone4", {**_LLAMA, "sliding_window": 8}),
    "falcon-h1": ("FalconH1", {**_LLAMA, **_MAMBA2, "mamba_d_ssm": 48}),
    "falcon-mamba": (
        "FalconMamba",
        {**_IDS, "hidden_size": 24, "num_hidden_layers": N_LAYERS, "state_size": 4},
    ),
    "flex-olmo": ("FlexOlmo", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("Glm", {**_LLAMA, "head_dim": 8}),
    "glm4": ("Glm4", {**_LLAMA, "head_dim": 8}),
    "gpt1": ("OpenAIGPT", _GPT),
    "jais2": ("Jais2", _LLAMA),
    "lfm2": ("Lfm2", {**_LLAMA, "layer_types": ["conv", "full_attention", "conv"]}),
    "minimax-m2": ("MiniMaxM2", {**_LOCAL_MOE, "head_dim": 8}),
    "ministral3": ("Ministral3", {**_LLAMA, "head_dim": 8}),
    "modernbert-decoder": ("ModernBertDecoder", _ONE_KV),
    "nanochat": ("NanoChat", _LLAMA),
    "nemotron": ("Nemotron", {**_LLAMA, "head_dim": 6}),
    "olmo-hybrid": ("OlmoHybrid", {**_LLAMA, **_LINEAR}),
    "qwen2-moe": (
        "Qwen2Moe",
        {**_MOE, "shared_expert_intermediate_size": 16},
    ),
    "qwen3.5-moe": ("Qwen3_5MoeText", {**_MOE, **_LINEAR, "shared_expert_intermediate_size": 16}),
    "recurrent-gemma": (
        "RecurrentGemma",
        {**_LLAMA, "lru_width": 24, "block_types": ["recurrent", "attention"], "attention_window_size": 16},
    ),
    "roberta": ("Roberta", {**_ONE_KV, "pad_token_id": 0, "max_position_embeddings": N_CTX + 1}),
    "seed-oss": ("SeedOss", {**_LLAMA, "head_dim": 8}),
    "starcoder2": ("Starcoder2", {**_LLAMA, "sliding_window": 8}),
    "vault-gemma": ("VaultGemma", {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8}),
}
"""Name -> (start of the name of transformers' configuration class, options)."""


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Save the model with random weights (biases, norms and buffers of weights included) and a tokenizer."""
    import transformers

    kind, options = CONFIGS[name]
    config = getattr(transformers, f"{kind}Config")(**options)
    if kind in ("Bert", "Roberta") and not getattr(config, "is_decoder", False):
        auto: Any = transformers.AutoModelForMaskedLM
    else:
        auto = transformers.AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # zeros and ones would hide a forgotten bias or norm
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The model in `folder` in float32, or the UnsupportedModelError that says why it is refused."""
    from asi_lens.base.errors import UnsupportedModelError
    from asi_lens.inputs import models

    try:
        return models.load_model(folder, dtype="float32", device="cpu")
    except UnsupportedModelError as error:
        return error


def summary(model: Any) -> str:
    """What a model (as `load` returns it) offers: its sites, or why it is refused. One cell of the table."""
    from asi_lens.inputs import models, verify
    from asi_lens.inputs.plain import PlainModel

    if isinstance(model, Exception):
        unknown = "Could not determine supported architecture" in str(model)
        return "not bridged" if unknown else "refused: TransformerLens cannot bridge it"
    plain = isinstance(model, PlainModel)
    found = verify.verify(model)
    if found.failure:
        two = "two ways" in found.failure
        return f"refused: {'two ways to compute attention differ' if two else 'the model does not run'}"
    layers = range(N_LAYERS)
    at = {site: [layer for layer in layers if (site, layer) in found.sites] for site in models.SITES}
    whole = [site for site in models.SITES if len(at[site]) == N_LAYERS]
    part = [f"{site} of some layers" for site in models.SITES if 0 < len(at[site]) < N_LAYERS]
    sites = "all" if len(whole) == len(models.SITES) else ", ".join([*whole, *part])
    sites += " (as a `PlainModel`)" if plain else ""
    return sites + ("; only hooks at modules" if verify.own_error(model) else "")


def table(path: Path) -> dict[str, dict[str, str]]:
    """Cells of the table in a page, by name and by version of TransformerLens."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    ours = [row for row in rows if len(row) == len(head)]  # below it, `small_plain` writes another table
    return {row[0].strip("`"): dict(zip(head[2:], row[2:], strict=True)) for row in ours}


def column() -> str:
    """The head of the installed TransformerLens's column."""
    import importlib.metadata

    return "TransformerLens " + ".".join(importlib.metadata.version("transformer-lens").split(".")[:2])


def write(path: Path) -> None:
    """Write the installed TransformerLens's column of the table in `path` anew.

    `python tests/architectures.py` does so for `docs/architectures.md`.
    """
    import tempfile

    columns = ("TransformerLens 3.5", "TransformerLens 4.3")
    known = table(path)
    lines = [f"| | class | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    with tempfile.TemporaryDirectory() as root:
        for name, (kind, _) in CONFIGS.items():
            cells = {**dict.fromkeys(columns, ""), **known.get(name, {})}
            cells[column()] = summary(load(build(name, Path(root, name))))
            lines.append(f"| `{name}` | {kind} | {' | '.join(cells[one] for one in columns)} |")
    text = path.read_text(encoding="utf-8")
    start = text.index("| | class |") if "| | class |" in text else len(text)
    end = text.find("\n\n", start)
    path.write_text(text[:start] + "\n".join(lines) + (text[end:] if end >= 0 else "\n"), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).resolve().parent.parent / "docs" / "architectures.md")
