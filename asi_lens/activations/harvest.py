"""One pass of the model, many consumers.

The model runs once over the tokens, only as deep as the deepest layer that a consumer wants. Consumers
receive every activation as rows `[n d]` as soon as the model computes it. Nothing is kept, so memory does
not grow with the number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from asi_lens.activations.batch_rows import Given, batch_of, rows_before, rows_of
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, require
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.own_tokens import require_own_tokens

# A site at a layer, as in ("attn_out", 15).
SiteLayer = tuple[str, int]
# Receives the rows of a place that a pass leaves out of a batch, before the consumers receive the other rows.
LeftOut = Callable[[SiteLayer, Int[Tensor, " m"], Float[Tensor, "m d"]], None]

# Tokens of a forward pass: enough for efficient products, small enough for any cache. A GPU takes more, since
# each launch of a kernel costs the same, as long as they fit into a part of its memory.
_BATCH_TOKENS, _MOST_BATCH_TOKENS = 2048, 65_536
_MEMORY_SHARE = 1 / 16
# Numbers of d_model width that a token takes in a forward pass.
_NUMBERS_PER_TOKEN = 64
_LAYER = re.compile(r"blocks\.(\d+)\.")


@runtime_checkable
class Consumer(Protocol):
    """A receiver of activations: names the (site, layer) places it wants and receives their rows in order."""

    @property
    def wants(self) -> Collection[SiteLayer]:
        """The (site, layer) places whose rows this consumer receives."""
        ...

    def consume(self, where: SiteLayer, rows: Float[Tensor, "n d"]) -> None:
        """Receive one batch of rows. A consumer that keeps rows must copy them."""
        ...


@checked
def places(model: nn.Module, sites: str | Iterable[str], layers: Sequence[int] | None) -> list[SiteLayer]:
    """Return every (site, layer) asked for, checked against the model; `layers=None` means all layers.

    Negative layers count from the end, as in Python. A full hook name (`blocks.3.attn.hook_out`) names its
    layer and is returned once; in `blocks.{}.attn.hook_out` the layer is filled in.

    Raises UnknownNameError for an unknown site, OptionError for a layer out of range, UnsupportedModelError
    for a site that the model lacks.
    """
    sites = [sites] if isinstance(sites, str) else list(sites)
    n_layers = models.model_info(model, fingerprint=False).n_layers
    chosen = range(n_layers) if layers is None else layers
    out: list[SiteLayer] = []
    for layer in chosen:
        require(-n_layers <= layer < n_layers, "layer", layer, f"from 0 to {n_layers - 1}")
        out += [(site, layer % n_layers) for site in sites if not _LAYER.match(site)]
    out += [(site, int(found[1])) for site in sites if (found := _LAYER.match(site))]
    with models.held(model):
        for site, layer in out:
            models.hook_name(model, site, layer)
    if not out:
        raise OptionError(
            f"sites={sites} with layers={layers} name no place; name at least one site and one layer"
        )
    return list(dict.fromkeys(out))


def batch_tokens_for(model: nn.Module, batch_tokens: int | None = None) -> int:
    """Return the tokens of a forward pass: the given number, or for None the one that suits the device."""
    if batch_tokens is not None:
        return batch_tokens
    device = next(model.parameters()).device
    if device.type != "cuda":
        return _BATCH_TOKENS
    memory = torch.cuda.get_device_properties(device).total_memory * _MEMORY_SHARE
    fits = int(memory / (4 * _NUMBERS_PER_TOKEN * models.model_info(model, fingerprint=False).d_model))
    return max(_BATCH_TOKENS, min(_MOST_BATCH_TOKENS, 1 << fits.bit_length() - 1))


@checked
def layer_at(model: nn.Module, fraction: float) -> int:
    """Return the layer at a fraction of the depth: floor(fraction * n_layers), the last layer for 1.

    All notebooks use this rule: 0.5 of 30 layers is layer 15. Raises OptionError outside 0 to 1.
    """
    require(0 <= fraction <= 1, "fraction", fraction, "from 0 to 1")
    n_layers = models.model_info(model, fingerprint=False).n_layers
    return min(n_layers - 1, int(fraction * n_layers))


@checked
def layers_at(model: nn.Module, fractions: Iterable[float]) -> list[int]:
    """Return the layers at several fractions of the depth (see `layer_at`), ascending, each once."""
    return sorted({layer_at(model, fraction) for fraction in fractions})


def _ignore(where: SiteLayer, tokens: Tensor, rows: Tensor) -> None:
    """Do nothing about rows that are left out."""


def harvest(
    model: nn.Module,
    tokens: Given,
    consumers: Sequence[Consumer],
    *,
    batch_tokens: int | None = None,
    drop_first: bool = True,
    drop_massive: bool = True,
    left_out: LeftOut = _ignore,
    start: int = 0,
    after_batch: Callable[[int], None] | None = None,
    progress: bool = True,
) -> None:
    """Run the model over `tokens` (or `Inputs`) and feed the consumers.

    Args:
        batch_tokens: tokens of a forward pass; None for a number that suits the device (`batch_tokens_for`).
        drop_first: leave out position 0 of every sequence of tokens (BOS, the attention sink, an outlier).
            `Inputs` state their own rows.
        drop_massive: leave out rows with massive activations, at each place where they occur (`massive`).
        left_out: called for every batch and place with massive rows: place, numbers of the tokens (counted
            over all rows of all sequences, without position 0 if it is dropped), and the rows.
        start: sequence to start from, for a pass that resumes.
        after_batch: called after each batch with the number of sequences done.
        progress: show a bar with tokens/s and the time left.

    Raises DataError naming site, layer and batch where an activation is NaN or infinite, OptionError for
    tokens of another model's tokenizer. Hooks are always removed, also on Ctrl-C.
    """
    require_own_tokens(model, tokens)
    batch_tokens = batch_tokens_for(model, batch_tokens)
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "at least 1")
    require(0 <= start <= len(tokens), "start", start, f"from 0 to {len(tokens)}")
    if isinstance(tokens, Tokens) and drop_first and tokens.context < 2:
        raise OptionError("a context of 1 holds only the first position; use drop_first=False")
    takers: dict[SiteLayer, list[Consumer]] = {}
    for consumer in consumers:
        for where in consumer.wants:
            takers.setdefault(where, []).append(consumer)
    if not takers:
        raise OptionError("the consumers ask for no site; pass at least one that does")
    deepest = max(layer for _, layer in takers)
    per_batch = max(1, batch_tokens // tokens.context)
    before = rows_before(tokens, drop_first)
    # Two names may mean the same hook ("z" and "blocks.3.attn.hook_z"): that hook is added once.
    by_hook: dict[str, list[SiteLayer]] = {}
    with models.held(model):
        for where in takers:
            by_hook.setdefault(models.hook_name(model, *where), []).append(where)

    def feed(places: list[SiteLayer], begin: int) -> Callable[[Tensor], None]:
        def hook(activation: Tensor) -> None:
            rows, hit, peak = rows_of(tokens, begin, activation, drop_first)
            if not torch.isfinite(peak.sum()):
                where, batch = places[0], begin // per_batch
                raise DataError(f"{where[0]} of layer {where[1]}, batch {batch}: NaN or infinity")
            if drop_massive and len(out := hit.nonzero().flatten()):
                for where in places:
                    left_out(where, out + before[begin], rows[out])
                rows = rows[~hit]
            for where in places:
                for consumer in takers[where]:
                    consumer.consume(where, rows)

        return hook

    shown = {"desc": f"harvest {tokens.corpus}", "unit": "tok", "unit_scale": True, "disable": not progress}
    with (
        models.held(model),
        tqdm(total=len(tokens) * tokens.context, initial=start * tokens.context, **shown) as bar,
    ):
        for begin in range(start, len(tokens), per_batch):
            hooks = {name: feed(places, begin) for name, places in by_hook.items()}
            models.forward(model, batch_of(tokens, begin, per_batch), hooks, stop_after_layer=deepest)
            done = min(begin + per_batch, len(tokens))
            bar.update((done - begin) * tokens.context)
            if after_batch is not None:
                after_batch(done)
