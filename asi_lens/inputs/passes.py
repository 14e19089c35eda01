"""Forward passes of one runner with hooks at modules, which can stop early or start late.

`hooks` chooses the runner; here nothing is verified.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from asi_lens.base.errors import OptionError, UnsupportedModelError, unknown_name
from asi_lens.inputs import twin

Hook = Callable[[Tensor], Tensor | None]
"""Takes an activation [batch position width], which must not be changed in place. A returned tensor replaces
the activation."""


@dataclass(frozen=True)
class ResumePoint:
    """The residual stream before block `layer`, from which later blocks can be run repeatedly."""

    layer: int
    ids: Int[Tensor, "batch position"]
    states: Any
    """Return value of block `layer - 1`; None for layer 0."""


class _Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward pass after the last needed layer."""


def run(
    model: nn.Module,
    runner: twin.Runner,
    ids: twin.Given,
    hooks: Mapping[str, Hook],
    *,
    stop_after_layer: int | None = None,
    logits: bool = False,
    start: ResumePoint | None = None,
    reach_all: bool = True,
) -> Float[Tensor, "batch position d_vocab"] | None:
    """Run `runner` as `hooks.forward` says; ids are checked and on the model's device.

    A hook that the pass does not reach is an error unless `reach_all` is False.
    """
    fired: set[str] = set()
    shape = ids.shape if isinstance(ids, Tensor) else None
    with ExitStack() as undo:
        for name, hook in hooks.items():
            if name not in runner.places:
                raise unknown_name("hook", name, runner.places)
            undo.callback(_Attached(runner.places[name], hook, name, fired, shape).attach().remove)
        if start is not None:
            _skip_blocks(runner, start, ids, undo)
        if stop_after_layer is not None:
            undo.callback(runner.blocks[stop_after_layer].register_forward_hook(_stop).remove)
        try:
            output = runner.call(model, ids, logits)
        except _Stop:
            output = None
    missed = [name for name in hooks if name not in fired]
    if missed and reach_all:
        raise UnsupportedModelError(
            f"{twin.architecture(model)} did not reach {', '.join(missed)} in a forward with "
            f"stop_after_layer={stop_after_layer}, logits={logits}, start={start.layer if start else None}"
        )
    return output


@torch.inference_mode()
def states_before(model: nn.Module, runner: twin.Runner, ids: Tensor, layer: int) -> Any:
    """Run the blocks before `layer` and return the value of the last of these blocks."""
    kept: list[Any] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept.append(output)
        raise _Stop

    handle = runner.blocks[layer - 1].register_forward_hook(keep)
    try:
        runner.call(model, ids, False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return kept[0]


@dataclass(frozen=True)
class _Attached:
    """A hook at a place of a model, in the form in which PyTorch calls it."""

    place: twin.Place
    hook: Hook
    name: str
    fired: set[str]
    """Names of the hooks that a pass has reached; this one adds its own."""
    shape: torch.Size | None
    """Batch and positions of the ids."""

    def attach(self) -> Any:
        """Register the hook and return PyTorch's handle."""
        if self.place.side == "in":
            return self.place.module.register_forward_pre_hook(self.before, with_kwargs=True)
        return self.place.module.register_forward_hook(self.after)

    def after(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple | list):
            return self._run(output)
        new = self._run(output[0])
        if new is None:
            return None
        return [new, *output[1:]] if isinstance(output, list) else (new, *output[1:])

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            new = self._run(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        key = next(key for key, value in kwargs.items() if isinstance(value, Tensor))
        new = self._run(kwargs[key])
        return None if new is None else (args, {**kwargs, key: new})

    def _run(self, activation: Tensor) -> Tensor | None:
        self.fired.add(self.name)
        flat, scale, shape = activation, self.place.scale, self.shape
        if self.name.endswith(".hook_z"):  # TransformerLens's versions have 3 or 4 axes
            flat = rearrange(activation, "batch position ... -> batch position (...)")
        elif shape is not None and activation.ndim == 2 and len(activation) == shape.numel():
            # OPT joins batch and position
            flat = activation.unflatten(0, shape)
        if scale != 1.0:
            flat = flat * scale
        new = self.hook(flat.clone() if self.place.changes else flat)
        if new is None:
            return None
        if new.shape != flat.shape:
            raise OptionError(f"the hook at {self.name} returned {tuple(new.shape)} for {tuple(flat.shape)}")
        if scale != 1.0:
            new = new / scale
        return new.to(activation.dtype).reshape(activation.shape)


def _skip_blocks(runner: twin.Runner, start: ResumePoint, ids: twin.Given, undo: ExitStack) -> None:
    """Make every block before the start return the captured output of the last of these blocks."""
    if not isinstance(ids, Tensor) or not torch.equal(start.ids, ids):
        raise OptionError("start was captured with other token ids than these")
    for block in runner.blocks[: start.layer]:
        # set in the instance's __dict__: a bridge component passes attributes to its inner module
        if "forward" in vars(block):
            undo.callback(block.__dict__.__setitem__, "forward", vars(block)["forward"])
        else:
            undo.callback(block.__dict__.pop, "forward")
        block.__dict__["forward"] = lambda *args, **kwargs: start.states


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _Stop
