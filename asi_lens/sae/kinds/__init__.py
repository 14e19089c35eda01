"""The kinds of dictionary. Each kind has a file with all code that is specific to it.

To add a kind, write a file with a subclass of `kind.Kind` and add a line to `KINDS`.
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
"""Kinds by their name in `SAEConfig.activation`."""


def kinds_with(fact: str) -> str:
    """Return, for error messages, the names of the kinds whose attribute `fact` is true."""
    *most, last = [repr(name) for name, kind in KINDS.items() if getattr(kind, fact)]
    return f"{', '.join(most)} or {last}" if most else last
