"""What a number depends on: one place for the keys of everything that a model and tokens give.

- every byte of a model's weights, buffers and tensors kept as attributes, with names, shapes and dtypes;
- its whole configuration, the classes of its modules and their attributes;
- the byte code of a module's class that is none of the libraries' (written or replaced by somebody);
- the tokens, by their own fingerprint;
- the versions of the libraries that compute;
- the options of the measurement.

With hooks that somebody added to the model, numbers also depend on code that has no fingerprint: then nothing
is read from the cache or written to it.
"""

from __future__ import annotations

import importlib.metadata
import json
import marshal
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from asi_lens.base.cache import cached_json, cached_jsons
from asi_lens.base.safetensors_io import pieces, raw_bytes
from asi_lens.inputs import structure, twin

_ADDED = "with added hooks "
_VERSIONS = ("torch", "transformers", "transformer-lens")


def model_fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits of everything in a model that its numbers depend on, computed anew at every call.

    Every byte is read every time (at the speed of memory), since weights can be edited in place in ways that
    leave no trace. With hooks that somebody added, the text is another one at every call (`is_fixed`).
    """
    if structure.added_hooks(model):
        return f"{_ADDED}{uuid.uuid4().hex[:16]}"
    plain = twin.runners(model).plain
    root = model if plain is None or plain.root is None else plain.root
    tensors: dict[int, Tensor] = {}
    lines: list[tuple[Any, int | None]] = [
        (["processed", bool(getattr(model, "compatibility_mode", False))], None)
    ]
    lines += _lines(root, tensors)
    with ThreadPoolExecutor(torch.get_num_threads() if torch.get_num_threads() > 1 else 2) as threads:
        digests: dict[int | None, str] = dict(
            zip(tensors, threads.map(_digest, tensors.values()), strict=True)
        )
    text = json.dumps([[line, digests.get(key)] for line, key in lines])
    return _hashed(text.encode())[:16]


def is_fixed(fingerprint: str) -> bool:
    """Return whether a model's fingerprint stands for its numbers: False with hooks that somebody added."""
    return not fingerprint.startswith(_ADDED)


def number_key(weights: str, dtype: str, tokens: str | None = None, **options: Any) -> dict[str, Any]:
    """Return the key of a number: fingerprints of a model and of tokens, dtype, versions and options.

    Options are JSON values; one of them, `format`, is the version of the measurement's own code.
    """
    return {"weights": weights, "dtype": dtype, "tokens": tokens, "versions": versions(), **options}


def cached_number(kind: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """Return `compute()`, from the cache if it was computed before (see `cache.cached_json`).

    `key` is a `number_key`. With hooks that somebody added to the model the cache is not used.
    """
    return cached_json(kind, key, compute) if is_fixed(key["weights"]) else compute()


def cached_numbers(
    kind: str, keys: Sequence[Mapping[str, Any]], compute: Callable[[list[int]], Sequence[Any]]
) -> list[Any]:
    """Return one number per key as `cache.cached_jsons` does; all are computed where the cache is not used.

    `keys` are `number_key`s of one model, or keys of numbers that no model is part of.
    """
    if all(is_fixed(key.get("weights", "")) for key in keys):
        return cached_jsons(kind, keys, compute)
    return list(compute(list(range(len(keys)))))


@cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries that compute a model's numbers."""
    return {name: importlib.metadata.version(name).partition("+")[0] for name in _VERSIONS}


def _lines(root: nn.Module, tensors: dict[int, Tensor]) -> Iterator[tuple[Any, int | None]]:
    """Yield (JSON description, id of a tensor in `tensors` or None) of every part of a model."""
    configs: dict[int, Any] = {}
    for path, module in root.named_modules():
        yield [path, type(module).__qualname__, *_own_code(type(module))], None
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None and not (value.ndim == 1 and _is_added_bias(name, module, value)):
                    yield _tensor_line(f"{path}.{name}", value, tensors)
        if type(module).__module__.startswith("transformer_lens"):
            continue  # components keep values of the last forward
        for name, value in sorted(structure.attributes(module), key=lambda item: item[0]):
            if hasattr(value, "to_dict"):
                configs[id(value)] = value
            elif isinstance(value, Tensor):
                yield _tensor_line(f"{path}.{name}", value, tensors)
            else:
                yield [f"{path}.{name}", _described(value)], None
    for config in [*configs.values(), *([] if configs else [getattr(root, "cfg", None)])]:
        yield _described(config), None


def _tensor_line(name: str, value: Tensor, tensors: dict[int, Tensor]) -> tuple[Any, int]:
    tensors.setdefault(id(value), value)
    return [name, str(value.dtype), list(value.shape)], id(value)


def _own_code(kind: type[nn.Module]) -> list[str]:
    """Return the hash of a class's `forward`, if it is no library's; else nothing."""
    code = getattr(kind.forward, "__code__", None)
    if code is None or kind.forward.__module__.partition(".")[0] in (*structure.LIBRARIES, "torch"):
        return []
    return [_hashed(marshal.dumps(code))]


def _is_added_bias(name: str, module: nn.Module, value: Tensor) -> bool:
    """Whether a tensor is one of the zero biases that only TransformerLens 3 adds."""
    return (
        type(module).__module__.startswith("transformer_lens")
        and name.startswith(("b_", "_b_"))
        and not bool(value.any())
    )


def _described(value: Any) -> Any:
    """Return a JSON value that says what an attribute or a configuration holds, the same in every process."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)
    if hasattr(value, "to_dict") and not isinstance(value, type):
        value = structure.config_items(value)
        return [[name, _described(value[name])] for name in sorted(value)]
    if isinstance(value, Mapping):
        return sorted([[str(name), _described(one)] for name, one in value.items()], key=str)
    if isinstance(value, set | frozenset):
        return sorted(map(_described, value), key=str)
    if isinstance(value, list | tuple):
        return [_described(one) for one in value]
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), _digest(value)]
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _hashed(data: bytes) -> str:
    import xxhash  # here, since a training from a store needs few packages

    return xxhash.xxh3_128_hexdigest(data)


def _digest(tensor: Tensor) -> str:
    """Return the hash of a tensor's bytes; the bytes of another device are copied a piece at a time."""
    import xxhash

    state = xxhash.xxh3_128()
    for piece in pieces(tensor.detach()):
        state.update(raw_bytes(piece))
    return state.hexdigest()
