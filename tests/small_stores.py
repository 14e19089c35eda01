"""What the tests of stores share: small harvests of the tiny models, and their rows read another way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny_models
import torch

from asi_lens.activations.split import Split, harvest_split
from asi_lens.activations.store import ActivationStore
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens

BATCH = 64  # tokens of a forward: two of the tiny sequences
PER_SEQUENCE = 31  # positions of a tiny sequence without the first
OPTIONS: dict[str, Any] = {"batch_tokens": BATCH, "shard_tokens": 4 * PER_SEQUENCE, "progress": False}


def hooked(
    model: Any, tokens: Tokens, site: str, layer: int, *, first: int = 1, batch: int = 2
) -> torch.Tensor:
    """Rows as the hook itself gives them, in the forward batches of the harvest."""
    found: list[torch.Tensor] = []
    hook = models.hook_name(model, site, layer)
    for ids in tokens.batches(batch):
        models.forward(
            model,
            ids,
            {hook: lambda x: found.append(x[:, first:].flatten(0, 1).clone())},
            stop_after_layer=layer,
        )
    return torch.cat(found)


@contextmanager
def sinking(model: Any, tokens: Tokens) -> Iterator[tuple[Tokens, torch.Tensor]]:
    """Tokens with a massive activation in the residual stream at three places, while the context lasts.

    Yields the tokens and the numbers of the three, counted without first positions.
    """
    embedding, sink = model.original_model.get_input_embeddings().weight, tiny_models.D_VOCAB - 1
    ids = tokens.ids.clone()
    ids[ids == sink] = sink - 1
    places = torch.tensor([[3, 5], [7, 1], [7, 30]])
    ids[places[:, 0], places[:, 1]] = sink
    before = embedding.detach()[sink].clone()
    with torch.no_grad():
        embedding[sink, 0] = 1e4
    try:
        yield (
            Tokens(ids, "sinks", tokens.tokenizer, tokens.context),
            places[:, 0] * (tokens.context - 1) + places[:, 1] - 1,
        )
    finally:
        with torch.no_grad():
            embedding[sink] = before


def everything(of: ActivationStore) -> torch.Tensor:
    return torch.cat(list(of.in_order(7)))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def split_of(model: Any, folder: Path, wheres: Any = (("attn_out", 1),), **changes: Any) -> Split:
    """A split of sites of a tiny model, by default of one, on plain text."""
    path = folder / "plain.txt"
    characters = tiny_models.CHARACTERS
    path.write_text(
        "".join(characters[(i * i * 7 + i) % len(characters)] for i in range(2_000)), encoding="utf-8"
    )
    counts = {"n_tokens": 384, "n_tokens_held_out": 128, "n_tokens_loss": 32, "context": 32}
    return harvest_split(model, str(path), list(wheres), **{**counts, **changes})
