"""Coders in a forward pass of the language model: their hooks, and the losses with a reconstruction in place.

Sums over all predicted tokens run in float64. The clean and the ablated model run once for all coders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.massive import massive_rows
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, require
from asi_lens.collapse.interventions import (
    loss_recovered,
    mean_ablate,
    require_next_tokens,
    skip_outliers,
)
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.float32 import in_float32
from asi_lens.kernels.codes import SparseCode

Hooks = Mapping[str, models.Hook]
"""Hooks of a forward pass, by name."""


@dataclass(frozen=True)
class Place:
    """The hooks of a language model that a coder reads and writes.

    Attributes:
        read, write: names of the hooks; an autoencoder writes the hook that it reads.
        d_in, d_out: widths of the activations there.
        layer: first block with one of the hooks.
        site: the written site, for the progress bar and errors.
    """

    read: str
    write: str
    d_in: int
    d_out: int
    layer: int
    site: str = field(compare=False)

    @classmethod
    def of(cls, model: nn.Module, writes: SiteLayer, reads: SiteLayer | None = None) -> Place:
        """Return the place of the (site, layer) that a coder writes and reads; by default they are the same.

        Raises OptionError if `reads` is the written hook or belongs to a later layer, and the errors of
        `models.hook_name`.
        """
        (site, layer), write = writes, models.hook_name(model, *writes)
        d_out = models.site_width(model, site, layer)
        if reads is None:
            return cls(write, write, d_out, d_out, layer, site)
        read = models.hook_name(model, *reads)
        require(read != write, "reads", reads, f"another site than the written {write}")
        require(
            reads[1] <= layer, "reads", reads, f"of layer {layer} at most, the layer of the written {write}"
        )
        return cls(read, write, models.site_width(model, *reads), d_out, reads[1], site)

    def put(self, output: Callable[[Tensor], Tensor]) -> Hooks:
        """Return hooks that put `output` of what is read in the place of what is written.

        Position 0 and rows that are massive on either side stay as they are: data leave both out.
        """
        if self.read == self.write:
            return {self.write: skip_outliers(output)}
        seen: list[Tensor] = []

        def look(x: Tensor) -> None:
            seen[:] = [x]

        def write(y: Tensor) -> Tensor:
            x = seen.pop()
            return skip_outliers(lambda _: output(x)[:, 1:], massive_rows(x)[0])(y)

        return {self.read: look, self.write: write}


@checked
class Spliced(nn.Module):
    """Base of coders: a module whose output can take the place of an activation of the language model."""

    config: Any
    place_is_given_by: ClassVar[str] = "where=(site, layer)"
    """How a user names the place to an evaluation, for errors."""

    @property
    def d_in(self) -> int:
        """Width of the activations that the coder reads."""
        raise NotImplementedError

    @property
    def d_out(self) -> int:
        """Width of the activations that the coder writes."""
        raise NotImplementedError

    @property
    def d_sae(self) -> int:
        """Number of features (units)."""
        raise NotImplementedError

    @property
    def target_scale(self) -> float:
        """Factor on raw targets in `scan`; 1 where they stay raw."""
        return 1.0

    def scan(self, data: Any) -> Iterator[tuple[Tensor, Tensor, SparseCode]]:
        """Yield targets, reconstructions and codes [n k] of all `data`; values above zero fired."""
        raise NotImplementedError

    def place_in(self, model: nn.Module, metadata: Mapping[str, Any]) -> Place | None:
        """Return the place that `metadata` names, None if they do not name any."""
        raise NotImplementedError

    def place(self, model: nn.Module, *known: Mapping[str, Any]) -> Place:
        """Return the place that the coder's own metadata and `known` (metadata of its data) name.

        Raises OptionError if they name no place, or different places.
        """
        given = (self.place_in(model, about) for about in (self.config.metadata, *known))
        places = dict.fromkeys(place for place in given if place is not None)
        if len(places) != 1:
            what = f"differ ({', '.join(each.write for each in places)})" if places else "are not known"
            raise OptionError(
                f"site and layer of the {type(self).__name__} {what}; give {self.place_is_given_by} to an "
                "evaluation, place=Place.of(model, ...) to hooks"
            )
        return next(iter(places))

    def hooks(self, model: nn.Module, place: Place | None = None) -> Hooks:
        """Return hooks for `models.forward` that put the coder's output in the place of the activation.

        Position 0 and rows that are massive in what is read or written (`massive`) stay unchanged. An
        autoencoder does not receive position 0; coders with two sites do, because a Lorsa attends to it.
        `place` is that of the metadata by default.

        Raises OptionError for a place of other widths, and as `place` does.
        """
        place = self.place(model) if place is None else place
        for side, mine, theirs in (("in", self.d_in, place.d_in), ("out", self.d_out, place.d_out)):
            hook = place.read if side == "in" else place.write
            require(mine == theirs, f"d_{side}", mine, f"{theirs}, the width of {hook}")
        return place.put(self)


@dataclass(frozen=True)
class SpliceLosses:
    """Losses of the language model with the reconstruction in place of the activation.

    Losses are means over all predicted tokens, in nats; the model computes in float32 (`in_float32`).
    Position 0 of a sequence and rows that are massive in what is read or written are never edited, here or
    for the mean: data of dictionaries and transcoders exclude them (data of Lorsas only position 0).
    """

    cross_entropy: float
    """With the reconstruction spliced in."""
    cross_entropy_clean: float
    cross_entropy_mean_ablated: float
    """With the site at its mean."""
    cross_entropy_delta: float
    """Spliced minus clean; 0 for a perfect reconstruction."""
    cross_entropy_delta_error: float | None
    """Standard error of `cross_entropy_delta` over sequences, taken as independent; None for one sequence."""
    loss_recovered: float | None
    """(ablated - spliced) / (ablated - clean); None if ablation changes nothing."""
    kl: float
    """KL(clean || spliced) of the next-token distributions, per token."""
    n_predictions: int
    """Predicted tokens: sequences times (context - 1)."""


class SequenceLosses(NamedTuple):
    """Losses of the language model on each sequence: means over its predicted tokens, in nats, float64, CPU.

    Attributes:
        clean: cross-entropy of the unchanged model [n]. cross_entropy: under each edit [edits n].
        kl: KL(clean || edited) of the next-token distributions [edits n]; NaN where it was not computed.
    """

    clean: Float[Tensor, " n"]
    cross_entropy: Float[Tensor, "edits n"]
    kl: Float[Tensor, "edits n"]


@torch.inference_mode()
def sequence_losses(
    model: nn.Module,
    tokens: Tokens,
    edits: Sequence[Hooks],
    layer: int,
    *,
    without_kl: int = 0,
    batch_tokens: int = 1024,
    progress: bool = True,
    what: str = "",
) -> SequenceLosses:
    """Return losses of the language model on each sequence, clean and under each of `edits`.

    All hooks belong to blocks from `layer` on, so the blocks below run once per batch. The first `without_kl`
    edits get no KL. The model computes in float32 (`in_float32`).

    Raises UnsupportedModelError for a model that does not predict next tokens, OptionError if there is no
    token to predict, and the errors of `in_float32`.
    """
    require_next_tokens(model, tokens)
    require(tokens.context >= 2, "context", tokens.context, "at least 2 (a first token predicts the next)")
    require(len(tokens) >= 1, "tokens", f"{len(tokens)} sequences", "at least one sequence")
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "at least 1")
    each = tokens.context - 1
    # A list of sums for each sequence; the first is of the clean model.
    sums: list[list[Tensor]] = [[] for _ in range(1 + len(edits))]
    divergences: list[list[Tensor]] = [[] for _ in edits]
    told = {"unit": "tok", "unit_scale": True, "desc": f"losses {what}", "disable": not progress}
    with in_float32(model), models.held(model), tqdm(total=len(tokens) * each, **told) as bar:
        for ids in tokens.batches(max(1, batch_tokens // tokens.context)):
            start = models.capture_resume(model, ids, layer)

            def run(hooks: Mapping[str, Any], ids: Tensor = ids, start: Any = start) -> Tensor:
                logits = models.forward(model, ids, hooks, logits=True, start=start)
                assert logits is not None  # asked for
                return logits

            clean = _log_probabilities(run({}))
            targets = ids[:, 1:].to(clean.device).long()
            sums[0].append(_loss(clean, targets))
            p = clean.exp()
            for k, edit in enumerate(edits):
                edited = _log_probabilities(run(edit))
                sums[1 + k].append(_loss(edited, targets))
                known = k >= without_kl
                kl = _divergence(p, clean, edited) if known else torch.full_like(sums[0][-1], math.nan)
                divergences[k].append(kl)
            bar.update(ids.shape[0] * each)
    means, kls = ([torch.cat(parts).cpu() / each for parts in found] for found in (sums, divergences))
    empty = means[0].new_empty(0, len(tokens))
    return SequenceLosses(
        means[0], torch.stack(means[1:]) if edits else empty, torch.stack(kls) if edits else empty
    )


def hooked_losses(
    model: nn.Module,
    tokens: Tokens,
    place: Place,
    mean: Float[Tensor, " d_out"],
    spliced: Sequence[Hooks],
    *,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> list[SpliceLosses]:
    """Return losses of the language model under each of `spliced`, compared with clean and ablated losses.

    All hooks of `spliced` belong to `place`. `mean` is put in the place of the written activation for the
    ablated losses. Raises DataError for a loss or KL that is not finite, and as `sequence_losses`.
    """
    site, layer = place.site, place.layer
    edits: list[Hooks] = [place.put(mean_ablate(mean)), *spliced]
    options: dict[str, Any] = {"batch_tokens": batch_tokens, "progress": progress}
    found = sequence_losses(model, tokens, edits, layer, without_kl=1, what=f"{site} {layer}", **options)
    n = len(tokens) * (tokens.context - 1)
    clean_loss, ablated_loss = found.clean.mean().item(), found.cross_entropy[0].mean().item()
    out = []
    for own, kl in zip(found.cross_entropy[1:], found.kl[1:], strict=True):
        loss = own.mean().item()
        divergence = kl.mean().item()
        if not all(map(math.isfinite, (loss, clean_loss, ablated_loss, divergence))):
            raise DataError(f"the cross-entropy or KL with {site} of layer {layer} edited is not finite")
        recovered = loss_recovered(loss, clean_loss, ablated_loss)
        many = len(own) > 1
        error = (own - found.clean).std().item() / math.sqrt(len(own)) if many else None
        delta = loss - clean_loss
        out.append(SpliceLosses(loss, clean_loss, ablated_loss, delta, error, recovered, divergence, n))
    return out


def _log_probabilities(logits: Float[Tensor, "batch position d"]) -> Float[Tensor, "batch predicted d"]:
    """Return log-probabilities of the next token after every position but the last, float32."""
    return logits[:, :-1].float().log_softmax(-1)


def _loss(
    log_p: Float[Tensor, "batch predicted d"], targets: Int[Tensor, "batch predicted"]
) -> Float[Tensor, " batch"]:
    """Return the sum of the cross-entropies of each sequence, in nats."""
    return -log_p.gather(-1, targets[..., None]).sum((1, 2), dtype=torch.float64)


def _divergence(
    p: Float[Tensor, "batch predicted d"],
    log_p: Float[Tensor, "batch predicted d"],
    log_q: Float[Tensor, "batch predicted d"],
) -> Float[Tensor, " batch"]:
    """Return the sum of KL(p || q) of each sequence, one sequence at a time to save memory.

    Tokens that p gives no chance (masked by -infinity, for example) add nothing.
    """
    sums = []
    for one, log_one, log_other in zip(p, log_p, log_q, strict=True):
        each = (one * (log_one - log_other)).where(one > 0, 0)
        sums.append(each.sum(dtype=torch.float64))
    return torch.stack(sums)
