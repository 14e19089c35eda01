"""Activations of one text in two parts: one to train dictionaries on, one to evaluate them on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.harvest_store import ActivationStore, harvest_stores
from asi_lens.base.doors import checked
from asi_lens.base.errors import require
from asi_lens.inputs.corpora import Tokens, load_tokens


class Split(NamedTuple):
    """Training and held-out activations of one text; the two parts share no position."""

    train: dict[SiteLayer, ActivationStore]
    held_out: dict[SiteLayer, ActivationStore]
    train_tokens: Tokens
    held_out_tokens: Tokens
    """The tokens that `held_out` was harvested from."""
    loss_tokens: Tokens
    """The first of the held-out tokens, for losses of the language model."""


@checked
def harvest_split(
    model: nn.Module,
    corpus: Any,
    wheres: Sequence[SiteLayer],
    *,
    n_tokens: int,
    n_tokens_held_out: int,
    n_tokens_loss: int,
    context: int = 256,
    budget_gb: int | float = 20,
) -> Split:
    """Return stores of every (site, layer): the corpus' first `n_tokens` to train on, the next held out.

    `budget_gb` limits the bytes that each part may write (see `harvest_stores`).

    Raises OptionError for `n_tokens_loss` above `n_tokens_held_out` or below one sequence, DataError for
    a corpus that is too short, and the errors of `harvest_stores`.
    """
    require(
        context <= n_tokens_loss <= n_tokens_held_out,
        "n_tokens_loss",
        n_tokens_loss,
        f"from one sequence ({context}) to n_tokens_held_out={n_tokens_held_out}",
    )
    train = load_tokens(corpus, model, n_tokens, context=context)
    held_out = load_tokens(corpus, model, n_tokens_held_out, context=context, offset=len(train))
    loss = held_out[: n_tokens_loss // context]
    return Split(
        harvest_stores(model, train, wheres, budget_gb=budget_gb),
        harvest_stores(model, held_out, wheres, budget_gb=budget_gb),
        train,
        held_out,
        loss,
    )
