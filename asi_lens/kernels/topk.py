"""The k largest pre-activations of a row, exactly, without sorting it and without a batch x d_sae array.

The encoder is gone through in tiles of rows and features with a running top-k; nothing assumes that one
process owns every feature, and codes of several chunks (or ranks) are joined by `merge_topk`. Weights come
as rows, one feature per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from asi_lens.kernels.codes import SparseCode, side_by_side

# Bytes of pre-activations held at a time where all of a batch's are not needed at once.
CHUNK_BYTES = 160 * 2**20
# A top-k looks at tiles of so many bytes and rows: on a CPU what was just computed is still in its cache.
_TILE_BYTES, _TILE_ROWS = 16 * 2**20, 512
# Columns that a bias among the weights takes: 16 bytes in bfloat16, as tensor cores want rows to be aligned.
BIAS_COLUMNS = 8
# Floats are compared as the integers of the same bits: with bfloat16 seven times as fast on a CPU.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements whose maxima a stage of the top-k compares, such that there are several groups for each pick.
_LARGEST_GROUP, _SMALLEST_GROUP, _GROUPS_PER_PICK = 32, 4, 4


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
    """The k largest of each row, in no particular order, of scores that ReLU follows.

    As `torch.topk` for rows with at least k scores above zero. Where there are fewer, any of the others, of
    which ReLU makes zeros, may come with them; among equal values the choice is arbitrary, too. The bits of
    positive floats, read as integers, are in the order of the floats, and those of a NaN above all, unless
    its sign is set as that of infinity minus infinity is: weights have to be finite (`Trainer` sees to it).
    """
    indices = _largest(_as_integers(scores), k)
    return SparseCode(indices, scores.gather(1, indices))


def _largest(scores: Int[Tensor, "batch n"], k: int) -> Int[Tensor, "batch k"]:
    """Places of the k largest.

    In stages: the k largest maxima of groups, then the same among what is in those groups. It is exact: were
    one of the k largest in another group, k groups would each hold a larger element. The elements of a group
    lie a stride apart, so that maxima run over whole vectors.
    """
    size = min(_LARGEST_GROUP, scores.shape[1] // (_GROUPS_PER_PICK * max(k, 1)))
    if size < _SMALLEST_GROUP:
        return scores.topk(k, dim=1, sorted=False).indices
    size = 1 << size.bit_length() - 1
    grouped, left_over = _grouped(scores, size)
    groups = grouped.shape[2]
    chosen = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, chosen.unsqueeze(1).expand(-1, size, -1)).flatten(1)
    if left_over.shape[1]:
        candidates = torch.cat([candidates, left_over], 1)
    places = _largest(candidates, k)
    member = places.div(k, rounding_mode="floor")
    indices = member * groups + chosen.gather(1, places % k)
    if left_over.shape[1]:
        indices = torch.where(member < size, indices, places - size * k + size * groups)
    return indices


def topk_above(scores: Float[Tensor, "batch n"], k: int, least: Float[Tensor, " batch"]) -> SparseCode:
    """What exceeds both `least` and zero in each row, its k largest where it is more: for who knows k others.

    As wide as the row with most of it. Rows with less are filled up with feature 0 and minus infinity.
    """
    grouped, left_over = _grouped(_as_integers(scores), _LARGEST_GROUP)
    size, groups = grouped.shape[1:]
    bound = _as_integers(least.relu()).unsqueeze(1)
    row, group = (grouped.amax(1) > bound).nonzero(as_tuple=True)
    place, member = (grouped[row, :, group] > bound[row]).nonzero(as_tuple=True)
    row, index = row[place], member * groups + group[place]
    if left_over.shape[1]:
        there = (left_over > bound).nonzero(as_tuple=True)
        row, order = torch.cat([row, there[0]]).sort(stable=True)
        index = torch.cat([index, there[1] + size * groups])[order]
    return merge_topk([side_by_side(row, index, scores[row, index], len(scores), fill=-torch.inf)], k)


def _as_integers(scores: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    return scores.detach().view(_INTEGERS[scores.element_size()])


def _grouped(
    scores: Int[Tensor, "batch n"], size: int
) -> tuple[Int[Tensor, "batch size groups"], Int[Tensor, "batch rest"]]:
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
