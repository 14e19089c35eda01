"""One threshold for all features."""

from __future__ import annotations

import pytest
import torch
from small_kinds import make
from small_trainings import rows

from asi_lens.base.errors import OptionError
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.threshold import set_threshold


def test_a_threshold_for_an_l0() -> None:
    x = rows()
    for kind in [kind for kind in KINDS if KINDS[kind].has_threshold]:
        for l0 in (2, 12.5):
            sae = make(kind, torch.float32)
            if kind == "gated":
                # So large that every open gate fires.
                sae.activation.b_mag.data.fill_(100)
            set_threshold(sae, x, l0)
            assert sae.encode_dense(x).gt(0).sum(1).double().mean().item() == pytest.approx(l0, abs=0.01)
    with pytest.raises(OptionError, match=r"'gated'.* to have a threshold"):
        set_threshold(make("topk", torch.float32), x, 3)
    with pytest.raises(OptionError, match="l0=0"):
        set_threshold(make("jumprelu", torch.float32), x, 0)
    too_few = 0.4 / len(x)
    with pytest.raises(OptionError, match=rf"l0={too_few} .* one firing in the sample's {len(x)} rows"):
        set_threshold(make("jumprelu", torch.float32), x, too_few)
