"""The module tree that a forward pass runs on, and the place of each TransformerLens hook in the tree.

A TransformerBridge wraps every Hugging Face module and computes attention step by step, so that each step can
be hooked; it has about 0.7 of the speed of the wrapped model. Most hooks are the input or the output of a
Hugging Face module. For these hooks a *plain twin* runs instead: the same modules without the wrappers, with
the same (shared) parameters and buffers, and with fused attention. By construction, the twin's hooks get the
same activations as forward hooks on the plain Hugging Face model.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from asi_lens.base.errors import OptionError, UnsupportedModelError
from asi_lens.base.products import without_autocast
from asi_lens.inputs import structure
from asi_lens.inputs.plain import PlainModel

Given = Tensor | Mapping[str, Tensor]
"""Input of a pass: token ids [batch position], or transformers' arguments by name."""


class Place(NamedTuple):
    """The module that a hook is at."""

    module: nn.Module
    side: Literal["in", "out"]
    scale: float = 1.0
    """Factor between the module's value and the hook's value (Granite's `residual_multiplier`)."""
    changes: bool = False
    """Whether the model changes the tensor in place later (Falcon's `mlp_output += attention_output`)."""


@dataclass
class Runner:
    """A model or plain twin that can be called on token ids, with the modules of TransformerLens's hooks."""

    blocks: list[nn.Module]
    """One module per layer; its output, or the output's first entry, is the residual stream."""
    places: dict[str, Place]
    """Hook name -> the module whose input or output the hook is."""
    root: Any = None
    """The plain twin; None if the model itself is called (the model owns this runner, not the reverse)."""

    def call(self, model: Any, given: Given, logits: bool) -> Tensor | None:
        """Run to the end; return logits [batch position d_vocab], or None.

        Dropout is off, and so is autocast, whatever the caller has switched on: no number depends on them.
        """
        # A bridge's twin is a copy that is always in evaluation mode.
        shared = self.root is None or isinstance(model, PlainModel)
        with structure.in_evaluation(model) if shared else nullcontext(), without_autocast():
            return self._call(model, given, logits)

    def _call(self, model: Any, given: Given, logits: bool) -> Tensor | None:
        if self.root is None:
            if not isinstance(given, Tensor):
                raise UnsupportedModelError(
                    f"TransformerLens's own computation of {architecture(model)} takes token ids only; hooks "
                    "that you added to the model, and hooks that only TransformerLens has, need it"
                )
            return model(given, return_type="logits" if logits else None)
        inputs = {"input_ids": given} if isinstance(given, Tensor) else dict(given)
        if not logits:
            self.root.base_model(**inputs)
            return None
        output = self.root(**inputs)
        if getattr(output, "logits", None) is None:
            raise UnsupportedModelError(f"{type(self.root).__name__} has no output head, so it has no logits")
        return output.logits


@dataclass
class Runners:
    """The two runners of a model, and the structure of the model that they were made from."""

    own: Runner
    """Has the model's own hook points."""
    plain: Runner | None
    """The plain twin's runner; None for a model that has no plain twin (`why_not`)."""
    why_not: str
    state: structure.State


_RUNNERS: WeakKeyDictionary[nn.Module, Runners] = WeakKeyDictionary()
_HELD: WeakKeyDictionary[nn.Module, tuple[Runners, list[str]]] = WeakKeyDictionary()
"""Runners and added hooks of the models that are `held`."""


def kind_of(model: object) -> Literal["bridge", "hooked", "plain"] | None:
    """Return `bridge` (TransformerBridge), `hooked` (TransformerLens 3's HookedTransformer), `plain`
    (`plain.PlainModel`) or None."""
    if isinstance(model, PlainModel):
        return "plain"
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
            f"model={type(model).__name__}(...) is not allowed; model must be a TransformerBridge, a "
            "PlainModel or a HookedTransformer (load_model returns one; for a Hugging Face model: "
            "TransformerBridge.boot_transformers(..., hf_model=m))"
        )


def runners(model: nn.Module) -> Runners:
    """Return the model's runners, made anew if modules, attributes or the configuration have changed."""
    if model in _HELD:
        return _HELD[model][0]
    require_model(model)
    state = structure.state_of(model)
    known = _RUNNERS.get(model)
    if known is None or known.state != state:
        own = _own_runner(model)
        plain, why_not = (
            _plain_runner(model, own) if kind_of(model) == "bridge" else (None, "it is no bridge")
        )
        known = _RUNNERS[model] = Runners(own, plain, why_not, state)
    return known


def added_hooks(model: nn.Module) -> list[str]:
    """Return what `structure.added_hooks` does."""
    return _HELD[model][1] if model in _HELD else structure.added_hooks(model)


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Context of many passes: structure and hooks of the model are looked at as it begins, not at every pass.

    A look at 2,000 modules takes 10 ms, on a GPU as long as a pass.
    """
    if model in _HELD:
        yield
        return
    _HELD[model] = runners(model), structure.added_hooks(model)
    try:
        yield
    finally:
        del _HELD[model]


def original(module: nn.Module) -> nn.Module:
    """Return the Hugging Face module inside a bridge component (or the module itself)."""
    return structure.original(module)


def _own_runner(model: Any) -> Runner:
    if isinstance(model, PlainModel):
        places = {name: Place(module, side) for name, module, side in model.places()}
        return Runner(model.blocks, places, model.root)
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} {architecture(model)} has no `blocks`: no layers to hook"
        )
    places = {name: Place(point, "out") for name, point in model.hook_dict.items()}
    return Runner(list(blocks), _with_scaled(places, list(blocks)))


def eager_runner(model: Any) -> Runner | None:
    """Return a runner of a second twin, which computes attention step by step as transformers' own code does.

    It has no hooks. None if the plain twin itself is so (soft-capped scores, an own choice of attention).
    """
    both = runners(model)
    fused = both.own if isinstance(model, PlainModel) else both.plain
    if fused is None or getattr(fused.root.config, "_attn_implementation", None) != "sdpa":
        return None
    root, twins = plain_copy(fused.root if isinstance(model, PlainModel) else model.original_model)
    if isinstance(model, PlainModel):
        root.set_attn_implementation("eager")
    if getattr(root.config, "_attn_implementation", None) != "eager":
        return None
    return Runner([twins[id(original(block))] for block in model.blocks], {}, root)


def _plain_runner(model: Any, own: Runner) -> tuple[Runner | None, str]:
    """Return the twin's runner, or None and the reason why there is none."""
    source = model.original_model
    device_map = getattr(source, "hf_device_map", None) or {}
    if getattr(model, "compatibility_mode", False):
        return None, "TransformerLens has processed its weights"
    if len(set(map(str, device_map.values()))) > 1:
        return None, "it is spread over several devices"
    if not hasattr(source, "base_model"):
        return None, f"{type(source).__name__} is no transformers model"
    root, twins = plain_copy(source)
    _use_fused_attention(root)

    component_of: dict[int, Place] = {}
    for component in model.modules():
        # A component without its own name uses its parent's module; its hooks are not hooks of that module.
        if "_original_component" not in component._modules or getattr(component, "name", None) is None:
            continue
        module = twins.get(id(original(component)))
        if module is not None:
            component_of[id(component.hook_in)] = Place(module, "in")
            component_of[id(component.hook_out)] = Place(module, "out")
    places = {
        name: component_of[id(place.module)]
        for name, place in own.places.items()
        if id(place.module) in component_of
    }
    blocks = [twins[id(original(block))] for block in own.blocks if id(original(block)) in twins]
    if len(blocks) != len(own.blocks):
        return None, "its blocks are not those of the Hugging Face model"
    return Runner(blocks, _with_scaled(places, blocks), root), ""


def _with_scaled(places: dict[str, Place], blocks: list[nn.Module]) -> dict[str, Place]:
    """Return `places` with hooks `..._scaled` in layers that multiply what they add to the stream."""
    scaled = {}
    for layer, block in enumerate(blocks):
        factor = getattr(original(block), "residual_multiplier", 1.0)
        if isinstance(factor, float) and factor != 1.0:
            for part in ("attn", "mlp", "attn.o", "mlp.out"):
                name = f"blocks.{layer}.{part}.hook_out"
                if name in places:
                    scaled[f"{name}_scaled"] = places[name]._replace(scale=factor)
    return places | scaled


def plain_copy(source: nn.Module) -> tuple[Any, dict[int, nn.Module]]:
    """Return a plain twin of a bridge's model in evaluation mode, and the twins by id of the original."""
    twins: dict[int, nn.Module] = {}
    root = _twin(source, twins, {})
    root.eval()
    return root, twins


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
    for name in structure.HOOK_TABLES:
        twin.__dict__[name] = OrderedDict()
    # A `forward` or a compiled call of the instance would run the original's modules, not the twin's.
    twin.__dict__.pop("forward", None)
    twin.__dict__["_compiled_call_impl"] = None
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
    # Falcon cannot be switched by the library, but asks its configuration at every call.
    named = vars(sys.modules[type(root).__module__])
    classes = next((value for name, value in named.items() if name.endswith("_ATTENTION_CLASSES")), None)
    if isinstance(classes, dict) and "sdpa" in classes and classes["sdpa"] is classes.get("eager"):
        root.config._attn_implementation = "sdpa"
        return
    root.set_attn_implementation("sdpa")


def architecture(model: Any) -> str:
    """Return the name of the model's architecture, for errors."""
    cfg = model.cfg
    return str(getattr(cfg, "architecture", None) or getattr(cfg, "original_architecture", "") or "the model")
