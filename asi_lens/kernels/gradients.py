"""Decoding of sparse codes, and the gradients of a step as sums over picks.

Nothing here builds a batch x d_sae array and nothing uses autograd. Weights come as rows, one feature per
row: `encoder [d_sae d_in]`, `decoder [d_sae d_in]`.

The loss is L = mean over the batch of sum over d_in of (reconstruction - x_n)^2, on normalized inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from asi_lens.kernels import devices
from asi_lens.kernels.codes import SparseCode, marked

# Elements of a weight that are summed and updated at a time on a CPU, so that reading, summing, updating and
# normalizing stay in the cache. An accelerator takes as many as fit into its scratch memory.
_CHUNK_ELEMENTS = 512 * 1024
# Picks of one call of PyTorch's kernel for products of rows: it counts 32 threads a pick in 32 bits.
_MOST_PICKS = 2**25


def rows_per_chunk(d: int, device: torch.device) -> int:
    """Return the number of rows of width `d` whose gradients are summed and used at a time."""
    elements = _CHUNK_ELEMENTS if devices.is_host(device) else devices.scratch_bytes(device) // 4
    return max(1, elements // d)


def decode_sum(code: SparseCode, decoder: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch d_out"]:
    """Return sum_j values[b, j] decoder[indices[b, j]], without a batch x d_sae array."""
    indices, values = code
    if devices.is_host(values.device) and 2 * int(values.count_nonzero()) < values.numel():
        # Where few rows are far longer than the others, most of a code is padding.
        fired = values != 0
        places, bounds = fired.flatten().nonzero().flatten(), pad(fired.sum(1).cumsum(0), (1, 0))
        return sum_bags(decoder, indices.flatten()[places], values.flatten()[places], bounds)
    return embedding_bag(indices, decoder, per_sample_weights=values, mode="sum")


def picked_dots(
    grad: Float[Tensor, "batch d_out"], decoder: Float[Tensor, "d_sae d_out"], indices: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k"]:
    """Return grad[b] . decoder[indices[b, j]], the derivative of a loss in the values of a code."""
    rows = torch.arange(len(indices), device=indices.device).repeat_interleave(indices.shape[1])
    return dots_at(grad, decoder, rows, indices.flatten()).view(indices.shape)


def dots_at(
    grad: Float[Tensor, "batch d_out"],
    decoder: Float[Tensor, "d_sae d_out"],
    rows: Int[Tensor, " picks"],
    features: Int[Tensor, " picks"],
) -> Float[Tensor, " picks"]:
    """Return grad[rows[i]] . decoder[features[i]], for picks in any order."""
    features, order = features.sort()
    dots = torch.empty_like(order, dtype=grad.dtype)
    dots[order] = _sorted_dots(grad, decoder, rows[order], features)
    return dots


def add_at(
    out: Float[Tensor, " n"], indices: Int[Tensor, " picks"], values: Float[Tensor, " picks"]
) -> Float[Tensor, " n"]:
    """Add values at indices that may repeat, in place and in an order that is always the same."""
    if devices.is_host(out.device):
        return out.index_add_(0, indices, values)
    return out.index_put_((indices,), values, accumulate=True)  # sorts; index_add_ is atomic on a GPU


def _sorted_dots(
    table: Float[Tensor, "rows d_out"],
    decoder: Float[Tensor, "d_sae d_out"],
    rows: Int[Tensor, " picks"],
    features: Int[Tensor, " picks"],
) -> Float[Tensor, " picks"]:
    """Return table[rows[i]] . decoder[features[i]] for ascending features.

    The decoder does not fit into a cache. In this order it is read from its start to its end, in less than
    half the time of reading its rows in random order.
    """
    # embedding_bag itself uses this operator for the derivative in its sample weights, on CPU and CUDA. The
    # fourth argument (where bags begin) is not used, since the fifth names the bag of each sample.
    parts = [
        torch.ops.aten._embedding_bag_per_sample_weights_backward(decoder, table, own, some[:1], some, 0)
        for own, some in zip(rows.split(_MOST_PICKS), features.split(_MOST_PICKS), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Edge(NamedTuple):
    """A bound between chunks of rows: the row, and how many features that fired and picks are before it."""

    row: int
    features: int
    picks: int


@dataclass(frozen=True)
class Gradients:
    """Gradients of one step, stored as picks sorted by feature. Rows are summed when they are asked for.

    `offsets [d_sae + 1]`: bounds of each feature's picks. `features`: features with at least one pick (the
    only rows whose gradient is not zero). `b_enc [d_sae]` and `b_dec [d_out]`: summed gradients of the
    biases. `parallel [d_sae]`: decoder gradient . decoder row, a by-product of the sums over picks.
    `edges`: bounds of `rows_per_chunk` rows, with their places among picks.
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
    edges: tuple[Edge, ...]

    def rows(
        self, before: Edge, after: Edge, decoder: Float[Tensor, "d_sae d_out"], *, few: bool = False
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Return dL / d encoder and dL / d decoder for the rows between two edges; zero for silent features.

        If `few`, the result is for those of the rows that fired: `features[before.features:after.features]`.
        The decoder's gradient lacks the part along each row. That part would only change the row's norm,
        which is set back to one after the update.
        """
        which: Any = slice(before.row, after.row)
        bounds = self.offsets[before.row : after.row + 1]
        if few:
            # Features that did not fire have no picks, so the picks of features that fired are contiguous.
            which = self.features[before.features : after.features]
            bounds = torch.cat([self.offsets[which], self.offsets[which[-1:] + 1]])
        own, bounds = slice(before.picks, after.picks), bounds - before.picks
        encoder = sum_bags(self.encoder_table, self.encoder_rows[own], self.encoder_weights[own], bounds)
        grad = sum_bags(self.decoder_table, self.decoder_rows[own], self.decoder_weights[own], bounds)
        return encoder, grad.addcmul_(self.parallel[which, None], decoder[which], value=-1)

    def __len__(self) -> int:
        return self.b_enc.shape[0]


def sum_bags(table: Tensor, rows: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
    """Return the sum of weight times row of the table for each bag, the picks between two bounds."""
    return embedding_bag(
        rows, table, bounds, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


class Term(NamedTuple):
    """One loss term: `grad [batch d_in]` is dL / d(sum of picked decoder rows), for the picks of `code`."""

    code: SparseCode
    grad: Float[Tensor, "batch d_out"]
    pull: Float[Tensor, "batch k"] | None = None
    """Derivative of a penalty on the values, added to dL / d values; used only for picks that fired."""
    holds_b_dec: bool = True
    """Whether b_dec is part of this term's reconstruction."""
    gain: Float[Tensor, "batch k"] | None = None
    """d value / d (x . encoder row); None if it is 1."""
    to_b_enc: bool = True
    """Whether the values depend on b_enc."""
    moves_decoder: bool = True
    """Whether this term has a gradient in the decoder; else the decoder is a constant."""


def _column(
    terms: Sequence[Term], order: Tensor, parts: Sequence[Tensor | None], rest: float = 0.0
) -> Tensor:
    """Join the terms' parts, for picks that fired, sorted by feature; `rest` replaces a part of None."""
    whole = [
        torch.full_like(term.code.values, rest) if part is None else part
        for part, term in zip(parts, terms, strict=True)
    ]
    return torch.cat([part.flatten() for part in whole])[order]


def sum_gradients(
    terms: Sequence[Term],
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    decoder: Float[Tensor, "d_sae d_out"],
    *,
    b_dec_is_read: bool = True,
    over_features: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """Return the gradients of all terms in encoder, decoder and biases.

    `x` are the centered rows x_n - b_dec that were encoded. b_dec reaches every pick through the encoder's
    input (if `b_dec_is_read`), and is added by the reconstructions that hold it. If `encoder` holds a part
    of the features, `over_features` sums the parts' gradients of b_dec through the encoder.
    """
    d_sae, batch = encoder.shape[0], x.shape[0]
    widths = [term.code.indices.shape[1] for term in terms]
    rows = torch.arange(len(terms) * batch, device=x.device).view(len(terms), batch)
    table_rows = [own.repeat_interleave(width) for own, width in zip(rows, widths, strict=True)]
    features, order, offsets, active, edges = _sorted_picks(terms, d_sae, decoder.shape[1])
    column = partial(_column, terms, order)
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
    sums = embedding_bag(
        torch.arange(len(features), device=x.device),
        torch.stack(summed, 1),
        offsets,
        mode="sum",
        include_last_offset=True,
    )
    pre, parallel, *other = sums.unbind(1)
    b_enc = other[0] if other else pre
    b_dec = torch.stack([term.grad.sum(0) for term in terms if term.holds_b_dec]).sum(0)
    if b_dec_is_read:
        # b_dec is subtracted before the encoder and added after the decoder.
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
        edges=edges,
    )


def _sorted_picks(
    terms: Sequence[Term], d_sae: int, d_out: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Edge, ...]]:
    """Return the picks that fired, in the order of their features.

    That is features and places of the picks [n] (places among the picks of all terms side by side), the
    bounds of each feature's picks [d_sae + 1], the features with a pick, ascending, and the bounds of chunks.
    """
    fired = torch.cat([term.code.values.flatten() for term in terms]) > 0
    features, order = torch.cat([term.code.indices.flatten() for term in terms]), None
    on_host = devices.is_host(features.device)
    if not on_host:
        # The number of picks that fired is read below. Until then the others stay, behind the last feature.
        features = features.masked_fill(~fired, d_sae)
    elif not bool(fired.all()):
        order = fired.nonzero().flatten()
        features = features[order]
    # A stable sort, so that sums run in the same order every time.
    features, place = features.sort(stable=True)
    order = place if order is None else order[place]
    if on_host:
        offsets = pad(torch.bincount(features, minlength=d_sae).cumsum(0), (1, 0))
    else:
        offsets = torch.searchsorted(features, torch.arange(d_sae + 1, device=features.device))
    has_picks = offsets.diff() > 0
    rows = [*range(0, d_sae, rows_per_chunk(d_out, features.device)), d_sae]
    bounds = torch.arange(len(rows), device=features.device).mul_(rows[1]).clamp_(max=d_sae)
    before = torch.cat([pad(has_picks.cumsum(0), (1, 0))[bounds], offsets[bounds]])
    known = [int(number) for number in devices.read(before)]
    edges = tuple(map(Edge, rows, known[: len(rows)], known[len(rows) :]))
    n = edges[-1].picks
    return features[:n], order[:n], offsets, marked(has_picks, edges[-1].features), edges
