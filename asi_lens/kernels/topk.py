"""The k largest pre-activations of each row, exactly, without a sort and without a batch x d_sae array.

The encoder is applied in tiles of rows and features. On a CPU the top-k is a running one: later tiles need
only entries above the k known ones. The number of these depends on the data, and an accelerator would wait
for it at every tile. So there each tile gives its k largest entries, and one top-k at the end joins them. A
process may own a part of the features: `merge_topk` joins the codes of several chunks (or ranks). Weights
come as rows, one feature per row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from asi_lens.kernels import devices
from asi_lens.kernels.codes import FlatCode, SparseCode

# Bytes of a tile on a CPU (the top-k reads a tile while it is still in the cache), and its rows for each byte
# of a number: products in float32 gain a tenth from 1,024 rows, those in bfloat16 lose as much.
_TILE_BYTES, _ROWS_PER_BYTE = 16 * 2**20, 256
# Columns of a bias among the weights: 16 bytes in bfloat16, since tensor cores need aligned rows.
BIAS_COLUMNS = 8
# Floats are compared as integers of the same bits: seven times as fast with bfloat16 on a CPU.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# A stage of the top-k compares maxima of groups: largest and smallest group, least number of groups a pick.
_LARGEST_GROUP, _SMALLEST_GROUP, _GROUPS_PER_PICK = 32, 4, 4


class Workspace:
    """Scratch memory reused between steps: new pages for large arrays take as long as filling the arrays."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialized tensor of `shape` with dtype and device of `like`.

        The tensor is valid until the next call with the same name.
        """
        size = 1
        for length in shape:
            size *= length
        found = self._buffers.get(name)
        if found is None or found.numel() < size or found.dtype != like.dtype or found.device != like.device:
            found = torch.empty(size, dtype=like.dtype, device=like.device)
            self._buffers[name] = found
        return found[:size].view(shape)


def topk_exact(scores: Float[Tensor, "batch n"], k: int) -> SparseCode:
    """Return the k largest scores of each row, in any order, for scores that are passed to ReLU.

    The result is that of `torch.topk` for rows with at least k scores above zero. Rows with fewer are
    completed by arbitrary other scores, which ReLU sets to zero. Among equal values the choice is arbitrary
    too. The bits of positive floats, read as integers, have the order of the floats. The bits of a NaN are
    above all others, unless its sign bit is set, as for infinity minus infinity: weights must be finite
    (`Trainer` checks this).
    """
    indices = _largest(_as_integers(scores), k)
    return SparseCode(indices, scores.gather(1, indices))


def _largest(scores: Int[Tensor, "batch n"], k: int) -> Int[Tensor, "batch k"]:
    """Return the places of the k largest scores of each row.

    The search has stages: find the k groups with the largest maxima, then search the elements of these
    groups in the same way. The result is exact: if one of the k largest elements were in another group, k
    groups would each hold a larger element. The elements of a group lie a stride apart, so that maxima run
    over whole vectors.
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
    """Return each row's entries above `least` and above zero, at most k of them (the largest).

    Used for later tiles, when k candidates are already known. The width of the code is the largest number of
    entries in a row, at most k. Shorter rows are padded by feature 0 with minus infinity.
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
    return merge_topk([FlatCode(row, index, scores[row, index]).code(len(scores), fill=-torch.inf)], k)


def _as_integers(scores: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    return scores.detach().view(_INTEGERS[scores.element_size()])


def _grouped(
    scores: Int[Tensor, "batch n"], size: int
) -> tuple[Int[Tensor, "batch size groups"], Int[Tensor, "batch rest"]]:
    """Return groups of elements that lie a stride apart, and the elements left over at the end."""
    whole = scores.shape[1] // size * size
    return scores[:, :whole].unflatten(1, (size, whole // size)), scores[:, whole:]


def merge_topk(codes: Sequence[SparseCode], k: int) -> SparseCode:
    """Return the k largest picks of each row from several codes of the same rows with distinct features.

    The codes belong to chunks of one dictionary, or to its shards on several ranks.
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
    """Return the code TopK(ReLU(x W + b)), computed in tiles of rows and features with a running top-k.

    Args:
        x: centered rows. The product is computed in their dtype (weights are cast to it chunk by chunk).
        bias: None if it is a column of the weights (`with_ones`).
        features: the only features that may be picked (ascending); indices still count all features.
        workspace: memory of the tiles; None if autograd computes gradients.
        tile_bytes: bytes of pre-activations of a tile; None for the device's default.

    Values have the dtype of `encoder`. The code has min(k, number of features) columns.
    """
    n, batch = encoder.shape[0] if features is None else features.shape[0], x.shape[0]
    on_cpu = devices.is_host(x.device)
    height = max(1, min(batch, _ROWS_PER_BYTE * x.element_size()) if on_cpu else batch)
    tile = tile_bytes or (_TILE_BYTES if on_cpu else devices.scratch_bytes(x.device))
    # On a GPU a tile may be as large as the dictionary; the copy of its weights is then limited, too.
    width = max(k, tile // ((height if on_cpu else max(height, x.shape[1])) * x.element_size()))
    # Chunks of equal size, in whole groups: the product of a narrow last chunk would be inefficient.
    chunks = max(1, -(-n // width))
    width = max(k, -(-n // (chunks * _LARGEST_GROUP)) * _LARGEST_GROUP)
    cast = workspace is not None and encoder.dtype != x.dtype
    blocks = (with_ones(x) if cast and bias is not None else x).split(height)
    # Codes of each block of rows: one of the chunks so far, or one of each chunk.
    found: list[list[SparseCode]] = [[] for _ in blocks]
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
            known = found[place]
            if on_cpu and known:
                # Entries of a later chunk count only above the k known ones: fewer and fewer do.
                code = topk_above(scores, k, known[0].values.detach().amin(1))
                known[:] = [merge_topk([known[0], SparseCode(code.indices + start, code.values)], k)]
            else:
                code = topk_exact(scores, min(k, stop - start))
                known.append(SparseCode(code.indices + start, code.values) if start else code)
    codes = [merge_topk(every, k) for every in found if every]
    if not codes:
        empty = x.new_zeros(batch, 0)
        codes = [SparseCode(empty.long(), empty)]
    indices = torch.cat([code.indices for code in codes])
    values = torch.cat([code.values for code in codes])
    indices = indices if features is None else features[indices]
    return SparseCode(indices, values.relu().to(encoder.dtype))


def with_ones(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch wider"]:
    """Return the rows with a one appended, which multiplies a bias column of the weights, and zeros.

    This is faster than a product that adds a bias, which first fills its output with the bias.
    """
    wider = pad(x, (0, BIAS_COLUMNS))
    wider[:, x.shape[1]] = 1
    return wider
