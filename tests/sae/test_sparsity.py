"""Options of sparsity: bad ones are named."""

from __future__ import annotations

from typing import Any

import pytest
from small_kinds import D_SAE, make
from small_trainings import quick

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.train import Trainer


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"coefficient": 0.0}, "coefficient=0.0"),
        ({"bandwidth": -1.0}, "bandwidth=-1.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"penalty": "l1"}, "l1"),
        ({"anneal_fraction": 1.5}, "anneal_fraction=1.5"),
        ({"prefixes": (8, 4)}, "prefixes"),
        ({"prefixes": (8, D_SAE)}, f"below d_sae={D_SAE}"),
        ({"initial_l0": 2.0}, "must be from k=4"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises((OptionError, UnknownNameError), match=named):
        Trainer(make("jumprelu"), quick(), SparsityConfig(**options))
