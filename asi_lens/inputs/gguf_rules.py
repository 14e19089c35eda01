"""What a GGUF file says about the computation, held against the configuration that transformers made of it.

transformers reads the keys it knows and drops the others without a word. Here every key of the architecture
must agree with the configuration, be carried over (scaled rotary embeddings), or be without effect on the
numbers; and every tensor must be a weight of the model. Anything else is an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from asi_lens.base.errors import UnsupportedModelError

# Without effect on the numbers that a model gives for given tokens.
_NO_EFFECT = {"context_length", "vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
# Key -> names of the same value in configurations of transformers.
_SAME = {
    "block_count": ("num_hidden_layers", "n_layer", "num_layers"),
    "embedding_length": ("hidden_size", "n_embd", "d_model"),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "feed_forward_length", "n_inner", "d_ff"),
    "attention.head_count": ("num_attention_heads", "n_head", "num_heads"),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "residual_scale": ("residual_multiplier",),
    "embedding_scale": ("embedding_multiplier",),
    "use_parallel_residual": ("use_parallel_residual",),
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "ssm.conv_kernel": ("conv_kernel", "conv_L_cache"),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
}
_YARN = {
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}


def carry_over(path: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any], config: Any) -> None:
    """Write scaled rotary embeddings of a file into `config`; raise UnsupportedModelError for anything else.

    Args:
        path: the file, for errors.
        metadata: keys of the file's architecture, without its name: `rope.freq_base` ...
        tensors: tensors of the file that are no weights of the model, by name, as arrays.
        config: transformers' configuration of the model; its `rope_parameters` are changed in place.
    """
    scaling = {
        key: value for key, value in metadata.items() if key.startswith(("rope.scaling.", "rope.scale"))
    }
    for key, value in metadata.items():
        if key not in scaling and key not in _NO_EFFECT and not _agrees(key, value, config):
            raise _unsupported(path, f"{key} = {_short(value)}", _held_against(key, config))
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and "attention.scale" not in metadata and scalar != _head_dim(config):
        # Gemma 2 and 3 of 27B: transformers' default is not theirs.
        raise _unsupported(
            path, "no attention.scale", f"read as {scalar}^-0.5, heads are {_head_dim(config)} wide"
        )
    left = dict(tensors)
    factors = left.pop("rope_freqs.weight", None)
    if left:
        raise _unsupported(
            path, f"the tensor{'s' * (len(left) > 1)} {_listed(left)}", "the model has no such weight"
        )
    used = _scaled(path, scaling, config)
    if factors is not None and not np.allclose(factors, 1.0):
        if used:
            raise _unsupported(path, "the tensor rope_freqs.weight", "rope.scaling.type scales as well")
        _set_rope(path, config, _by_factors(np.asarray(factors, dtype=np.float64).ravel(), config, path))


def _agrees(key: str, value: Any, config: Any) -> bool:
    """Whether the configuration says the same as a key of the file."""
    found = _held_against(key, config)
    values = list(value) if isinstance(value, list | tuple) else [value]
    if found is None:
        return not any(values)  # 0 experts, False ...
    found = list(found) if isinstance(found, list | tuple) else [found]
    # Layers without attention have 0 heads in files.
    return all(
        not one or any(math.isclose(float(one), float(other), rel_tol=1e-5) for other in found)
        for one in values
    )


def _held_against(key: str, config: Any) -> Any:
    """Return the configuration's value of a key, or None if it has none."""
    rope = _rope(config)
    if key == "rope.freq_base":
        return rope.get("rope_theta", getattr(config, "rope_theta", None))
    if key in ("attention.key_length", "attention.value_length"):
        return _head_dim(config)
    if key == "rope.dimension_count":
        return _rotary_dim(config)
    if key == "attention.scale":
        scalar = getattr(config, "query_pre_attn_scalar", None)
        return getattr(config, "attention_multiplier", None) if scalar is None else scalar**-0.5
    names = (name for name in _SAME.get(key, ()) if getattr(config, name, None) is not None)
    return next((getattr(config, name) for name in names), None)


def _rope(config: Any) -> dict[str, Any]:
    """Return the rotary parameters of full attention, by reference."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention", rope)


def _head_dim(config: Any) -> int | None:
    own = getattr(config, "head_dim", None)
    if own:
        return int(own)
    width, heads = _held_against("embedding_length", config), _held_against("attention.head_count", config)
    return int(width) // int(heads) if width and heads else None


def _rotary_dim(config: Any) -> int | None:
    partial = _rope(config).get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    head = _head_dim(config)
    return None if head is None else int(head * (1.0 if partial is None else partial))


def _scaled(path: str, scaling: Mapping[str, Any], config: Any) -> bool:
    """Carry `rope.scaling.*` over; return whether anything is scaled."""
    left = {key: value for key, value in scaling.items() if key not in _NO_EFFECT}
    kind = str(left.pop("rope.scaling.type", "none"))
    linear = left.pop("rope.scale_linear", None)  # the older way to say it
    factor = float(left.pop("rope.scaling.factor", linear or 1.0))
    original = left.pop("rope.scaling.original_context_length", None)
    if kind == "none" and linear and linear != 1.0:
        kind = "linear"
    parameters: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        if original is not None:
            parameters["original_max_position_embeddings"] = int(original)
        parameters |= {name: float(left.pop(key)) for key, name in _YARN.items() if key in left}
    # 1 is what these are without the key.
    strange = {key: value for key, value in left.items() if value not in (1.0, 0.0)}
    if kind not in ("none", "linear", "yarn"):
        raise _unsupported(path, f"rope.scaling.type = {kind}", None)
    if strange:
        key, value = next(iter(strange.items()))
        raise _unsupported(path, f"{key} = {_short(value)}", None)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        if _rope(config).get("rope_type", "default") != "default":
            return True  # transformers has read it
        if factor != 1.0:
            raise _unsupported(path, f"rope.scaling.factor = {factor:g} without rope.scaling.type", None)
        return False
    _set_rope(path, config, parameters)
    return True


def _by_factors(factors: np.ndarray, config: Any, path: str) -> dict[str, Any]:
    """Return rotary parameters whose frequencies are the unscaled frequencies divided by `factors`.

    Llama 3.1 and later are written as what they are; any other factors as "longrope" of one list.
    """
    dim, theta = _rotary_dim(config), _held_against("rope.freq_base", config)
    if dim is None or theta is None or len(factors) != dim // 2:
        raise _unsupported(
            path, f"the tensor rope_freqs.weight of {len(factors)} factors", f"{dim} rotary dimensions"
        )
    limit = int(config.max_position_embeddings)
    for original in (8192, limit):
        llama3 = {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        if np.allclose(_llama3_factors(llama3, dim, float(theta)), factors, rtol=1e-4):
            return llama3
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": limit,
    }


def _llama3_factors(parameters: Mapping[str, Any], dim: int, theta: float) -> np.ndarray:
    """Return the factors that divide each frequency [dim / 2] in Llama 3.1's scaled rotary embeddings."""
    frequencies = theta ** -(np.arange(0, dim, 2) / dim)
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high, factor = (parameters[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _set_rope(path: str, config: Any, parameters: Mapping[str, Any]) -> None:
    rope = _rope(config)
    if "rope_theta" not in rope:
        raise _unsupported(path, f"scaled rotary embeddings ({parameters['rope_type']})", None)
    theta: dict[str, Any] = {
        name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope
    }
    rope.clear()
    rope.update({**theta, **parameters})


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:4]) + (f" ... ({len(found)} in all)" if len(found) > 4 else "")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:60]


def _unsupported(path: str, what: str, against: Any) -> UnsupportedModelError:
    why = "" if against is None else f" ({against})" if isinstance(against, str) else f" (read as {against})"
    return UnsupportedModelError(
        f"{path} has {what}, which changes the computation and which transformers does not carry over{why}"
    )
