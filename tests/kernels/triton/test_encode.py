"""The encoder against float64, and against the plain path."""

from __future__ import annotations

import pytest
import torch
from small_triton import need_kernels, normal, small_plan
from torch import Tensor

need_kernels()

from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.topk import encode_topk
from asi_lens.kernels.triton import plan as plans
from asi_lens.kernels.triton.encode import encode
from asi_lens.kernels.triton.plan import Plan


def weights(n: int, d: int, batch: int, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, encoder and bias; scores have a standard deviation of about 1."""
    x, w = normal(batch, d), normal(n, d, seed=1) / d**0.5
    return x.bfloat16(), w.bfloat16(), 0.1 * normal(n, seed=2) + shift


def crowd(x: Tensor, w: Tensor, plan: Plan, groups: int = 1) -> None:
    """Let half of the rows have their largest scores in a few groups, all members of each."""
    stride = plan.features // plan.group
    members = torch.arange(plan.group, device=w.device)[:, None] * stride + torch.arange(
        groups, device=w.device
    )
    near = 1 + 0.01 * torch.arange(members.numel(), device=w.device).view(members.shape)
    w[members] = (w[0].float() * near[..., None]).bfloat16() + 0.02 * normal(*w[members].shape).bfloat16()
    x[::2] = w[0] * 3


def require_exact(code: SparseCode, x: Tensor, w: Tensor, b: Tensor, plan: Plan) -> None:
    """The picks are the k largest of the products in float64, up to the cut of the keys and float32."""
    x, w, b = x.double(), w.double(), b.double()
    pre = x @ w.T + b
    score = pre.relu()
    # A key's lowest bits, and a float32 sum of d products.
    sizes = x.abs() @ w.abs().T + b.abs()
    slack = score * plan.group * 2**-23 + sizes * plan.d * 2**-24
    indices = code.indices.long()
    assert ((indices >= 0) & (indices < len(w))).all()
    assert all(len(set(row)) == plan.k for row in indices.tolist())
    own = score.gather(1, indices)
    assert ((code.values - own).abs() <= slack.gather(1, indices)).all()
    least = score.topk(plan.k, 1).values[:, -1:]
    assert (own + 2 * slack.amax(1, keepdim=True) >= least).all()
    # Nothing that was left out is clearly above something that was picked.
    left = (score - slack).scatter(1, indices, -1).amax(1)
    assert (left <= (own + slack.gather(1, indices)).amin(1)).all()


CASES = {
    "neither rows nor features fill their blocks": (18, 300, {"group": 8}, 0.0),
    "larger groups, bands of one block": (20, 400, {"features": 128, "group": 16, "band": 1}, 0.0),
    "one group a block": (9, 500, {"features": 128, "group": 128, "settled": 8}, 0.0),
    "few scores are positive": (9, 256, {}, -1.5),
    "no score is positive": (9, 256, {}, -50.0),
}


@pytest.mark.parametrize("case", CASES)
def test_picks_are_the_largest_in_float64(case: str) -> None:
    batch, n, changes, shift = CASES[case]
    plan, (x, w, b) = small_plan(64, n, 8, **changes), weights(n, 64, batch, shift)
    code, overflow = encode(x, w, b, plan)
    assert int(overflow) == 0
    require_exact(code, x, w, b, plan)
    assert (shift == -50) == bool((code.values == 0).all())


def test_equal_scores_are_picked_once_each() -> None:
    plan, (x, w, b) = small_plan(64, 256, 8), weights(256, 64, 12)
    x, w, b = ((t.float() * 2).round() / 2 for t in (x, w * 4, b))
    code, overflow = encode(x.bfloat16(), w.bfloat16(), b, plan)
    assert int(overflow) == 0
    require_exact(code, x, w, b, plan)


@pytest.mark.parametrize("group", [8, 32])
def test_a_group_with_most_of_the_largest_is_settled(group: int) -> None:
    plan = small_plan(64, 512, 8, features=256, group=group)
    x, w, b = weights(512, 64, 8)
    crowd(x, w, plan)
    code, overflow = encode(x, w, b, plan)
    assert int(overflow) == 0
    require_exact(code, x, w, b, plan)
    # Without what was settled the picks would be wrong: more than two of a group are among them.
    stride = plan.features // plan.group
    same = code.indices[0] % stride == 0
    assert int((same & (code.indices[0] < plan.features)).sum()) > 2


def test_rows_with_too_many_such_groups_are_counted() -> None:
    plan, (x, w, b) = small_plan(64, 512, 16, settled=4), weights(512, 64, 8)
    crowd(x, w, plan, groups=7)
    _, overflow = encode(x, w, b, plan)
    assert int(overflow) == 4


def test_a_batch_in_parts_is_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(64, 200, 4)
    x, w, b = weights(200, 64, plan.rows + 3)
    whole, _ = encode(x, w, b, plan)
    monkeypatch.setattr(plans, "_KEY_BYTES", 1)
    assert plan.rows_at_a_time == plan.rows
    parts, _ = encode(x, w, b, plan)
    assert len(parts.indices) > plan.rows_at_a_time
    assert torch.equal(whole.indices, parts.indices)
    assert torch.equal(whole.values, parts.values)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_score_that_is_not_finite_is_picked(value: float) -> None:
    plan, (x, w, b) = small_plan(64, 256, 8), weights(256, 64, 12)
    b[200] = value
    code, _ = encode(x, w, b, plan)
    assert (code.indices == 200).any(1).all()
    assert not code.values[code.indices == 200].isfinite().any()


def test_the_plain_path_picks_the_same() -> None:
    plan, (x, w, b) = small_plan(64, 300, 8), weights(300, 64, 12)
    code, _ = encode(x, w, b, plan)
    plain = encode_topk(x.float(), w.float(), b, 8)
    order, other = code.indices.long().sort(1), plain.indices.sort(1)
    assert torch.equal(order.values, other.values)
    ours, theirs = code.values.gather(1, order.indices), plain.values.gather(1, other.indices)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
