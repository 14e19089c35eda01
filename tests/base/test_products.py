"""Products without short cuts: what the user has switched on is off inside, and as before afterwards."""

from __future__ import annotations

import torch

from asi_lens.base.products import exact_products, without_autocast


def test_autocast_is_off_inside() -> None:
    x = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        for context in (without_autocast, exact_products):
            with context():
                assert (x @ x).dtype == torch.float32
                assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    with without_autocast():
        assert (x @ x).dtype == torch.float32
