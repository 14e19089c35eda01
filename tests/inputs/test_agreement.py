"""Two computations of one model: what half precision would hide is seen, what rounding explains is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from tiny_models import TL4

from asi_lens.base.errors import UnsupportedModelError
from asi_lens.inputs import agreement, float32, models, verify

pytestmark = pytest.mark.model_facing
HALVES = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("architectures")
    return lambda name: root / name if (root / name).exists() else architectures.build(name, root / name)


def load(folder: Path, dtype: str) -> Any:
    return models.load_model(folder, dtype=dtype, device="cpu")


@pytest.fixture
def no_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32, "host_bytes", lambda: 1000)


def attention_checks(found: verify.Verification) -> list[Any]:
    return [check for check in found.checks if "step by step" in check.what]


@HALVES
@pytest.mark.parametrize("float32", [True, False])
def test_attention_that_is_wrong_by_a_few_per_cent_is_refused(
    dtype: str, float32: bool, folder_of: Any, request: pytest.FixtureRequest
) -> None:
    if not float32:
        request.getfixturevalue("no_float32")
    model = load(folder_of("falcon-alibi"), dtype)
    with pytest.raises(UnsupportedModelError, match=r"misses by 0\.0\d+ .*two ways to compute attention"):
        models.hook_name(model, "resid_post", 0)


@pytest.mark.skipif(TL4, reason="TransformerLens 4 computes HunYuan right")
@HALVES
@pytest.mark.parametrize("float32", [True, False])
def test_an_own_computation_that_is_wrong_by_a_few_per_cent_is_refused(
    dtype: str, float32: bool, folder_of: Any, request: pytest.FixtureRequest
) -> None:
    if not float32:
        request.getfixturevalue("no_float32")
    model = load(folder_of("hunyuan"), dtype)
    assert attention_checks(verify.verification(model))
    assert verify.verification(model).holds
    with pytest.raises(UnsupportedModelError, match=r"own computation of HunYuan.*differs by [1-9]\.\d%"):
        models.forward(model, torch.arange(5, 25)[None], {"blocks.1.attn.hook_pattern": lambda x: None})


@HALVES
def test_right_models_hold_by_float32s_measure(dtype: str, folder_of: Any) -> None:
    model = load(folder_of("llama"), dtype)
    weights = {(one.data_ptr(), one.dtype) for one in model.parameters()}
    found = verify.verify(model)
    assert found.holds
    checks = [*attention_checks(found), *(check for check in found.checks if "own" in check.what)]
    assert [check.allowed for check in checks] == [2e-4] * 3
    assert all(0 < check.error < 1e-5 for check in checks)
    assert {(one.data_ptr(), one.dtype) for one in model.parameters()} == weights


@pytest.mark.usefixtures("no_float32")
@pytest.mark.parametrize("name", ["llama", "deepseek-v2"])
@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [("bfloat16", [0.015, 0.1, 0.1]), ("float16", [0.005, 0.02, 0.02]), ("float32", [2e-4, 2e-4])],
)
def test_right_models_hold_without_float32(
    dtype: str, allowed: list[float], name: str, folder_of: Any
) -> None:
    found = verify.verify(load(folder_of(name), dtype))
    assert found.holds
    assert [check.allowed for check in attention_checks(found)] == allowed


@pytest.mark.skipif(TL4, reason="TransformerLens 4 computes OLMo 2 in half precision, too")
def test_what_only_half_precision_cannot_compute_is_refused(folder_of: Any) -> None:
    """TransformerLens mixes two dtypes in OLMo 2, which float32 hides and bfloat16 does not."""
    assert verify.own_error(load(folder_of("olmo2"), "float32")) == ""
    model = load(folder_of("olmo2"), "bfloat16")
    assert verify.verification(model).holds
    assert "it fails (RuntimeError" in verify.own_error(model)


def test_another_shape_and_nan_do_not_agree() -> None:
    x = torch.ones(2, 3, 4)
    assert agreement.relative_error(x, x[:, :2], torch.float32) == float("inf")
    assert agreement.relative_error(1.01 * x, x, torch.float32) == pytest.approx(0.01, rel=1e-5)
    nan = agreement.relative_error(x * float("nan"), x, torch.bfloat16)
    assert not agreement.Check("", None, nan, 0.1).holds
    x[0, 0] = 9.0  # another expert for one token
    assert agreement.relative_error(torch.ones(2, 3, 4), x, torch.float16) == 0.0
