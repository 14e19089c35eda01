"""Isotropic directions: parts of the rows are those of the whole."""

from __future__ import annotations

import pytest
import torch

from asi_lens.sae.starts import STARTS, Draw

ACTIVE = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(7)).double()).Q


@pytest.mark.parametrize("name", [name for name, start in STARTS.items() if start.sharded])
def test_parts_are_rows_of_the_whole(name: str) -> None:
    active = ACTIVE if STARTS[name].subspace else None
    whole, part = torch.empty(40, 6), torch.empty(10, 6)
    norms = STARTS[name].fill(whole, Draw(3, active))
    found = STARTS[name].fill(part, Draw(3, active, first=20, total=40))
    assert torch.equal(part, whole[20:30])
    assert torch.equal(found, norms[20:30])


def test_directions_are_isotropic() -> None:
    out = torch.empty(20_000, 6)
    STARTS["random"].fill(out, Draw(0))
    torch.testing.assert_close(out.T @ out / len(out), torch.eye(6) / 6, rtol=0, atol=0.01)
