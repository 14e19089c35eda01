"""Contexts of a Lorsa's units: the positions where each unit wrote most, and the positions it read from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import require
from asi_lens.inputs.corpora import Tokens
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.lorsa import Lorsa

# Sequences encoded at a time.
_BLOCK = 4


@torch.no_grad()
def unit_firings(lorsa: Lorsa, pairs: SequencePairs) -> pd.DataFrame:
    """Return how often and how strongly each unit wrote, over the positions that count.

    Columns: `unit`, `head`, `frequency` (share of positions), `mean` (of the unit's values where it wrote).
    """
    counts = torch.zeros(lorsa.n_ov, dtype=torch.float64, device="cpu")
    sums = torch.zeros(lorsa.n_ov, dtype=torch.float64, device="cpu")
    for block in pairs.blocks(_BLOCK):
        units, values = (part[:, 1:].flatten().cpu() for part in lorsa.encode(block.x))
        counts.index_add_(0, units, (values != 0).double())
        sums.index_add_(0, units, values.double())
    return pd.DataFrame(
        {
            "unit": range(lorsa.n_ov),
            "head": lorsa.head_of_unit,
            "frequency": (counts / pairs.n).tolist(),
            "mean": (sums / counts.clamp_min(1)).tolist(),
        }
    )


@torch.no_grad()
def top_contexts(
    lorsa: Lorsa,
    pairs: SequencePairs,
    tokens: Tokens,
    units: Sequence[int],
    decode: Callable[[list[int]], str],
    *,
    n: int = 3,
    before: int = 12,
    spaces: str = " ",
) -> pd.DataFrame:
    """Return the `n` positions where each unit wrote most, at most one position of a sequence.

    Args:
        pairs, tokens: the layer's data, and the text that the data were harvested from.
        decode: turns ids into text, as a tokenizer's `decode` does.
        before: tokens of text shown before the position.
        spaces: replacement for line breaks.

    Columns: `unit`, `head`, `value` (its size, normalized units), `reads_from` (the token that contributed
    most), `share` (that token's part of the value before the choice of k; other parts may be negative, so the
    share may exceed 1), `distance` (positions back to that token), `text` (up to the position, with that
    token in «»). Raises OptionError for a unit that does not exist, or for text of another shape than
    `pairs`.
    """
    shape = (len(pairs), pairs.context)
    require(tuple(tokens.ids.shape) == shape, "tokens", tuple(tokens.ids.shape), f"of shape {shape}")
    for unit in units:
        require(0 <= unit < lorsa.n_ov, "units", unit, f"from 0 to {lorsa.n_ov - 1}")
    best = _strongest(lorsa, pairs, units)
    rows = []
    for place, unit in enumerate(units):
        for sequence in best[place].amax(1).argsort(descending=True)[:n].tolist():
            position = int(best[place, sequence].argmax())
            value = best[place, sequence, position].item()
            if value <= 0:
                continue
            _, parts = read_from(lorsa, pairs[sequence : sequence + 1].inputs, unit, position)
            shares = parts / parts.sum()  # of a negative value, the most negative part is the largest
            source = int(shares.argmax())
            ids = tokens.ids[sequence].tolist()
            start = max(0, min(position - before, source - 2))
            words = [decode([token]) for token in ids[start : position + 1]]
            words[source - start] = f"«{words[source - start]}»"
            rows.append(
                {
                    "unit": unit,
                    "head": lorsa.head_of_unit[unit],
                    "value": value,
                    "reads_from": decode([ids[source]]),
                    "share": shares[source].item(),
                    "distance": position - source,
                    "text": spaces.join("".join(words).split()),
                }
            )
    names = ["unit", "head", "value", "reads_from", "share", "distance", "text"]
    return pd.DataFrame(rows, columns=names)


def _strongest(lorsa: Lorsa, pairs: SequencePairs, units: Sequence[int]) -> Tensor:
    """Return the size of each unit's value at every position, [unit sequence position]; 0 at position 0."""
    wanted = torch.tensor(list(units), device="cpu")
    found = []
    for block in pairs.blocks(_BLOCK):
        indices, values = (part.cpu() for part in lorsa.encode(block.x))
        hit = indices[None] == wanted[:, None, None, None]
        found.append((hit * values.abs()[None]).sum(-1))
    out = torch.cat(found, 1)
    out[:, :, 0] = 0
    return out


@torch.no_grad()
def read_from(
    lorsa: Lorsa, x: Float[Tensor, "1 position d_in"], unit: int, position: int
) -> tuple[Float[Tensor, " sources"], Float[Tensor, " sources"]]:
    """Return what a unit read from each position up to its own, in one sequence x (raw units).

    The first is the pattern of the unit's head, A[position, source]; the second each source's contribution to
    the unit's value, A[position, source] (x_n . w_v + b_v). Contributions add up to z~ of the unit.
    """
    x_n = lorsa.normalize(x)
    pattern = lorsa.heads(x_n)[0, lorsa.head_of_unit[unit], position, : position + 1]
    values = x_n[0, : position + 1] @ lorsa.W_V[unit] + lorsa.b_V[unit]
    return pattern, pattern * values
