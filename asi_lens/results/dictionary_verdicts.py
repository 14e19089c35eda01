"""Verdicts on claims C6 to C12: dead features, and how Active Subspace Initialization (ASI) prevents them.

See `verdicts` for rules that all claims' functions share.
"""

from __future__ import annotations

import math

import pandas as pd

from asi_lens.results.judging import (
    MOST_NUMBERS,
    Found,
    Holds,
    Number,
    UntestedError,
    by_method,
    by_seed,
    claim,
    counted,
    ends,
    graded,
    held_out,
    if_known,
    in_every_seed,
    loss_is_higher,
    rank_correlation,
    spread,
    spreads,
    taken,
    tied_at_zero,
)
from asi_lens.results.paired_verdicts import above, below, paired_differences, told_differences

AUTOMATIC = "ASI, automatic d_init"
PLACE = ["site", "layer"]
RANKS = {
    "effective_rank_fraction": "effective rank",
    "intrinsic_dimension_99": "directions for 99 %",
    "participation_ratio": "participation ratio",
}
"""Measures of rank that C6 compares, and their names."""
SITES = ["attn_out", "mlp_out", "resid_post"]
DEAD = ["dead_in_training", "silent_held_out"]


def rank_points(table: pd.DataFrame) -> pd.DataFrame:
    """Return the points that C6 correlates: one row per (site, layer), means over seeds.

    Takes `RankedDeadFeatureRow`s. Columns of the result: the measures of rank (`RANKS`), and `dead_fraction`
    of the random start on held-out text.
    """
    measures = [*RANKS, "dead_fraction"]
    held = held_out(table, [*PLACE, "method"], measures)
    return held[held.method == "random"].groupby(PLACE)[measures].mean()


_C6 = (
    "C6",
    "The lower the effective rank of a site, the more dead features",
    "its figure: dead features fall with the effective rank",
)


@claim(*_C6)
def c6(table: pd.DataFrame) -> Found:
    """C6: sites of lower effective rank have more dead features (the paper's abstract, a figure).

    Takes `RankedDeadFeatureRow`s. Holds if the whole 95 % interval of Spearman's correlation over the points
    (`rank_points`) is below zero, and within attention outputs too; partly, if only over all points (other
    sites tie where nothing dies). Cannot be judged if ranks or shares of silent features do not vary.
    """
    points = rank_points(table)
    if points.empty:
        raise UntestedError
    return _falls_with_rank(points, f"{counted(len(points), '(layer, site) point')}, resampled")


@claim(*_C6)
def c6_released(table: pd.DataFrame | None) -> Found:
    """C6 on dictionaries that others have trained (the paper's figure has those of Llama Scope).

    Takes `ReleasedRow`s; None if no dictionary was named, which cannot be judged. Compares dictionaries of
    one size: the size with the most (site, layer) points, the smaller of equals. A point is the mean over its
    dictionaries; those that say that their start was not random are left out. Otherwise the rule of `c6`,
    with the share that fired on none of all tokens.
    """
    if table is None:
        return Found([], "no dictionary", None)
    measures = [*RANKS, "dead_fraction"]
    rows = taken(table, [*PLACE, "d_sae", "start"], measures)
    rows = rows[rows.start.isna() | (rows.start == "random")]
    if rows.empty:
        return Found([], "no dictionary with a random or an unknown start", None)
    points = rows.groupby(["d_sae", *PLACE])[measures].mean()
    size = int(points.groupby("d_sae").size().idxmax())
    over = f"{counted(len(points.loc[size]), '(layer, site) point')} of {size:,} features, resampled"
    return _falls_with_rank(points.loc[size], over)


def _falls_with_rank(points: pd.DataFrame, over: str) -> Found:
    """Return whether dead features fall with the rank, by the rule of `c6`."""
    rho, low, high = rank_correlation(points.effective_rank_fraction, points.dead_fraction)
    numbers = [] if math.isnan(rho) else [Number("Spearman", rho, low, high)]
    attention = points[points.index.get_level_values("site") == "attn_out"]
    inside = [rank_correlation(attention[name], attention.dead_fraction) for name in RANKS]
    for name, (found, least, most) in zip(RANKS.values(), inside, strict=True):
        numbers += spread(f"within attn_out, {name}", pd.Series([least, most]), value=found)
    holds: Holds = high < 0 and (True if inside[0][2] < 0 else "partly")
    return Found(numbers[:MOST_NUMBERS], over, if_known(holds, rho))


@claim(
    "C7",
    "ASI cures dead features, at lower reconstruction error and lower delta LM loss",
    "87 % dead falls below 1 % (1M features, Llama-3.1-8B)",
)
def c7(table: pd.DataFrame, dead_window: int, paired: pd.DataFrame | None = None) -> Found:
    """C7: ASI prevents dead features and lowers reconstruction error and delta LM loss (abstract, figures).

    Takes `DeadFeatureRow`s, and `PairedLossRow`s if there are any. Holds if in every seed ASI has fewer dead
    features than the random start, in training and on held-out text, a lower FVU, a lower KL, and a loss
    that is not higher (by two standard errors); partly, if only the dead features are fewer in every seed.
    Does not hold if a condition on dead features fails in every seed. Cannot be judged where nothing is dead
    from either start. With `paired`, KL is lower and the loss is higher if the paired difference on the same
    text is, by two of its standard errors.
    """
    random, asi = measured = [end.drop(columns="l0") for end in ends(table, dead_window, ["random", "ASI"])]
    numbers = _silent_and_fvu(random, asi)
    better = asi.lt(random)[["fvu", "kl"]].assign(loss=~loss_is_higher(asi, random))
    if paired is not None:
        own = paired_differences(paired).reindex(random.index)
        better = better.assign(kl=below(own, "kl"), loss=~above(own, "cross_entropy"))
        numbers = [*numbers[:2], *told_differences(own)]
        measured = [random[[*DEAD, "fvu"]], asi[[*DEAD, "fvu"]], own]
    holds = None if tied_at_zero(random[DEAD], asi[DEAD]) else graded(asi.lt(random)[DEAD], better)
    return by_seed(numbers, holds, *measured)


@claim(
    "C7",
    "The larger the dictionary, the more features a random start leaves dead; ASI cures it",
    "dead features grow with size without ASI, below 1 % with it",
)
def c7_by_size(table: pd.DataFrame) -> Found:
    """C7: a random start has more dead features in larger dictionaries; ASI prevents them (a figure).

    Takes `DeadFeatureRow`s. Holds if at every size and seed ASI has at most half as many silent features on
    held-out text as the random start, and the random start's silent share grows from the smallest to the
    largest size; partly, if ASI has fewer, but not at most half as many. Sizes at which nothing is silent in
    either do not count.
    """
    silent = by_method(table, ["d_sae", "seed"], ["dead_fraction"], ["random", "ASI"]).dead_fraction
    sizes = silent.index.unique("d_sae").sort_values()
    if len(sizes) < 2:
        raise UntestedError
    first, last = silent.loc[sizes[0]], silent.loc[sizes[-1]]
    gain = silent.random - silent.ASI
    shown = {
        f"random, {sizes[0]:,} features": first.random,
        f"random, {sizes[-1]:,} features": last.random,
        f"ASI, {sizes[-1]:,} features": last.ASI,
        "random minus ASI, smallest": gain.min(),
    }
    over = counted(silent.index.unique("seed").size, "seed")
    some = silent[(silent != 0).any(axis=1)]
    fewer = (some.random > some.ASI).all() and last.random.mean() > first.random.mean()
    halved: Holds = True if (some.random / 2 >= some.ASI).all() else "partly"
    holds = None if some.empty else fewer and halved
    return Found(spreads(shown, percent=True), over, if_known(holds, silent))


def good_d_init(table: pd.DataFrame) -> pd.DataFrame:
    """Return the automatic `d_init` and the good range of `d_init`, one row per (site, layer).

    Takes `DeadFeatureRow`s. A swept value is good if (means over seeds) it leaves at most half as many silent
    features as the random start and its FVU is not higher. Columns of the result: `d_init` and the held-out
    numbers of the automatic choice; the held-out numbers of the random start; `good d_init, min` and
    `good d_init, max` (NaN if no value is good); `inside the good range`.
    """
    measures = ["dead_fraction", "fvu", "cross_entropy_delta"]
    held = held_out(table, [*PLACE, "method"], ["d_init", *measures])
    swept = held[held.method == "ASI"].groupby([*PLACE, "d_init"])[measures].mean().reset_index("d_init")
    random = held[held.method == "random"].groupby(PLACE)[measures].mean()
    auto = held[held.method == AUTOMATIC].groupby(PLACE)[["d_init", *measures]].mean()
    fine = swept[_is_good(swept, random.reindex(swept.index))]
    good = fine.groupby(PLACE).d_init.agg(["min", "max"]).reindex(auto.index)
    choice = auto.join(random.add_suffix(" random")).join(good.add_prefix("good d_init, "))
    inside = (good["min"] <= auto.d_init) & (auto.d_init <= good["max"])
    return choice.assign(**{"inside the good range": inside})


@claim(
    "C8",
    "d_init has a wide good range; near d_model it does nothing, too small hurts",
    "1,024 to 2,048 of 4,096 (Llama-3.1-8B)",
)
def c8(table: pd.DataFrame) -> Found:
    """C8: `d_init` has a wide good range; near d_model ASI has no effect, too small a value harms (a figure).

    Takes `DeadFeatureRow`s of attention outputs; uses means over layers and seeds. Holds if the good values
    (as in `good_d_init`) span at least a factor of two, the largest swept value is not good, and the smallest
    reconstructs worse than the best.
    """
    held = held_out(table, ["site", "layer", "seed", "method"], ["d_init", "dead_fraction", "fvu"])
    held = held[held.site == "attn_out"]
    measures = ["dead_fraction", "fvu"]
    base = held[held.method == "random"][measures].mean()
    swept = held[held.method == "ASI"].groupby("d_init")
    curve = swept[measures].mean()
    if not {"random", "ASI"} <= set(held.method) or len(curve) < 2:
        raise UntestedError
    first, last = curve.index.min(), curve.index.max()
    good = curve.index[_is_good(curve, base)]
    wide = len(good) > 0 and good.max() >= 2 * good.min()
    best = curve.fvu.fillna(math.inf).idxmin()
    fvu = {d_init: part.fvu for d_init, part in swept}
    numbers = [
        *spread("smallest good d_init", good.min()),
        *spread(f"largest good d_init, of {last:.0f} tried", good.max()),
        *spread(f"FVU at d_init {first:.0f}, the smallest tried", fvu[first]),
        *spread(f"FVU at d_init {best:.0f}, the lowest", fvu[best]),
    ]
    over = f"{counted(held.layer.nunique(), 'layer')} and {counted(held.seed.nunique(), 'seed')}"
    holds = wide and last not in good and curve.fvu[first] > curve.fvu.min()
    return Found(numbers, over, if_known(holds, base, curve))


@claim(
    "C9",
    "AuxK helps less than ASI; ASI with a sparse Adam is best",
    "its figure: TopK, AuxK (mended after v2), ASI, ASI with SparseAdam in this order",
)
def c9(table: pd.DataFrame, dead_window: int) -> Found:
    """C9: AuxK helps less than ASI; ASI with a sparse Adam is best (a figure).

    Takes `DeadFeatureRow`s. Holds if in every seed AuxK leaves more dead features than ASI, and sparse Adam
    fewer than Adam, both in training and on held-out text; partly, if one of the two holds in every seed.
    Does not hold if one of them fails in every seed, and neither holds. AuxK is here that of Gao et al. (the
    residual is detached, weight 1/32). The paper's authors mended faults in their AuxK on 2026-02-02, after
    its second version.
    """
    methods = ["random + AuxK", "ASI", "ASI + sparse Adam"]
    aux, asi, sparse = found = [end[DEAD] for end in ends(table, dead_window, methods)]
    order = [
        None if tied_at_zero(more, fewer) else in_every_seed(more.gt(fewer))
        for more, fewer in ((aux, asi), (asi, sparse))
    ]
    shown = {
        f"{name}, silent held out": end.silent_held_out for name, end in zip(methods, found, strict=True)
    }
    shown["random + AuxK minus ASI, dead in training"] = aux.dead_in_training - asi.dead_in_training
    # None counts as neither: a part that one seed refutes and another does not, or that nothing can show.
    holds: Holds = all(order) or ("partly" if True in order else False if False in order else None)
    return by_seed(spreads(shown, percent=True), holds, *found)


@claim("C10", "ASI carries over to Lorsa: hardly any dead units", "dead units 52 % to 3 %")
def c10(table: pd.DataFrame, dead_window: int) -> Found:
    """C10: ASI also works for Lorsa: hardly any dead units (a figure of the paper).

    Takes `DeadFeatureRow`s. Holds if in every seed ASI leaves at most half as many dead units as the random
    start, in training and on held-out text, and its FVU is not higher; partly, if it leaves fewer, but not at
    most half as many. Does not hold if one of these conditions fails in every seed. Cannot be judged where
    nothing is dead from either start.
    """
    random, asi = (end[[*DEAD, "fvu"]] for end in ends(table, dead_window, ["random", "ASI"]))
    better = asi.lt(random).assign(fvu=asi.fvu <= random.fvu)
    halved = asi[DEAD] <= random[DEAD] / 2
    holds = None if tied_at_zero(random[DEAD], asi[DEAD]) else graded(better, halved)
    return by_seed(_silent_and_fvu(random, asi), holds, random, asi)


@claim(
    "C11",
    "ASI is vital on attention outputs, marginal on MLP outputs and residual streams",
    "large gain on attention, small on the others",
)
def c11(table: pd.DataFrame) -> Found:
    """C11: ASI is vital on attention outputs, marginal on MLP outputs and residual streams (a figure).

    Takes `DeadFeatureRow`s. Holds if ASI removes more silent features (in percentage points, mean over
    layers) on attention outputs than on every other site, and at least half of the silent features on
    attention outputs. Places with a random start alone do not count. Cannot be judged if a random start
    leaves no silent feature on attention outputs.
    """
    silent = by_method(table, PLACE, ["dead_fraction"], ["random", "ASI"]).dead_fraction
    held = held_out(table, [*PLACE, "method"], [])
    silent = silent[silent.index.isin(held[held.method == "ASI"].set_index(PLACE).index)]
    if not set(SITES) <= set(silent.index.unique("site")):
        raise UntestedError
    gain = silent.random - silent.ASI
    mean = gain.groupby("site").mean()
    random, asi = silent.groupby("site").mean().loc["attn_out", ["random", "ASI"]]
    shown = {f"{site}, silent taken away": gain[site] for site in SITES}
    shown["attn_out, silent left of the random start's"] = asi / random if random else math.nan
    over = counted(silent.index.unique("layer").size, "layer")
    most = mean.attn_out > mean.drop("attn_out").max()
    holds = (most and asi <= random / 2) if random else None
    return Found(spreads(shown, percent=True), over, if_known(holds, silent))


@claim(
    "C12",
    "ASI loses its benefit for JumpReLU annealed down from a high l0: features drift out",
    "no benefit left; its figure",
)
def c12(table: pd.DataFrame) -> Found:
    """C12: ASI loses its benefit for JumpReLU annealed down from a high l0: features drift out (a figure).

    Takes `DriftRow`s. Holds if in every seed ASI removes less than half as many silent features when training
    starts at a high l0 as at a low l0, and the decoder rows of the high l0 end with less than half of their
    squared norm in the active subspace; partly, if the benefit is lost in every seed but features do not
    drift out. Does not hold if the benefit is lost in no seed. Cannot be judged if ASI removes none at a low
    l0 in some seed: there is no benefit to lose.
    """
    methods = [f"{start}, {when} l0" for start in ("random", "ASI") for when in ("low", "high")]
    held = by_method(table, ["seed"], ["dead_fraction", "decoder_inside"], methods)
    silent, inside = held.dead_fraction, held.decoder_inside[["ASI, low l0", "ASI, high l0"]]
    low, high = (silent[f"random, {when} l0"] - silent[f"ASI, {when} l0"] for when in ("low", "high"))
    shown = {
        "low l0, silent taken away by ASI": low,
        "high l0, silent taken away by ASI": high,
        "low l0, decoder inside the subspace": inside["ASI, low l0"],
        "high l0, decoder inside the subspace": inside["ASI, high l0"],
    }
    lost, drifted = (high < low / 2).to_frame(), (inside["ASI, high l0"] < 0.5).to_frame()
    holds = graded(lost, drifted) if (low > 0).all() else None
    return by_seed(spreads(shown, percent=True), holds, silent, inside)


def _silent_and_fvu(random: pd.DataFrame, asi: pd.DataFrame) -> list[Number]:
    both = {"random": random, "ASI": asi}
    silent = {f"{name}, silent held out": one.silent_held_out for name, one in both.items()}
    return [*spreads(silent, percent=True), *spreads({f"{name}, FVU": one.fvu for name, one in both.items()})]


def _is_good(swept: pd.DataFrame, base: pd.DataFrame | pd.Series) -> pd.Series:
    return (swept.dead_fraction <= base.dead_fraction / 2) & (swept.fvu <= base.fvu)
