"""A model that is held is looked at once; its modules are found as PyTorch finds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from asi_lens.activations.harvest import harvest, places
from asi_lens.collapse.interventions import cross_entropy
from asi_lens.inputs import models, structure, twin
from asi_lens.inputs.corpora import Tokens

pytestmark = pytest.mark.model_facing


class Count:
    """A consumer that counts rows."""

    def __init__(self, wants: list[tuple[str, int]]) -> None:
        self.wants, self.rows = wants, 0

    def consume(self, where: tuple[str, int], rows: torch.Tensor) -> None:
        self.rows += len(rows)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a model was looked at for, every time."""
    found: list[str] = []

    def counted(name: str, look: Any) -> Any:
        return lambda model: found.append(name) or look(model)

    for name in ("state_of", "added_hooks"):
        monkeypatch.setattr(structure, name, counted(name, getattr(structure, name)))
    return found


def test_many_passes_of_a_held_model_look_once(tiny_llama: Any, ids: torch.Tensor, looks: list[str]) -> None:
    models.forward(tiny_llama, ids, {}, logits=True)  # verified
    looks.clear()
    with models.held(tiny_llama):
        for _ in range(3):
            models.forward(tiny_llama, ids, {}, logits=True)
        with models.held(tiny_llama):
            models.hook_name(tiny_llama, "attn_out", 0)
        models.forward(tiny_llama, ids, {}, logits=True)
    assert sorted(looks) == ["added_hooks", "state_of"]
    models.forward(tiny_llama, ids, {}, logits=True)
    assert sorted(looks) == ["added_hooks", "added_hooks", "state_of", "state_of"]


def test_a_harvest_and_losses_look_as_often_for_any_text(
    tiny_llama: Any, tiny_tokens: Tokens, looks: list[str]
) -> None:
    times, tokens = [], tiny_tokens
    for size in (tokens.context, len(tokens) * tokens.context):
        looks.clear()
        consumer = Count(places(tiny_llama, ["attn_out", "mlp_out"], None))
        harvest(tiny_llama, tokens, [consumer], batch_tokens=size, progress=False)
        cross_entropy(tiny_llama, tokens, batch_tokens=size, progress=False)
        times.append(list(looks))
        assert consumer.rows == len(consumer.wants) * len(tokens) * (tokens.context - 1)
    assert times[0] == times[1]


def test_what_is_changed_before_and_after_counts(tiny_folder: Any, ids: torch.Tensor) -> None:
    model = models.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    clean = models.forward(model, ids, {}, logits=True)
    model.add_hook("blocks.0.hook_attn_out", lambda x, hook: x * 0)

    def fail_later() -> None:
        with models.held(model):
            hooked = models.forward(model, ids, {}, logits=True)
            assert not torch.allclose(hooked, clean, atol=1e-2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_later()
    model.reset_hooks()
    assert torch.equal(models.forward(model, ids, {}, logits=True), clean)
    assert model not in twin._HELD


def test_modules_are_those_of_pytorch_in_its_order(tiny_llama: Any) -> None:
    own = list(tiny_llama.modules())
    inside = [module for module in tiny_llama.original_model.modules() if module not in set(own)]
    assert structure.all_modules(tiny_llama) == own + inside
    shared = nn.Linear(2, 2)
    twice = nn.Sequential(nn.Sequential(shared, nn.ReLU()), shared, nn.Tanh())
    twice.register_module("empty", None)
    assert structure.all_modules(twice) == list(twice.modules())
