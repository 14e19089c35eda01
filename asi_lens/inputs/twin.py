"""The module tree that a forward pass runs on, and the place of each TransformerLens hook in the tree.

A TransformerBridge wraps every Hugging Face module and computes attention step by step, so that each step can
be hooked; it has about 0.7 of the speed of the wrapped model. Most hooks are the input or the output of a
Hugging Face module. For these hooks a *plain twin* runs instead: the same modules without the wrappers, with
the same (shared) parameters and buffers, and with fused attention. By construction, the twin's hooks get the
same activations as forward hooks on the plain Hugging Face model.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from asi_lens.base.errors import OptionError, UnsupportedModelError

Side = Literal["in", "out"]


@dataclass
class Runner:
    """A model or plain twin that can be called on token ids, with the modules of TransformerLens's hooks."""

    blocks: list[nn.Module]
    """One module per layer; its output, or the output's first entry, is the residual stream."""
    places: dict[str, tuple[nn.Module, Side]]
    """Hook name -> (module, whether the hook is the module's input or output)."""
    root: Any = None
    """The plain twin; None if the model itself is called (the model owns this runner, not the reverse)."""
    hook_points: list[nn.Module] = field(default_factory=list)
    """Every HookPoint of the model, to detect hooks that the user added."""
    processed: bool = False
    """Whether the bridge was in compatibility mode (weights processed, hooks renamed) at the creation."""

    def call(self, model: Any, ids: Tensor, logits: bool) -> Tensor | None:
        """Run on ids [batch position] to the end; return logits [batch position d_vocab], or None."""
        if self.root is None:
            return model(ids, return_type="logits" if logits else None)
        if not logits:
            self.root.base_model(input_ids=ids)
            return None
        output = self.root(input_ids=ids)
        if getattr(output, "logits", None) is None:
            raise UnsupportedModelError(f"{type(self.root).__name__} has no output head, so it has no logits")
        return output.logits


_RUNNERS: WeakKeyDictionary[nn.Module, tuple[Runner, Runner | None]] = WeakKeyDictionary()


def kind_of(model: object) -> Literal["bridge", "hooked"] | None:
    """Return `bridge` (TransformerBridge), `hooked` (TransformerLens 3's HookedTransformer) or None."""
    for base in type(model).__mro__:
        if base.__module__.partition(".")[0] == "transformer_lens":
            if base.__name__ == "TransformerBridge":
                return "bridge"
            if base.__name__ == "HookedTransformer":
                return "hooked"
    return None


def require_model(model: nn.Module) -> None:
    """Raise OptionError for a module that is not a model of TransformerLens."""
    if kind_of(model) is None:
        raise OptionError(
            f"model={type(model).__name__}(...) is not allowed; model must be a TransformerBridge or a "
            "HookedTransformer (load_model returns one; for a Hugging Face model: "
            "TransformerBridge.boot_transformers(..., hf_model=m))"
        )


def runners(model: nn.Module) -> tuple[Runner, Runner | None]:
    """Return the runner with the model's own hook points, and the plain twin's runner, or None."""
    require_model(model)
    processed = bool(getattr(model, "compatibility_mode", False))
    if model not in _RUNNERS or _RUNNERS[model][0].processed != processed:
        own = _own_runner(model, processed)
        _RUNNERS[model] = (own, _plain_runner(model, own) if kind_of(model) == "bridge" else None)
    return _RUNNERS[model]


def runner_for(model: nn.Module, hooks: Iterator[str] | list[str]) -> Runner:
    """Return the fastest runner that reaches all `hooks`.

    If the user added hooks to the model itself, the model runs, so that these hooks are called.
    """
    own, twin = runners(model)
    if twin is None or any(_hooked_by_somebody(point) for point in own.hook_points):
        return own
    return twin if all(name in twin.places for name in hooks) else own


def _hooked_by_somebody(point: Any) -> bool:
    # TransformerLens 4 itself hooks some points, only to call other hooks
    owners = (getattr(handle.user_hook, "__module__", None) for handle in point.fwd_hooks)
    return any(not str(owner).startswith("transformer_lens.") for owner in owners)


def original(module: nn.Module) -> nn.Module:
    """Return the Hugging Face module inside a bridge component (or the module itself)."""
    while (inside := module._modules.get("_original_component")) is not None:
        module = inside
    return module


def _own_runner(model: Any, processed: bool) -> Runner:
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} {_architecture(model)} has no `blocks`: no layers to hook"
        )
    points = model.hook_dict
    unique = {id(point): point for point in points.values()}
    return Runner(
        blocks=list(blocks),
        places={name: (point, "out") for name, point in points.items()},
        hook_points=list(unique.values()),
        processed=processed,
    )


def _plain_runner(model: Any, own: Runner) -> Runner | None:
    source = model.original_model
    device_map = getattr(source, "hf_device_map", None) or {}
    # Processed weights are in the wrappers; the modules of a dispatched model have their own `forward`.
    if own.processed or len(set(map(str, device_map.values()))) > 1:
        return None
    if any("forward" in vars(module) for module in source.modules()) or not hasattr(source, "base_model"):
        return None
    twins: dict[int, nn.Module] = {}
    root = _twin(source, twins, {})
    _use_fused_attention(root)
    root.eval()

    component_of: dict[int, tuple[nn.Module, Side]] = {}
    for component in model.modules():
        # A component without its own name uses its parent's module; its hooks are not hooks of that module.
        if "_original_component" not in component._modules or getattr(component, "name", None) is None:
            continue
        module = twins.get(id(original(component)))
        if module is not None:
            component_of[id(component.hook_in)] = (module, "in")
            component_of[id(component.hook_out)] = (module, "out")
    places = {
        name: component_of[id(point)] for name, (point, _) in own.places.items() if id(point) in component_of
    }
    blocks = [twins[id(original(block))] for block in own.blocks if id(original(block)) in twins]
    if len(blocks) != len(own.blocks):
        return None
    return Runner(blocks=blocks, places=places, root=root)


def _twin(module: nn.Module, twins: dict[int, nn.Module], configs: dict[int, Any]) -> nn.Module:
    """Return a copy of the tree without wrappers and hooks; parameter and buffer tables are shared.

    Shared tables (not only shared tensors) keep the twin correct if weights are replaced or moved.
    """
    module = original(module)
    if id(module) in twins:
        return twins[id(module)]
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__.update(module.__dict__)
    twins[id(module)] = twin
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[name] = OrderedDict()
    for name in (
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks_with_kwargs",
    ):
        twin.__dict__[name] = OrderedDict()
    config = module.__dict__.get("config")
    if hasattr(config, "to_dict"):
        if id(config) not in configs:
            configs[id(config)] = copy.deepcopy(config)
        twin.__dict__["config"] = configs[id(config)]
    twin.__dict__["_modules"] = {
        name: None if child is None else _twin(child, twins, configs)
        for name, child in module._modules.items()
    }
    return twin


def _use_fused_attention(root: Any) -> None:
    """Turn on fused attention, unless the architecture cannot (soft-capped scores) or has its own choice."""
    configs = {
        id(m.__dict__["config"]): m.__dict__["config"] for m in root.modules() if "config" in m.__dict__
    }
    for config in configs.values():
        config.output_attentions = False
        config.use_cache = False
    if getattr(root.config, "_attn_implementation", None) != "eager" or not getattr(
        root, "_supports_sdpa", False
    ):
        return
    root.set_attn_implementation("sdpa")


def _architecture(model: nn.Module) -> str:
    return str(getattr(getattr(model, "cfg", None), "architecture", "") or "")
