"""The largest values of units and their gradients, against the definition and autograd on dense arrays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from asi_lens.lorsa.unit_values import largest_values

BATCH, HEADS, POSITIONS, D_IN = 3, 4, 7, 5


def inputs(n_ov: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (BATCH, POSITIONS, D_IN), (BATCH, HEADS, POSITIONS, POSITIONS), (n_ov, D_IN), (n_ov,)
    x, scores, W_V, b_V = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    patterns = scores.masked_fill(torch.ones(POSITIONS, POSITIONS).triu(1).bool(), -torch.inf).softmax(-1)
    return [part.requires_grad_() for part in (x, patterns, W_V, b_V)]


def dense(x: Tensor, patterns: Tensor, W_V: Tensor, b_V: Tensor, k: int, rectify: bool) -> Tensor:
    """Return z [batch position unit], from arrays of all units at all positions."""
    read = (x @ W_V.T + b_V).unflatten(-1, (HEADS, -1))
    z = torch.einsum("bhps,bshu->bphu", patterns, read).flatten(2)
    z = z.relu() if rectify else z
    return z * torch.zeros_like(z).scatter(-1, z.abs().topk(k).indices, 1.0)


@pytest.mark.parametrize("rectify", [True, False])
@pytest.mark.parametrize(("n_ov", "k"), [(12, 1), (12, 3), (8, 8), (256, 5), (4, 2)])
def test_values_and_gradients_are_those_of_dense_arrays(n_ov: int, k: int, rectify: bool) -> None:
    given = inputs(n_ov)
    code = largest_values(*given, k, rectify)
    expected = dense(*given, k, rectify)
    found = torch.zeros_like(expected).scatter_add(-1, code.indices, code.values)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[:, 0] = 0  # The first position is not in a Lorsa's loss.
    ours = torch.autograd.grad((found * weight).sum(), given)
    theirs = torch.autograd.grad((expected * weight).sum(), given)
    for name, one, other in zip(("x", "patterns", "W_V", "b_V"), ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")


def test_no_gradient_where_nothing_wrote() -> None:
    x, patterns, W_V, b_V = inputs(12)
    low = (b_V.detach() - 100).requires_grad_()
    code = largest_values(x, patterns, W_V, low, 3, rectify=True)
    assert not code.values.any()
    for grad in torch.autograd.grad(code.values.sum(), (x, patterns, W_V, low)):
        assert not grad.any()


def test_the_same_numbers_each_time_and_no_gradient_for_inputs_without_need() -> None:
    def once() -> list[Tensor]:
        x, *others = inputs(64, seed=3)
        code = largest_values(x.detach(), *others, 4, rectify=True)
        return [code.values, *torch.autograd.grad(code.values.square().sum(), others)]

    assert all(map(torch.equal, once(), once()))
