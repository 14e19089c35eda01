"""Verdicts on claims C1 to C5: the low rank of attention outputs, its effect on the loss, and its cause.

See `verdicts` for rules that all claims' functions share.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from asi_lens.base.errors import require, require_known
from asi_lens.results.judging import (
    Found,
    Holds,
    UntestedError,
    claim,
    counted,
    if_known,
    spread,
    spreads,
    taken,
)
from asi_lens.results.rows import VARIANTS

OTHERS = ["mlp_out", "resid_post"]
SITES = ["attn_out", *OTHERS]
# Differences of ranks (shares of a width) that are rounding: closed forms in float64, tables of nine digits.
_ROUNDING = 1e-6


@claim(
    "C1",
    "Attention outputs use fewer directions than MLP outputs and residual streams",
    "effective rank: attn_out 0.60, others 0.90 (v3); 0.60 hold 99 % of the variance (v1)",
)
def c1(table: pd.DataFrame, model: str, corpus: str) -> Found:
    """C1: attention outputs use fewer directions than MLP outputs and residual streams.

    Takes `RankRow`s. A measure agrees if attention outputs have the lowest mean over layers of the three
    sites, and lie below both other sites in at least three quarters of the layers. Holds if both readings of
    the claim agree: effective rank (the paper's last version) and directions for 99 % of the variance (its
    first two); partly, if one does. The levels in the abstracts are not part of the rule. Raises
    UnknownNameError for a model or text not in the table.
    """
    for key, value in (("model", model), ("corpus", corpus)):
        require_known([value], set(taken(table, [key], [])[key]), key)
    table = table[(table.model == model) & (table.corpus == corpus)]
    shares = taken(table, [], ["intrinsic_dimension_99", "d"])
    ranks = _ranks(table)
    wide = _ranks(table.assign(effective_rank_fraction=shares.intrinsic_dimension_99 / shares.d))
    numbers = spreads({site: ranks[site] for site in SITES})
    numbers += spread("attn_out, directions for 99 %", wide.attn_out)
    agree = [_attention_is_lowest(measure) for measure in (ranks, wide)]
    holds: Holds = all(agree) or ("partly" if any(agree) else False)
    return Found(numbers, counted(len(ranks), "layer"), if_known(holds, ranks.mean(), wide.mean()))


@claim("C2", "The collapse holds across model families and kinds of text", "all families and texts tried")
def c2(table: pd.DataFrame) -> Found:
    """C2: the collapse holds across model families and kinds of text (the paper's abstract).

    Takes `RankRow`s. Holds if attention outputs have the lowest mean over layers on every model and text.
    Cannot be judged from one model.
    """
    ranks = _ranks(table)
    means = ranks.groupby(["model", "corpus"]).mean()
    below = _attention_is_below(ranks).groupby(["model", "corpus"]).mean()
    gap = means[OTHERS].min(axis=1) - means.attn_out
    lowest = gap >= 0
    alone = means.index.get_level_values("model").nunique() < 2
    numbers = [
        *spread("(model, text) pairs where attention is lowest", lowest.mean(), percent=True),
        *spread("layers where attention is lowest", below, percent=True),
        *spread("attn_out", means.attn_out),
        *spread("gap to the next site", gap),
    ]
    holds = None if alone else lowest.all()
    return Found(numbers, counted(len(means), "(model, text) pair"), if_known(holds, means))


def directions_needed(table: pd.DataFrame, target: float) -> pd.DataFrame:
    """Return the share of the width that recovers `target` of the loss, layer x site, from `LossRow`s.

    The share is the smallest at which the curve of principal directions reaches the target, interpolated in
    log r between measured points. For a curve above the target at its first point, the result is that point;
    for a curve that stays exactly at the target, the last point there. NaN if the loss was not measured.
    """
    require(0 < target <= 1, "target", target, "above 0 and at most 1")
    table = taken(table, ["site", "layer", "subspace"], ["rank_fraction", "loss_recovered"])
    curves = table[table.subspace == "principal"].groupby(["site", "layer"])
    needed = [(*where, _share_needed(curve, target)) for where, curve in curves]
    shares = pd.DataFrame(needed, columns=["site", "layer", "share"])
    return shares.pivot(index="layer", columns="site", values="share")


@claim(
    "C3",
    "The loss recovers with fewer directions for attention than for MLP or residual",
    "74.7 % of components for attention, 96.1 % for MLP (90 % of the loss; second-hand)",
)
def c3(table: pd.DataFrame, target: float) -> Found:
    """C3: the loss recovers with fewer directions for attention (a figure of the paper).

    Takes `LossRow`s. Holds if attention needs fewer directions for `target` of the loss than every other
    site, in the mean over layers and in at least two thirds of the layers; see `directions_needed`.
    """
    needed = directions_needed(table, target)
    others = needed.columns.drop("attn_out", errors="ignore")
    if "attn_out" not in needed or others.empty:
        raise UntestedError
    needed = needed.dropna(how="all")
    # Means are compared over the same layers: those where every site was measured.
    mean = needed.dropna().mean()
    fewest = (needed.attn_out < needed[others].min(axis=1)).mean()
    shown = ["attn_out", *mean[others].nsmallest(2).index.sort_values()]
    numbers = {site: needed[site] for site in shown} | {"layers where attention needs fewest": fewest}
    holds = (mean.attn_out < mean[others]).all() and fewest >= 2 / 3
    return Found(spreads(numbers, percent=True), counted(len(needed), "layer"), if_known(holds, mean))


def projection_ranks(table: pd.DataFrame) -> pd.DataFrame:
    """Return effective rank over width, layer x variant (mean over draws), from `OutputProjectionRow`s."""
    table = taken(table, ["layer", "variant"], ["effective_rank_fraction"])
    ranks = table.groupby(["layer", "variant"]).effective_rank_fraction.mean().unstack("variant")
    return ranks[[variant for variant in VARIANTS if variant in ranks]]


def drop_taken_back(table: pd.DataFrame) -> pd.DataFrame:
    """Return the share of the drop to the attention output that each variant undoes.

    Takes `OutputProjectionRow`s. The drop is from `flat_spectrum`: a flat W_O keeps the rank of z where it
    fits, over d_model as the other variants are (`z` is over its own width, which may be another: Gemma). The
    result is layer x variant, without `z` and `attn_out`; NaN if the layer has no drop.
    """
    ranks = projection_ranks(table)
    drop = ranks.flat_spectrum - ranks.attn_out
    back = ranks.sub(ranks.attn_out, axis=0).div(drop.where(drop.abs() > _ROUNDING), axis=0)
    return back.drop(columns=["z", "attn_out"])


@claim(
    "C4",
    "The output projection makes the collapse: z has a high rank, W_O squeezes it",
    "rank of z high, restored by a flat W_O",
)
def c4(table: pd.DataFrame, ranks: pd.DataFrame) -> Found:
    """C4: the output projection causes the collapse (early versions of the paper; the last version says C5).

    Weight decay is a published mechanism of a low-rank W_V W_O (Kobayashi et al., arXiv 2410.23819).

    Takes `OutputProjectionRow`s, and the `RankRow`s of `mlp_out` of the same model and text. Holds if a flat
    W_O gives a higher rank than the attention output's in every layer, and the mean of this drop is more than
    half of the distance between the means of attention and MLP outputs.
    """
    about = ["model", "corpus"]
    same = taken(table, about, []).drop_duplicates()
    mlp = taken(ranks, [*about, "site"], ["effective_rank_fraction"]).merge(same, on=about)
    mlp = mlp[mlp.site == "mlp_out"].effective_rank_fraction
    wide = _projections(table, "z", "attn_out", "flat_spectrum")
    if mlp.empty:
        raise UntestedError
    squeezed = wide.flat_spectrum - wide.attn_out
    share = _ratio(squeezed.mean(), mlp.mean() - wide.attn_out.mean())
    numbers = spreads({"z": wide.z, "attention output": wide.attn_out, "mlp_out": mlp})
    numbers += spread("drop from z over the distance to mlp_out", share, percent=True)
    holds = (squeezed > _ROUNDING).all() and share > 0.5
    return Found(numbers, counted(len(wide), "layer"), if_known(holds, squeezed, share))


@claim(
    "C5",
    "The squeeze comes from overlap among the heads' output subspaces",
    "orthogonal heads restore the rank",
)
def c5(table: pd.DataFrame, overlaps: pd.DataFrame) -> Found:
    """C5: the collapse comes from overlap among the heads' output subspaces (abstract of the last version).

    Takes `OutputProjectionRow`s, and `HeadOverlapRow`s for the overlap that the verdict reports. Holds if
    orthogonal heads with the same singular values undo more than half of the mean drop from a flat W_O to the
    attention output. Cannot be judged if there is no drop, or if z is wider than d_model, into which that
    many orthogonal heads do not fit.
    """
    angles = taken(overlaps, [], ["mean_cosine", "random_mean_cosine"]).mean()
    wide = _projections(table, "z", "attn_out", "flat_spectrum", "random_orthogonal", "orthogonal_heads")
    mean = wide.mean()
    drop = mean.flat_spectrum - mean.attn_out
    # Every matrix with orthonormal rows keeps the rank of z; a wider z has none, and draws differ.
    fits = (wide.flat_spectrum - wide.random_orthogonal).abs().max() < _ROUNDING
    share = _ratio(mean.orthogonal_heads - mean.attn_out, drop) if drop > _ROUNDING and fits else math.nan
    back = drop_taken_back(table).orthogonal_heads
    numbers = [
        *spread("drop taken back by orthogonal heads", back, value=share, percent=True),
        *spread("rank with orthogonal heads", wide.orthogonal_heads),
        *spread("mean cosine between heads", angles.mean_cosine),
        *spread("mean cosine between random subspaces", angles.random_mean_cosine),
    ]
    return Found(numbers, counted(len(wide), "layer"), if_known(share > 0.5, share))


def _projections(table: pd.DataFrame, *variants: str) -> pd.DataFrame:
    """Return `projection_ranks`. Raises UntestedError if the table lacks one of the `variants`."""
    ranks = projection_ranks(table)
    if not set(variants) <= set(ranks):
        raise UntestedError
    return ranks


def _ranks(table: pd.DataFrame) -> pd.DataFrame:
    """Return effective rank over width, (model, corpus, layer) x site. Raises UntestedError."""
    keys = ["model", "corpus", "layer", "site"]
    table = taken(table, keys, ["effective_rank_fraction"])
    ranks = table[table.site.isin(SITES)].groupby(keys).effective_rank_fraction.mean().unstack("site")
    if not set(SITES) <= set(ranks):
        raise UntestedError
    return ranks.dropna(how="all")


def _attention_is_below(ranks: pd.DataFrame) -> pd.Series:
    return ranks.attn_out < ranks[OTHERS].min(axis=1)


def _attention_is_lowest(ranks: pd.DataFrame) -> bool:
    """Return whether attention is lowest: in the mean, and in three quarters of the layers."""
    mean = ranks.mean()
    return bool(mean.attn_out <= mean[OTHERS].min() and _attention_is_below(ranks).mean() >= 0.75)


def _share_needed(curve: pd.DataFrame, target: float) -> float:
    curve = curve.dropna(subset="loss_recovered").sort_values("rank_fraction")
    if curve.empty:
        return math.nan
    # The loss recovered may fall by noise; the running maximum is the curve's upper envelope.
    reached = np.maximum.accumulate(curve.loss_recovered.to_numpy())
    steps = np.log([*curve.rank_fraction, 1.0])
    return math.exp(np.interp(target, [*reached, max(1.0, reached[-1])], steps))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
