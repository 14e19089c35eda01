"""What a model's numbers depend on besides its tensors: modules, attributes, configuration, added hooks.

The plain twin (`twin`) is a copy, so it has to be made anew when any of these change. Hooks and methods that
a user put on a module are not in the copy: with them, the model itself runs, and nothing is cached.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import dtype, nn
from torch.nn.modules import module as torch_module

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)
_TABLES = {*HOOK_TABLES, "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "forward"}
# Set by a load or a forward; no number depends on them. Every pass is in evaluation mode.
_PASSING = {
    "training",
    "_is_hf_initialized",
    "_compiled_call_impl",
    "warnings_issued",
    "_output_capturing_hooks_installed",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "generation_config",
    "name_or_path",
    "is_gradient_checkpointing",
}
# Where a model came from, and options that a twin sets by itself.
_CONFIG_PASSING = {
    "_name_or_path",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "_output_attentions",
    "_output_hidden_states",
    "return_dict",
    "dtype",
    "torch_dtype",
}
_PLAIN = (type(None), int, float, str, dtype)
LIBRARIES = ("transformer_lens", "transformers", "accelerate")

State = tuple[Any, ...]


def original(module: nn.Module) -> nn.Module:
    """Return the Hugging Face module inside a bridge component (or the module itself)."""
    while (inside := module._modules.get("_original_component")) is not None:
        module = inside
    return module


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return every module of a model once, those of a bridge's Hugging Face model included."""
    found: dict[nn.Module, None] = {}
    source = getattr(model, "original_model", None)
    waiting = [*([source] if isinstance(source, nn.Module) else []), model]
    while waiting:  # `modules()` passes each module through a generator of every module above it
        module = waiting.pop()
        if module not in found:
            found[module] = None
            waiting += [one for one in reversed(module._modules.values()) if one is not None]
    return list(found)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Context in which no module of a model is in training mode; afterwards each is as it was."""
    # In the instance's __dict__: a bridge component passes attributes to its inner module.
    training = [module for module in all_modules(model) if vars(module)["training"]]
    try:
        for module in training:
            vars(module)["training"] = False
        yield
    finally:
        for module in training:
            vars(module)["training"] = True


def state_of(model: nn.Module) -> State:
    """Return a value that changes if modules, their code, attributes or a configuration of the model change.

    Objects other than numbers and texts count by identity. Tensors are not part: a twin shares them.
    """
    parts: list[Any] = [getattr(model, "compatibility_mode", False)]
    held: list[dict[str, Any]] = []
    for module in all_modules(model):
        parts += [id(module), type(module).forward, *map(id, module._modules.values())]
        if "_original_component" in module._modules or type(module).__module__.startswith("transformer_lens"):
            continue  # components of a bridge keep values of the last forward
        held.append(dict(attributes(module)))
    return (*parts, *_content(held))


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a module that are neither tensors' tables nor hooks nor passing states."""
    for name, value in vars(module).items():
        if name not in _TABLES and name not in _PASSING:
            yield name, value


def config_items(config: Any) -> dict[str, Any]:
    """Return the entries of a configuration that a number may depend on."""
    return {
        name: value
        for name, value in vars(config).items()
        if name not in _CONFIG_PASSING and not name.startswith("_attn_implementation")
    }


def _content(value: Any) -> State:
    """Return a hashable copy of a value and all that it holds: keys, lengths, plain values."""
    flat: list[Any] = []
    held: dict[int, Any] = {}
    waiting = [value]
    while waiting:  # no recursion: a model has thousands of entries, read at every forward pass
        one = waiting.pop()
        if isinstance(one, _PLAIN):
            flat.append(one)
        elif id(one) in held or not (hasattr(one, "to_dict") or isinstance(one, dict | list | tuple | set)):
            flat.append(id(one))
        else:
            held[id(one)] = one
            inside = config_items(one) if hasattr(one, "to_dict") else one
            flat.append(tuple(map(str, inside)) if isinstance(inside, dict) else (len(inside),))
            waiting += inside.values() if isinstance(inside, dict) else inside
    return tuple(flat)


def added_hooks(model: nn.Module) -> list[str]:
    """Return where somebody put a forward hook or a `forward` of their own: names of modules, for errors.

    Hooks and methods that TransformerLens, transformers and accelerate add for themselves do not count.
    """
    found = [module for module in _changed(model) if next(_added(module), None) is not None]
    names = {id(module): name for name, module in model.named_modules()} if found else {}
    named = [names.get(id(module)) or type(module).__name__ for module in found]
    return named + ["every module"] * any(map(len, _global_tables()))


@contextmanager
def without_added_hooks(model: nn.Module) -> Iterator[None]:
    """Take the hooks of `added_hooks` off inside the context."""
    tables: dict[int, tuple[MutableMapping[Any, Any], dict[Any, Any]]] = {}
    everywhere = [(table, key) for table in _global_tables() for key in table]
    for table, key in [*everywhere, *(one for module in _changed(model) for one in _added(module))]:
        tables.setdefault(id(table), (table, dict(table)))
        tables[id(table)][0].pop(key)
    try:
        yield
    finally:
        for table, before in tables.values():
            later = {key: value for key, value in table.items() if key not in before}
            table.clear()
            table.update({**before, **later})


def _global_tables() -> tuple[MutableMapping[Any, Any], ...]:
    return torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks


def _changed(model: nn.Module) -> list[nn.Module]:
    """Return the modules with a hook or a `forward` of their own, whoever put it there."""
    return [
        module
        for module in all_modules(model)
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    ]


def _added(module: nn.Module) -> Iterator[tuple[MutableMapping[Any, Any], Any]]:
    """Yield (table, key) of every hook or method that somebody added to a module."""
    # TransformerLens wraps a user's function; its handle knows the function.
    lens = {handle.hook.id: handle.user_hook for handle in getattr(module, "fwd_hooks", ())}
    for table in (module._forward_hooks, module._forward_pre_hooks):
        for key, hook in list(table.items()):
            if not _is_of_a_library(lens.get(key, hook)):
                yield table, key
    forward = vars(module).get("forward")
    if forward is not None and not _is_of_a_library(forward):
        yield module.__dict__, "forward"


def _is_of_a_library(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    owner = getattr(function, "__module__", None) or type(function).__module__
    return str(owner).partition(".")[0] in LIBRARIES
