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

# Bytes of pre-activations held at a time where all of a batch's are not needed at once.
CHUNK_BYTES = 160 * 2**20
# A top-k looks at tiles of so many bytes and rows: on a CPU what was just computed is still in its cache.
_TILE_BYTES, _TILE_ROWS = 16 * 2**20, 512
# Columns that a bias among the weights takes: 16 bytes in bfloat16, as tensor cores want rows to be aligned.
BIAS_COLUMNS = 8
# Elements whose maxima a stage of the top-k compares, such that there are several groups for each pick.
_LARGEST_GROUP, _SMALLEST_GROUP, _GROUPS_PER_PICK = 32, 4, 4


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


def topk_exact(scores: Float[Tensor, "batch n"], k: int) -> SparseCode:
    """The k largest of each row, as `torch.topk` but in no particular order.

    In stages: the k largest maxima of groups, then the same among what is in those groups. It is exact: were
    one of the k largest in another group, k groups would each hold a larger element. Among equal values the
    choice is arbitrary, as it is in `torch.topk`. The elements of a group lie a stride apart, so that maxima
    run over whole vectors: several times as fast on a CPU as over neighbors.
    """
    size = min(_LARGEST_GROUP, scores.shape[1] // (_GROUPS_PER_PICK * max(k, 1)))
    if size < _SMALLEST_GROUP:
        values, indices = scores.topk(k, dim=1, sorted=False)
        return SparseCode(indices, values)
    size = 1 << size.bit_length() - 1
    grouped, left_over = _grouped(scores, size)
    groups = grouped.shape[2]
    chosen = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, chosen.unsqueeze(1).expand(-1, size, -1)).flatten(1)
    if left_over.shape[1]:
        candidates = torch.cat([candidates, left_over], 1)
    places, values = topk_exact(candidates, k)
    member = places.div(k, rounding_mode="floor")
    indices = member * groups + chosen.gather(1, places % k)
    if left_over.shape[1]:
        indices = torch.where(member < size, indices, places - size * k + size * groups)
    return SparseCode(indices, values)


def topk_above(scores: Float[Tensor, "batch n"], k: int, least: Float[Tensor, " batch"]) -> SparseCode:
    """What exceeds `least` in each row, its k largest where it is more: for who knows k others already.

    As wide as the row with most of it. Rows with less are filled up with feature 0 and minus infinity. NaN
    counts as exceeding, so that it is seen.
    """
    grouped, left_over = _grouped(scores, _LARGEST_GROUP)
    size, groups = grouped.shape[1:]
    bound = least.unsqueeze(1)
    row, group = (grouped.amax(1) <= bound).logical_not_().nonzero(as_tuple=True)
    members = grouped[row, :, group]
    place, member = (members <= bound[row]).logical_not_().nonzero(as_tuple=True)
    row, index, value = row[place], member * groups + group[place], members[place, member]
    if left_over.shape[1]:
        there = (left_over <= bound).logical_not_().nonzero(as_tuple=True)
        row, order = torch.cat([row, there[0]]).sort(stable=True)
        index = torch.cat([index, there[1] + size * groups])[order]
        value = torch.cat([value, left_over[there]])[order]
    counts = torch.bincount(row, minlength=len(scores))
    width = int(counts.max())
    column = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    indices = row.new_zeros(len(scores), width)
    values = scores.new_full((len(scores), width), -torch.inf)
    indices[row, column] = index
    values[row, column] = value
    return merge_topk([SparseCode(indices, values)], k)


def _grouped(
    scores: Float[Tensor, "batch n"], size: int
) -> tuple[Float[Tensor, "batch size groups"], Float[Tensor, "batch rest"]]:
    """Groups of elements that lie a stride apart, and what is left over at the end."""
    whole = scores.shape[1] // size * size
    return scores[:, :whole].unflatten(1, (size, whole // size)), scores[:, whole:]


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
    bias: Float[Tensor, " d_sae"] | None,
    k: int,
    *,
    features: Int[Tensor, " n"] | None = None,
    workspace: Workspace | None = None,
    tile_bytes: int | None = None,
) -> SparseCode:
    """TopK(ReLU(x W + b)), tile by tile of rows and features with a running top-k.

    Args:
        x: centered rows; their dtype is the one computed in (weights are cast to it chunk by chunk).
        bias: none where it is a column of the weights (`with_ones`).
        features: only these may be picked (ascending); indices still count from the first of all.
        workspace: where to keep a tile's memory; none where gradients are wanted by autograd.
        tile_bytes: of pre-activations; none for what suits the device.

    Values come back in the dtype of `encoder`. With fewer than k features the code is that narrow.
    """
    n, batch = encoder.shape[0] if features is None else features.shape[0], x.shape[0]
    on_cpu = x.device.type == "cpu"
    height = max(1, min(batch, _TILE_ROWS) if on_cpu else batch)
    tile = tile_bytes or (_TILE_BYTES if on_cpu else CHUNK_BYTES)
    width = max(k, tile // (height * x.element_size()))
    # Chunks of equal size, in whole groups: a narrow last one would waste its product.
    chunks = max(1, -(-n // width))
    width = max(k, -(-n // (chunks * _LARGEST_GROUP)) * _LARGEST_GROUP)
    cast = workspace is not None and encoder.dtype != x.dtype
    blocks = (with_ones(x) if cast and bias is not None else x).split(height)
    best: list[SparseCode | None] = [None] * len(blocks)
    for start in range(0, n, width):
        stop = min(start + width, n)
        chosen = slice(start, stop) if features is None else features[start:stop]
        weight, shift = encoder[chosen], None if bias is None else bias[chosen]
        if workspace is not None and cast:
            rows, d = workspace.get("weights", (stop - start, blocks[0].shape[1]), x), weight.shape[1]
            rows[:, :d] = weight
            if shift is not None:
                rows[:, d], rows[:, d + 1 :] = shift, 0
            weight, shift = rows, None
        weight, shift = weight.to(x.dtype), None if shift is None else shift.to(x.dtype)
        for place, block in enumerate(blocks):
            out = None if workspace is None else workspace.get("scores", (len(block), stop - start), x)
            if shift is None:
                scores = torch.mm(block, weight.T, out=out)
            else:
                scores = torch.addmm(shift, block, weight.T, out=out)
            known = best[place]
            if known is None:
                best[place] = topk_exact(scores, min(k, stop - start))
            else:
                # A later chunk has to hold more than the k that are known: less and less does.
                code = topk_above(scores, k, known.values.detach().amin(1))
                best[place] = merge_topk([known, SparseCode(code.indices + start, code.values)], k)
    codes = [code for code in best if code is not None]
    if not codes:
        empty = x.new_zeros(batch, 0)
        codes = [SparseCode(empty.long(), empty)]
    indices = torch.cat([code.indices for code in codes])
    values = torch.cat([code.values for code in codes])
    indices = indices if features is None else features[indices]
    return SparseCode(indices, values.relu().to(encoder.dtype))


def with_ones(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch wider"]:
    """Rows with a one behind them, to be multiplied by a bias that stands among the weights, and zeros.

    It costs less than a product that adds a bias, which first fills its output with that.
    """
    wider = pad(x, (0, BIAS_COLUMNS))
    wider[:, x.shape[1]] = 1
    return wider


def decode_sum(code: SparseCode, decoder: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch d_out"]:
    """sum_j values[b, j] decoder[indices[b, j]], without a batch x d_sae array."""
    return embedding_bag(code.indices, decoder, per_sample_weights=code.values, mode="sum")


def picked_dots(
    grad: Float[Tensor, "batch d_out"], decoder: Float[Tensor, "d_sae d_out"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """grad[b] . decoder[indices[b, j]]: the derivative of a loss in the values of a code."""
    features, order = indices.flatten().sort()
    dots = torch.empty_like(order, dtype=grad.dtype)
    dots[order] = _sorted_dots(grad, decoder, order.div(indices.shape[1], rounding_mode="floor"), features)
    return dots.view(indices.shape)


def _sorted_dots(
    table: Float[Tensor, "rows d_out"],
    decoder: Float[Tensor, "d_sae d_out"],
    rows: Int[Tensor, " picks"],
    features: Int[Tensor, " picks"],
) -> Float[Tensor, " picks"]:
    """table[rows[i]] . decoder[features[i]], features ascending: the decoder, which no cache holds, is then
    read from its start to its end, less than half the time of reading it here and there."""
    # What embedding_bag itself uses for the derivative in its sample weights, on CPU and CUDA; the fourth
    # argument would say where bags begin, if the fifth did not say the bag of each sample.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        decoder, table, rows, features[:1], features, 0
    )


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
    widths = [term.code.indices.shape[1] for term in terms]
    rows = torch.arange(len(terms) * batch, device=x.device).view(len(terms), batch)
    table_rows = [own.repeat_interleave(width) for own, width in zip(rows, widths, strict=True)]
    fired = torch.cat([term.code.values.flatten() for term in terms]) > 0
    features, order = torch.cat([term.code.indices.flatten() for term in terms]), None
    if not bool(fired.all()):
        order = fired.nonzero().flatten()
        features = features[order]
    # Stable, so that sums run in the same order every time.
    features, place = features.sort(stable=True)
    order = place if order is None else order[place]

    def column(parts: Sequence[Tensor | None], rest: float = 0.0) -> Tensor:
        """Of the picks that fired, sorted by feature; terms without a part of it have `rest`."""
        whole = [
            torch.full_like(term.code.values, rest) if part is None else part
            for part, term in zip(parts, terms, strict=True)
        ]
        return torch.cat([part.flatten() for part in whole])[order]

    table = terms[0].grad if len(terms) == 1 else torch.cat([term.grad for term in terms])
    rows_of_table = column(table_rows)
    values = column([term.code.values if term.moves_decoder else None for term in terms])
    dots = _sorted_dots(table, decoder, rows_of_table, features)
    into = dots
    if any(term.pull is not None for term in terms):
        into = into + column([term.pull for term in terms])
    if any(term.gain is not None for term in terms):
        into = into * column([term.gain for term in terms], rest=1.0)
    summed = [into, values * dots]
    if not all(term.to_b_enc for term in terms):
        ones = [torch.ones_like(term.code.values) if term.to_b_enc else None for term in terms]
        summed.append(into * column(ones))
    counts = torch.bincount(features, minlength=d_sae)
    offsets = pad(counts.cumsum(0), (1, 0))
    sums = embedding_bag(
        torch.arange(len(features), device=x.device),
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
        encoder_rows=rows_of_table if len(terms) == 1 else rows_of_table % batch,
        encoder_weights=into,
        decoder_table=table,
        decoder_rows=rows_of_table,
        decoder_weights=values,
        b_enc=b_enc.contiguous(),
        b_dec=b_dec,
        parallel=parallel.contiguous(),
    )
