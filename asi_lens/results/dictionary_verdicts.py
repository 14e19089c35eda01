"""Verdicts on claims C6 to C12: dead features, and how Active Subspace Initialization (ASI) prevents them.

See `verdicts` for rules that all claims' functions share.
"""

from __future__ import annotations

import math

import pandas as pd

from asi_lens.results.judging import (
    Number,
    Verdict,
    counted,
    final_numbers,
    graded,
    in_every_seed,
    loss_is_higher,
    rank_correlation,
    single,
    spread,
    taken,
)

AUTOMATIC = "ASI, automatic d_init"
PLACE = ["site", "layer"]
RANKS = {
    "effective_rank_fraction": "effective rank",
    "intrinsic_dimension_99": "directions for 99 %",
    "participation_ratio": "participation ratio",
}
"""Measures of rank that C6 compares, and their names."""
SITES = ["attn_out", "mlp_out", "resid_post"]


def rank_points(table: pd.DataFrame) -> pd.DataFrame:
    """Return the points that C6 correlates: one row per (site, layer), means over seeds.

    Takes `RankedDeadFeatureRow`s. Columns of the result: the measures of rank (`RANKS`), and `dead_fraction`
    of the random start on held-out text.
    """
    measures = [*RANKS, "dead_fraction"]
    held = _held_out(table, [*PLACE, "method"], measures)
    return held[held.method == "random"].groupby(PLACE)[measures].mean()


def c6(table: pd.DataFrame) -> Verdict | None:
    """C6: sites of lower effective rank have more dead features (the paper's abstract, a figure).

    Takes `RankedDeadFeatureRow`s. Holds if the whole 95 % interval of Spearman's correlation over the points
    (`rank_points`) is below zero, and within attention outputs too; partly, if only over all points (other
    sites tie where nothing dies). Cannot be judged if ranks or shares of silent features do not vary.
    """
    points = rank_points(table)
    if points.empty:
        return None
    rho, low, high = rank_correlation(points.effective_rank_fraction, points.dead_fraction)
    known = not math.isnan(rho)
    attention = points[points.index.get_level_values("site") == "attn_out"]
    inside = [rank_correlation(attention[name], attention.dead_fraction) for name in RANKS]
    within = [
        number
        for name, (found, low_inside, high_inside) in zip(RANKS.values(), inside, strict=True)
        for number in spread(f"within attn_out, {name}", pd.Series([low_inside, high_inside]), value=found)
    ]
    return Verdict(
        claim="C6",
        statement="The lower the effective rank of a site, the more dead features",
        paper_value="its figure: dead features fall with the effective rank",
        numbers=(*([Number("Spearman", rho, low, high)] if known else []), *within),
        over=f"{counted(len(points), '(layer, site) point')}, resampled",
        holds=None if not known else high < 0 and (True if inside[0][2] < 0 else "partly"),
    )


def c7(table: pd.DataFrame, dead_window: int) -> Verdict | None:
    """C7: ASI prevents dead features and lowers reconstruction error and delta LM loss (abstract, figures).

    Takes `DeadFeatureRow`s. Holds if in every seed ASI has fewer dead features than the random start, in
    training and on held-out text, a lower FVU, a lower KL, and a loss that is not higher (by two standard
    errors); partly, if only the dead features are fewer in every seed. Does not hold if a condition on dead
    features fails in every seed.
    """
    ends = _ends(table, dead_window, ["random", "ASI"])
    if ends is None:
        return None
    random, asi = ends
    alive = asi.lt(random)[["dead_in_training", "silent_held_out"]]
    better = asi.lt(random)[["fvu", "kl"]].assign(loss=~loss_is_higher(asi, random))
    known = _measured(random.drop(columns="l0"), asi.drop(columns="l0"))
    return Verdict(
        claim="C7",
        statement="ASI cures dead features, at lower reconstruction error and lower delta LM loss",
        paper_value="87 % dead falls below 1 % (1M features, Llama-3.1-8B)",
        numbers=_silent_and_fvu(random, asi),
        over=counted(len(alive), "seed"),
        holds=graded(alive, better) if known else None,
    )


def c7_by_size(table: pd.DataFrame) -> Verdict | None:
    """C7: a random start has more dead features in larger dictionaries; ASI prevents them (a figure).

    Takes `DeadFeatureRow`s. Holds if at every size and seed ASI has fewer silent features on held-out text
    than the random start, and the random start's silent share grows from the smallest to the largest size.
    """
    held = _held_out(table, ["d_sae", "seed", "method"], ["dead_fraction"])
    held = held[held.method.isin(["random", "ASI"])]
    silent = held.groupby(["d_sae", "seed", "method"]).dead_fraction.mean().unstack("method")
    sizes = silent.index.unique("d_sae").sort_values()
    if not {"random", "ASI"} <= set(silent) or len(sizes) < 2:
        return None
    grows = silent.random.loc[sizes[-1]].mean() > silent.random.loc[sizes[0]].mean()
    cured = (silent.random > silent.ASI).all()
    told = [("random", sizes[0]), ("random", sizes[-1]), ("ASI", sizes[-1])]
    return Verdict(
        claim="C7",
        statement="The larger the dictionary, the more features a random start leaves dead; ASI cures it",
        paper_value="dead features grow with size without ASI, below 1 % with it",
        numbers=(
            *(
                number
                for method, size in told
                for number in spread(f"{method}, {size:,} features", silent[method].loc[size], percent=True)
            ),
            *single("random minus ASI, smallest", (silent.random - silent.ASI).min(), percent=True),
        ),
        over=counted(silent.index.unique("seed").size, "seed"),
        holds=None if silent.isna().any(axis=None) else bool(cured and grows),
    )


def good_d_init(table: pd.DataFrame) -> pd.DataFrame:
    """Return the automatic `d_init` and the good range of `d_init`, one row per (site, layer).

    Takes `DeadFeatureRow`s. A swept value is good if (means over seeds) it leaves at most half as many silent
    features as the random start and its FVU is not higher. Columns of the result: `d_init` and the held-out
    numbers of the automatic choice; the held-out numbers of the random start; `good d_init, min` and
    `good d_init, max` (NaN if no value is good); `inside the good range`.
    """
    measures = ["dead_fraction", "fvu", "cross_entropy_delta"]
    held = _held_out(table, [*PLACE, "method"], ["d_init", *measures])
    swept = held[held.method == "ASI"].groupby([*PLACE, "d_init"])[measures].mean().reset_index("d_init")
    random = held[held.method == "random"].groupby(PLACE)[measures].mean()
    auto = held[held.method == AUTOMATIC].groupby(PLACE)[["d_init", *measures]].mean()
    fine = swept[_is_good(swept, random.reindex(swept.index))]
    good = fine.groupby(PLACE).d_init.agg(["min", "max"]).reindex(auto.index)
    choice = auto.join(random.add_suffix(" random")).join(good.add_prefix("good d_init, "))
    inside = (good["min"] <= auto.d_init) & (auto.d_init <= good["max"])
    return choice.assign(**{"inside the good range": inside})


def c8(table: pd.DataFrame) -> Verdict | None:
    """C8: `d_init` has a wide good range; near d_model ASI has no effect, too small a value harms (a figure).

    Takes `DeadFeatureRow`s of attention outputs; uses means over layers and seeds. Holds if the good values
    (as in `good_d_init`) span at least a factor of two, the largest swept value is not good, and the smallest
    reconstructs worse than the best.
    """
    held = _held_out(table, ["site", "layer", "seed", "method"], ["d_init", "dead_fraction", "fvu"])
    held = held[held.site == "attn_out"]
    measures = ["dead_fraction", "fvu"]
    base = held[held.method == "random"][measures].mean()
    swept = held[held.method == "ASI"].groupby("d_init")
    curve = swept[measures].mean()
    if not {"random", "ASI"} <= set(held.method) or len(curve) < 2:
        return None
    first, last = curve.index.min(), curve.index.max()
    good = curve.index[_is_good(curve, base)]
    wide = len(good) > 0 and good.max() >= 2 * good.min()
    best = curve.fvu.fillna(math.inf).idxmin()
    fvu = {d_init: part.fvu for d_init, part in swept}
    unknown = base.isna().any() or curve.isna().any(axis=None)
    return Verdict(
        claim="C8",
        statement="d_init has a wide good range; near d_model it does nothing, too small hurts",
        paper_value="1,024 to 2,048 of 4,096 (Llama-3.1-8B)",
        numbers=(
            *single("smallest good d_init", good.min()),
            *single(f"largest good d_init, of {last:.0f} tried", good.max()),
            *spread(f"FVU at d_init {first:.0f}, the smallest tried", fvu[first]),
            *spread(f"FVU at d_init {best:.0f}, the lowest", fvu[best]),
        ),
        over=f"{counted(held.layer.nunique(), 'layer')} and {counted(held.seed.nunique(), 'seed')}",
        holds=None if unknown else bool(wide and last not in good and curve.fvu[first] > curve.fvu.min()),
    )


def c9(table: pd.DataFrame, dead_window: int) -> Verdict | None:
    """C9: AuxK helps less than ASI; ASI with a sparse Adam is best (a figure).

    Takes `DeadFeatureRow`s. Holds if in every seed AuxK leaves more dead features than ASI, and sparse Adam
    fewer than Adam, both in training and on held-out text; partly, if one of the two holds in every seed.
    AuxK is here that of Gao et al. (the residual is detached, weight 1/32). The paper's authors mended faults
    in their AuxK on 2026-02-02, after its second version.
    """
    methods = ["random + AuxK", "ASI", "ASI + sparse Adam"]
    ends = _ends(table, dead_window, methods)
    if ends is None:
        return None
    aux, asi, sparse = (end[["dead_in_training", "silent_held_out"]] for end in ends)
    less, best = aux.gt(asi), asi.gt(sparse)
    found = graded(less, best) or graded(best, less)
    gap = aux.dead_in_training - asi.dead_in_training
    return Verdict(
        claim="C9",
        statement="AuxK helps less than ASI; ASI with a sparse Adam is best",
        paper_value="its figure: TopK, AuxK (mended after v2), ASI, ASI with SparseAdam in this order",
        numbers=(
            *(
                number
                for name, end in zip(methods, ends, strict=True)
                for number in spread(f"{name}, silent held out", end.silent_held_out, percent=True)
            ),
            *spread("random + AuxK minus ASI, dead in training", gap, percent=True),
        ),
        over=counted(len(less), "seed"),
        holds=found if _measured(aux, asi, sparse) else None,
    )


def c10(table: pd.DataFrame, dead_window: int) -> Verdict | None:
    """C10: ASI also works for Lorsa: hardly any dead units (a figure of the paper).

    Takes `DeadFeatureRow`s. Holds if in every seed ASI leaves fewer dead units than the random start, in
    training and on held-out text, and its FVU is not higher. Does not hold if one of these conditions fails
    in every seed.
    """
    ends = _ends(table, dead_window, ["random", "ASI"])
    if ends is None:
        return None
    random, asi = (end[["dead_in_training", "silent_held_out", "fvu"]] for end in ends)
    parts = asi.lt(random).assign(fvu=asi.fvu <= random.fvu)
    return Verdict(
        claim="C10",
        statement="ASI carries over to Lorsa: hardly any dead units",
        paper_value="dead units 52 % to 3 %",
        numbers=_silent_and_fvu(random, asi),
        over=counted(len(parts), "seed"),
        holds=in_every_seed(parts) if _measured(random, asi) else None,
    )


def c11(table: pd.DataFrame) -> Verdict | None:
    """C11: ASI is vital on attention outputs, marginal on MLP outputs and residual streams (a figure).

    Takes `DeadFeatureRow`s. Holds if ASI removes more silent features (in percentage points, mean over
    layers) on attention outputs than on every other site, and at least half of the silent features on
    attention outputs.
    """
    held = _held_out(table, [*PLACE, "method"], ["dead_fraction"])
    held = held[held.method.isin(["random", "ASI"])]
    silent = held.groupby([*PLACE, "method"]).dead_fraction.mean().unstack("method")
    if not {"random", "ASI"} <= set(silent) or not set(SITES) <= set(silent.index.unique("site")):
        return None
    gain = silent.random - silent.ASI
    mean = gain.groupby("site").mean()
    random, asi = silent.groupby("site").mean().loc["attn_out", ["random", "ASI"]]
    most = mean.attn_out > mean.drop("attn_out").max()
    left = asi / random if random else math.nan
    return Verdict(
        claim="C11",
        statement="ASI is vital on attention outputs, marginal on MLP outputs and residual streams",
        paper_value="large gain on attention, small on the others",
        numbers=(
            *(
                number
                for site in SITES
                for number in spread(f"{site}, silent taken away", gain[site], percent=True)
            ),
            *single("attn_out, silent left of the random start's", left, percent=True),
        ),
        over=counted(silent.index.unique("layer").size, "layer"),
        holds=None if silent.isna().any(axis=None) else bool(most and asi <= random / 2),
    )


def c12(table: pd.DataFrame) -> Verdict | None:
    """C12: ASI loses its benefit for JumpReLU annealed down from a high l0: features drift out (a figure).

    Takes `DriftRow`s. Holds if in every seed ASI removes less than half as many silent features when training
    starts at a high l0 as at a low l0, and the decoder rows of the high l0 end with less than half of their
    squared norm in the active subspace; partly, if the benefit is lost in every seed but features do not
    drift out. Does not hold if the benefit is lost in no seed.
    """
    held = _held_out(table, ["method", "seed"], ["dead_fraction", "decoder_inside"])
    methods = [f"{start}, {when}" for start in ("random", "ASI") for when in ("low l0", "high l0")]
    if not set(methods) <= set(held.method):
        return None
    held = held[held.method.isin(methods)].set_index(["method", "seed"])
    silent = held.dead_fraction.unstack("method")
    inside = held.decoder_inside.unstack("method")[["ASI, low l0", "ASI, high l0"]]
    low, high = (silent[f"random, {when}"] - silent[f"ASI, {when}"] for when in ("low l0", "high l0"))
    parts = pd.DataFrame({"gain lost": high < low / 2, "drifted": inside["ASI, high l0"] < 0.5})
    return Verdict(
        claim="C12",
        statement="ASI loses its benefit for JumpReLU annealed down from a high l0: features drift out",
        paper_value="no benefit left; its figure",
        numbers=(
            *spread("low l0, silent taken away by ASI", low, percent=True),
            *spread("high l0, silent taken away by ASI", high, percent=True),
            *spread("low l0, decoder inside the subspace", inside["ASI, low l0"], percent=True),
            *spread("high l0, decoder inside the subspace", inside["ASI, high l0"], percent=True),
        ),
        over=counted(len(silent), "seed"),
        holds=graded(parts[["gain lost"]], parts[["drifted"]]) if _measured(silent, inside) else None,
    )


def _held_out(table: pd.DataFrame, keys: list[str], measures: list[str]) -> pd.DataFrame:
    table = taken(table, [*keys, "split"], measures)
    return table[table.split == "held_out"]


def _ends(table: pd.DataFrame, dead_window: int, methods: list[str]) -> list[pd.DataFrame] | None:
    """Return `final_numbers` by seed, one table per method; None unless the table has all methods.

    A seed that a method lacks is a row of NaN in that method's table.
    """
    final = final_numbers(table, dead_window)
    if not set(methods) <= set(final.index.unique("method")):
        return None
    final = final.loc[methods]
    seeds = final.index.unique("seed").sort_values()
    return [final.xs(name, level="method").reindex(seeds) for name in methods]


def _measured(*tables: pd.DataFrame) -> bool:
    """Return whether none of the numbers is NaN."""
    return not any(one.isna().any(axis=None) for one in tables)


def _silent_and_fvu(random: pd.DataFrame, asi: pd.DataFrame) -> tuple[Number, ...]:
    return (
        *spread("random, silent held out", random.silent_held_out, percent=True),
        *spread("ASI, silent held out", asi.silent_held_out, percent=True),
        *spread("random, FVU", random.fvu),
        *spread("ASI, FVU", asi.fvu),
    )


def _is_good(swept: pd.DataFrame, base: pd.DataFrame | pd.Series) -> pd.Series:
    return (swept.dead_fraction <= base.dead_fraction / 2) & (swept.fvu <= base.fvu)
