"""The kinds of dictionary: one file for each, with all that is special about it.

A new kind is a file with a subclass of `kind.Kind`, and one line in `KINDS`.
"""

from __future__ import annotations

from asi_lens.sae.kinds.batchtopk import BatchTopK
from asi_lens.sae.kinds.gated import Gated
from asi_lens.sae.kinds.jumprelu import JumpReLU
from asi_lens.sae.kinds.kind import Kind
from asi_lens.sae.kinds.relu import ReLU
from asi_lens.sae.kinds.topk import TopK

KINDS: dict[str, type[Kind]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "gated": Gated,
    "relu": ReLU,
}
"""Kinds by the name that `SAEConfig.activation` has for them."""


def kinds_with(fact: str) -> str:
    """Names of the kinds of which `fact` (an attribute of `Kind`) is true, as errors list them."""
    *most, last = [repr(name) for name, kind in KINDS.items() if getattr(kind, fact)]
    return f"{', '.join(most)} or {last}" if most else last
