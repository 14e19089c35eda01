"""A step of a small transformer, and every change to it that is compared, does what it says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_fits import ALL, BASE, CONFIG, OPTIONS, TRAIN, training

from asi_lens.base.errors import OptionError
from asi_lens.experiments.small_training import Variant, sized
from asi_lens.experiments.small_transformer import SmallTransformer, TransformerConfig
from asi_lens.training.learner import DivergedError


def test_variants_have_as_many_parameters() -> None:
    counts = {v.name: sum(w.numel() for w in training(v).model.parameters()) for v in ALL}
    assert len(set(counts.values())) == 1, counts
    assert sized(CONFIG, ALL[1]) == replace(CONFIG, gate=True, d_mlp=29)
    odd = TransformerConfig(vocab=30, d_model=48, n_layers=2, n_heads=4, d_mlp=60)
    difference = [
        sum(w.numel() for w in SmallTransformer(sized(odd, v)).parameters()) for v in (BASE, ALL[1])
    ]
    assert abs(difference[0] - difference[1]) <= 2 * 48
    with pytest.raises(OptionError, match=r"d_mlp=11 .* above 11, which the gate is paid with"):
        sized(replace(CONFIG, d_mlp=11), ALL[1])


def test_muon_has_v_and_o_and_adam_the_rest() -> None:
    adam, muon = training(ALL[2]).optimizers
    own = {id(weight) for group in muon.param_groups for weight in group["params"]}
    model = training(ALL[2]).model
    assert {tuple(w.shape) for group in muon.param_groups for w in group["params"]} == {(32, 32)}
    assert len(own) == 2 * CONFIG.n_layers
    rest = {id(weight) for group in adam.param_groups for weight in group["params"]}
    assert not own & rest
    assert len(own) + len(rest) == len(list(model.parameters()))


def test_muons_first_step_is_orthogonal_and_of_adams_size() -> None:
    one = training(replace(ALL[2], weight_decay=0.0))
    W = one.model.attentions()[0].W_V.weight
    before = W.detach().clone()
    one.step(TRAIN.ids[:4])
    # lr / 2 in the first of two steps of the rise; 0.2 sqrt(32) is the size that matches AdamW.
    step = (before - W.detach()) / (OPTIONS.lr / 2 * 0.2 * 32**0.5)
    assert torch.linalg.svdvals(step)[:16].sub(1).abs().max() < 0.4, "Newton-Schulz: about one"


def test_decay_is_of_matrices_alone() -> None:
    one = training(Variant("d", weight_decay=1.0))
    groups = one.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [1.0, 0.0]
    assert {weight.ndim for weight in groups[0]["params"]} == {2}
    assert {weight.ndim for weight in groups[1]["params"]} == {1}


def test_a_torch_without_muon_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    training()
    with pytest.raises(OptionError, match=r"PyTorch=.* 2\.9 or later"):
        training(ALL[2])


def test_half_precision_is_of_training_alone() -> None:
    options = replace(OPTIONS, compute_dtype="bfloat16")
    one = training(options=options)
    told = one.step(TRAIN.ids[:4])
    assert one.model.embedding.weight.dtype == torch.float32
    assert told["train_loss"] == pytest.approx(training().step(TRAIN.ids[:4])["train_loss"], rel=1e-2)
    assert told["train_loss"] != training().step(TRAIN.ids[:4])["train_loss"]


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    one = training()
    one.step(TRAIN.ids[:4])
    with torch.no_grad():
        one.model.norm.weight[0] = float("nan")
    before = one.model.blocks[0].W_in.weight.detach().clone()
    with pytest.raises(DivergedError, match="baseline: not finite in step 2"):
        one.step(TRAIN.ids[:4])
    assert torch.equal(one.model.blocks[0].W_in.weight, before)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Variant("v", weight_decay=-0.1), "weight_decay=-0.1 .* at least 0"),
        (lambda: Variant("v", orthogonality=float("nan")), "orthogonality=nan .* a number"),
        (lambda: Variant("v", orthogonality=-1.0), "orthogonality=-1.0"),
        (lambda: Variant("v", orthogonality=1.0, frozen=True), "0 where W_O is frozen"),
        (lambda: Variant("v", gate="yes"), "gate='yes'"),  # type: ignore[arg-type]
        (lambda: replace(OPTIONS, lr=0.0), "lr=0.0 .* above 0"),
        (lambda: replace(OPTIONS, n_points=0), "n_points=0"),
        (lambda: replace(OPTIONS, compute_dtype="float16"), "float32 or bfloat16"),
        (lambda: replace(OPTIONS, batch_size=8).n_steps(16), "batch_size=8 .* at least context=16"),
        (lambda: replace(OPTIONS, n_tokens=63).n_steps(16), "n_tokens=63 .* at least batch_size=64"),
        (lambda: replace(OPTIONS, n_points=21).n_steps(16), "n_points=21 .* at most the steps"),
    ],
)
def test_options_out_of_range(make: Any, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        make()
