"""Values, outputs and gradients of a Lorsa are those of llamascopium, the library of the paper's authors."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from small_lorsas import CONTEXT, LAYER, N_OV, config
from torch import Tensor

from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.models import load_model
from asi_lens.lorsa.data import harvest_pairs
from asi_lens.lorsa.initialize import initialize_lorsa
from asi_lens.lorsa.lorsa import Lorsa

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, which gives both the same weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("llamascopium")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module("lorsa_step")
    sys.modules.pop("lorsa_step", None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
def test_all_numbers_are_the_peers(step: Any, tiny_folder: Any, tiny_tokens: Tokens, name: str) -> None:
    """Rotations of whole heads, none, and of a part of a head."""
    model = load_model(tiny_folder(name), dtype="float32", device="cpu")
    pairs = harvest_pairs(model, tiny_tokens[:4], LAYER, progress=False)
    ours = Lorsa(config(model), dtype=torch.float64)
    initialize_lorsa(ours, model, LAYER, pairs, "asi", 4)
    ours.b_V.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    theirs = step.as_llamascopium(ours, torch.float64)
    x, y = pairs.inputs.double(), pairs.outputs.double()
    target = ours.normalize_output(y)
    code = ours.encode(x)
    dense = torch.zeros(*code.values.shape[:2], N_OV).double().scatter(-1, code.indices, code.values)
    acts = theirs.encode(ours.normalize(x))
    torch.testing.assert_close(acts, dense)
    torch.testing.assert_close(theirs.decode(acts), ours.decode_normalized(code))
    mask = torch.ones(len(x), CONTEXT).double()
    mask[:, 0] = 0
    loss = (ours.decode_normalized(code) - target)[:, 1:].square().sum(-1).mean()
    their_loss = theirs.compute_loss({"in": ours.normalize(x), "out": target, "mask": mask})["loss"]
    torch.testing.assert_close(loss, their_loss)
    found, expected = gradients(ours, loss), gradients(theirs, their_loss)
    names = {"b_O": "b_D"}
    for key, grad in found.items():
        torch.testing.assert_close(
            grad, expected[names.get(key, key)], msg=lambda text, key=key: f"{key}: {text}"
        )


def gradients(lorsa: Any, loss: Tensor) -> dict[str, Tensor]:
    """By the last part of a parameter's name."""
    names, parameters = zip(*lorsa.named_parameters(), strict=True)
    return dict(
        zip((n.rpartition(".")[2] for n in names), torch.autograd.grad(loss, parameters), strict=True)
    )
