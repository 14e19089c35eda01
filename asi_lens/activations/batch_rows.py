"""Which rows a pass takes of a batch: of packed tokens, and of inputs that state their own positions.

Of tokens, every position counts but (by default) position 0. Of `Inputs`, the positions that they keep count:
`drop_first` concerns tokens only.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from asi_lens.activations.massive import massive_rows
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.media_inputs import Inputs

Given = Tokens | Inputs
"""What a model runs over."""


def batch_of(given: Given, begin: int, size: int) -> Any:
    """Return the model's input for `size` items from `begin` on: token ids, or arguments by name."""
    items = slice(begin, begin + size)
    return given.batch(items) if isinstance(given, Inputs) else given.ids[items]


def rows_before(given: Given, drop_first: bool) -> list[int]:
    """Return the number of rows before each item, and of all items as the last entry."""
    if isinstance(given, Inputs):
        return [0, *given.kept.sum(1).cumsum(0).tolist()]
    each = given.context - drop_first
    return [each * i for i in range(len(given) + 1)]


def rows_of(
    given: Given, begin: int, activation: Float[Tensor, "batch position d"], drop_first: bool
) -> tuple[Float[Tensor, "n d"], Bool[Tensor, " n"], Float[Tensor, " n"]]:
    """Return a batch's rows in order, which of them are massive, and their largest magnitudes (`massive`)."""
    if isinstance(given, Inputs):
        kept = given.kept[begin : begin + len(activation)].to(activation.device)
        each = [item[mask] for item, mask in zip(activation, kept, strict=True)]
        found = [massive_rows(rows[None]) for rows in each]
        massive, peak = (torch.cat([part[i][0] for part in found]) for i in (0, 1))
        return torch.cat(each), massive, peak
    first = 1 if drop_first else 0
    massive, peak = massive_rows(activation)
    rows = rearrange(activation[:, first:], "batch position d -> (batch position) d")
    return rows, massive[:, first:].flatten(), peak[:, first:].flatten()


def shard_rows(given: Given, before: Sequence[int], per_batch: int, rows: int) -> int | list[int]:
    """Return the rows of a shard, about `rows` and of whole forward batches; of each shard for `Inputs`,
    whose items have different numbers of rows. `before`: rows before each item of this process."""
    batches = [before[k] for k in range(0, len(before) - 1, per_batch)]
    if isinstance(given, Tokens):
        batch_rows = per_batch * (before[1] - before[0])
        return max(1, rows // batch_rows) * batch_rows
    at_once = max(1, rows * len(batches) // (before[-1] - before[0]))
    return [b - a for a, b in itertools.pairwise([*batches[::at_once], before[-1]])]


def positions_of(given: Given) -> dict[str, Any]:
    """Return the positions of a sequence. Those of `Inputs` are not all rows, so they are no `context`."""
    if isinstance(given, Tokens):
        return {"context": given.context, "bos": given.bos}
    return {"kind": given.kind, "positions": given.context}
