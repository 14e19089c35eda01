"""The sparse step of a TopK autoencoder: picks, their decoding, and gradients as sums over picks.

Nothing here builds a batch x d_sae array beyond one chunk of features, nothing uses autograd, and no
function assumes that one process owns every feature: codes of several chunks (or ranks) are joined by
`merge_topk`. Weights come as rows, one feature per row: `encoder [d_sae d_in]`, `decoder [d_sae d_in]`.

The loss is L = mean over the batch of sum over d_in of (reconstruction - x_n)^2, on normalized inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

# Bytes of pre-activations held at a time (one chunk of features).
CHUNK_BYTES = 160 * 2**20
# Elements whose maxima the first stage of the top-k compares.
_GROUP = 32


class SparseCode(NamedTuple):
    """The k features of each row that may have fired: a value of zero means that it did not."""

    indices: Int[Tensor, "batch k"]
    values: Float[Tensor, "batch k"]


class Workspace:
    """Scratch memory kept between steps: fresh pages for large arrays cost as much as filling them."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialized tensor of `shape` with the dtype and device of `like`, valid until asked again."""
        size = 1
        for length in shape:
            size *= length
        found = self._buffers.get(name)
        if found is None or found.numel() < size or found.dtype != like.dtype or found.device != like.device:
            found = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[name] = found
        return found[:size].view(shape)


def topk_exact(
    scores: Float[Tensor, "batch n"], k: int, least: Float[Tensor, " batch"] | None = None
) -> SparseCode:
    """The k largest of each row, as `torch.topk` but in no particular order.

    Two stages: the k largest maxima of groups of neighbors, then the k largest inside those groups. It is
    exact: were one of the k largest in another group, k groups would each hold a larger element. Among
    equal values the choice is arbitrary, as it is in `torch.topk`.

    `least`: only what exceeds it matters, as k elements that do not are known. The code has no more columns
    than the row with most of those needs.
    """
    batch, n = scores.shape
    groups = n // _GROUP
    whole = groups * _GROUP
    grouped = scores[:, :whole].unflatten(1, (groups, _GROUP))
    kept, maxima = k, None
    if least is not None and groups:
        maxima = grouped.amax(2)
        kept = min(k, max(1, _most_above(maxima, least)))
    if groups < 4 * kept:
        values, indices = scores.topk(k, dim=1, sorted=False)
        return SparseCode(indices, values)
    chosen = (grouped.amax(2) if maxima is None else maxima).topk(kept, dim=1, sorted=False).indices
    row = torch.arange(batch, device=scores.device).unsqueeze(1)
    if whole == n:
        # Whole groups copied one after the other: several times faster than any other way to gather them.
        blocks = grouped.reshape(-1, _GROUP).index_select(0, (chosen + row * groups).flatten())
        candidates = blocks.view(batch, kept * _GROUP)
    else:
        candidates = torch.cat([grouped[row, chosen].flatten(1), scores[:, whole:]], 1)
    width = k if least is None else min(k, _most_above(candidates, least))
    values, places = candidates.topk(width, dim=1, sorted=False)
    group = places.div(_GROUP, rounding_mode="floor").clamp_(max=kept - 1)
    indices = chosen.gather(1, group) * _GROUP + places % _GROUP
    if whole < n:
        indices = torch.where(places < _GROUP * kept, indices, places - _GROUP * kept + whole)
    return SparseCode(indices, values)


def _most_above(values: Float[Tensor, "batch n"], least: Float[Tensor, " batch"]) -> int:
    """Of all rows, the most elements that exceed `least`; NaN is counted, so that it is seen."""
    return int((values <= least.unsqueeze(1)).logical_not().sum(1).max())


def merge_topk(codes: Sequence[SparseCode], k: int) -> SparseCode:
    """The k largest of several codes of the same rows, whose features are distinct.

    Codes of chunks of one dictionary, or of its shards on several ranks.
    """
    if len(codes) == 1 and codes[0].values.shape[1] <= k:
        return codes[0]
    indices = torch.cat([code.indices for code in codes], 1)
    values = torch.cat([code.values for code in codes], 1)
    if values.shape[1] <= k:
        return SparseCode(indices, values)
    values, places = values.topk(k, dim=1, sorted=False)
    return SparseCode(indices.gather(1, places), values)


def encode_topk(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    k: int,
    *,
    features: Int[Tensor, " n"] | None = None,
    workspace: Workspace | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> SparseCode:
    """TopK(ReLU(x W + b)) in chunks of features with a running top-k.

    Args:
        x: centered rows; their dtype is the one computed in (weights are cast to it chunk by chunk).
        features: only these may be picked (ascending); indices still count from the first of all.
        workspace: where to keep the chunk's memory; none where gradients are wanted by autograd.

    Values come back in the dtype of `bias`. With fewer than k features the code is that narrow.
    """
    n = encoder.shape[0] if features is None else features.shape[0]
    width = max(k, chunk_bytes // (max(1, x.shape[0]) * x.element_size()))
    # Chunks of equal size, in whole groups: a narrow last one would waste its product.
    chunks = max(1, -(-n // width))
    width = -(-n // (chunks * _GROUP)) * _GROUP
    best: SparseCode | None = None
    for start in range(0, n, width):
        stop = min(start + width, n)
        if features is None:
            weight, shift = encoder[start:stop], bias[start:stop]
        else:
            weight, shift = encoder[features[start:stop]], bias[features[start:stop]]
        weight, shift = weight.to(x.dtype), shift.to(x.dtype)
        if workspace is None:
            scores = torch.addmm(shift, x, weight.T)
        else:
            scores = workspace.get("scores", (x.shape[0], stop - start), x)
            torch.addmm(shift, x, weight.T, out=scores)
        # A chunk has to hold more than the k that are known: less and less does.
        full = best is not None and best.values.shape[1] == k
        least = best.values.detach().amin(1) if best is not None and full else None
        code = topk_exact(scores, min(k, stop - start), least)
        code = SparseCode(code.indices + start if start else code.indices, code.values)
        best = code if best is None else merge_topk([best, code], k)
    if best is None:
        empty = x.new_zeros(x.shape[0], 0)
        best = SparseCode(empty.long(), empty)
    indices = best.indices if features is None else features[best.indices]
    return SparseCode(indices, best.values.relu().to(bias.dtype))


def decode_sum(code: SparseCode, decoder: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch d_out"]:
    """sum_j values[b, j] decoder[indices[b, j]], without a batch x d_sae array."""
    return embedding_bag(code.indices, decoder, per_sample_weights=code.values, mode="sum")


def picked_dots(
    grad: Float[Tensor, "batch d_out"], decoder: Float[Tensor, "d_sae d_out"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """grad[b] . decoder[indices[b, j]]: the derivative of a loss in the values of a code."""
    batch, k = indices.shape
    bags = torch.arange(batch, device=indices.device)
    # What embedding_bag itself uses for the derivative in its sample weights, on CPU and CUDA.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, decoder, indices.flatten(), bags * k, bags.repeat_interleave(k), 0
    )
    return dots.view(batch, k)


@dataclass(frozen=True)
class Gradients:
    """Gradients of one step, kept as picks sorted by feature: rows are summed when asked for.

    `offsets [d_sae + 1]` bounds each feature's picks; `features` those with at least one (the only
    rows whose gradient is not zero). `b_enc [d_sae]` and `b_dec [d_out]` are summed already.
    `parallel [d_sae]` is decoder gradient . decoder row, which falls out of the picks for nothing.
    """

    features: Int[Tensor, " n"]
    offsets: Int[Tensor, " bounds"]
    encoder_table: Float[Tensor, "batch d_in"]
    encoder_rows: Int[Tensor, " picks"]
    encoder_weights: Float[Tensor, " picks"]
    decoder_table: Float[Tensor, "rows d_out"]
    decoder_rows: Int[Tensor, " picks"]
    decoder_weights: Float[Tensor, " picks"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    parallel: Float[Tensor, " d_sae"]

    def encoder(self, start: int, stop: int) -> Float[Tensor, "n d_in"]:
        """dL / d encoder rows `start` to `stop`, zero where nothing fired."""
        return self._encoder(self.offsets[start : stop + 1])

    def encoder_of(self, first: int, last: int) -> Float[Tensor, "n d_in"]:
        """dL / d encoder rows of `features[first:last]` alone."""
        return self._encoder(self._bounds(first, last))

    def decoder(
        self, start: int, stop: int, unit_rows: Float[Tensor, "d_sae d_out"] | None
    ) -> Float[Tensor, "n d_out"]:
        """dL / d decoder rows; given the decoder, whose rows must be unit, without the part along them.

        That part would only change a row's norm, which is then put back to one.
        """
        grad = self._decoder(self.offsets[start : stop + 1])
        if unit_rows is None:
            return grad
        return grad.addcmul_(self.parallel[start:stop, None], unit_rows[start:stop], value=-1)

    def decoder_of(
        self, first: int, last: int, unit_rows: Float[Tensor, "d_sae d_out"]
    ) -> Float[Tensor, "n d_out"]:
        """The same of `features[first:last]` alone, without the part along the rows."""
        fired = self.features[first:last]
        grad = self._decoder(self._bounds(first, last))
        return grad.addcmul_(self.parallel[fired, None], unit_rows[fired], value=-1)

    def _bounds(self, first: int, last: int) -> Int[Tensor, " bounds"]:
        # Rows between those that fired have no picks, so the picks of these follow each other.
        fired = self.features[first:last]
        return torch.cat([self.offsets[fired], self.offsets[fired[-1:] + 1]])

    def _encoder(self, bounds: Tensor) -> Tensor:
        return _sum_bags(self.encoder_table, self.encoder_rows, self.encoder_weights, bounds)

    def _decoder(self, bounds: Tensor) -> Tensor:
        return _sum_bags(self.decoder_table, self.decoder_rows, self.decoder_weights, bounds)

    def __len__(self) -> int:
        return self.b_enc.shape[0]


def _sum_bags(table: Tensor, rows: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
    first, last = bounds[[0, -1]].tolist()
    return embedding_bag(
        rows[first:last],
        table,
        bounds - first,
        mode="sum",
        per_sample_weights=weights[first:last],
        include_last_offset=True,
    )


class Term(NamedTuple):
    """One loss term: `grad [batch d_in]` is dL / d(sum of picked decoder rows), for the picks of `code`."""

    code: SparseCode
    grad: Float[Tensor, "batch d_out"]
    pull: Float[Tensor, "batch k"] | None = None
    """What a penalty on the values adds to dL / d values; only that of picks that fired counts."""
    holds_b_dec: bool = True
    """Whether b_dec is part of this term's reconstruction."""
    gain: Float[Tensor, "batch k"] | None = None
    """d value / d (x . encoder row), where it is not 1."""
    to_b_enc: bool = True
    """Whether b_enc is part of what the values come from."""
    moves_decoder: bool = True
    """Whether the decoder learns from this term; else it is taken as a constant."""


def sum_gradients(
    terms: Sequence[Term],
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    decoder: Float[Tensor, "d_sae d_out"],
    *,
    b_dec_is_read: bool = True,
    over_features: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """Gradients of all terms in encoder, decoder and biases.

    `x` are the centered rows x_n - b_dec that were encoded: b_dec reaches every pick through the
    encoder's input (unless not `b_dec_is_read`), and is added by the reconstructions that hold it. Where
    `encoder` has a part of the features, `over_features` adds up what the parts say of b_dec.
    """
    d_sae, batch = encoder.shape[0], x.shape[0]
    parts: list[list[Tensor]] = [[] for _ in range(7)]
    for place, term in enumerate(terms):
        code = term.code
        fired = (code.values > 0).flatten()
        dots = picked_dots(term.grad, decoder, code.indices).flatten()
        into = dots if term.pull is None else dots + term.pull.flatten()
        into = into if term.gain is None else into * term.gain.flatten()
        bias = into if term.to_b_enc else torch.zeros_like(into)
        values = code.values.flatten() if term.moves_decoder else torch.zeros_like(into)
        sample = torch.arange(batch, device=x.device).repeat_interleave(code.indices.shape[1])
        picks = (code.indices.flatten(), sample, sample + place * batch, values, into, dots, bias)
        every = bool(fired.all())
        for part, found in zip(parts, picks, strict=True):
            part.append(found if every else found[fired])
    features, rows, table_rows, values, into, dots, bias = (torch.cat(part) for part in parts)
    # Stable, so that sums run in the same order every time.
    features, order = features.sort(stable=True)
    values, into, dots = values[order], into[order], dots[order]
    summed = [into, values * dots]
    if not all(term.to_b_enc for term in terms):
        summed.append(bias[order])
    counts = torch.bincount(features, minlength=d_sae)
    offsets = pad(counts.cumsum(0), (1, 0))
    sums = embedding_bag(
        torch.arange(len(order), device=x.device),
        torch.stack(summed, 1),
        offsets,
        mode="sum",
        include_last_offset=True,
    )
    pre, parallel, *other = sums.unbind(1)
    b_enc = other[0] if other else pre
    active = counts.nonzero().flatten()
    b_dec = torch.stack([term.grad.sum(0) for term in terms if term.holds_b_dec]).sum(0)
    if b_dec_is_read:
        # It is subtracted before the encoder and added after the decoder.
        few = 4 * len(active) < d_sae
        through = pre[active] @ encoder[active] if few else pre @ encoder
        b_dec = b_dec - (through if over_features is None else over_features(through))
    return Gradients(
        features=active,
        offsets=offsets,
        encoder_table=x,
        encoder_rows=rows[order],
        encoder_weights=into,
        decoder_table=terms[0].grad if len(terms) == 1 else torch.cat([term.grad for term in terms]),
        decoder_rows=table_rows[order],
        decoder_weights=values,
        b_enc=b_enc.contiguous(),
        b_dec=b_dec,
        parallel=parallel.contiguous(),
    )
