"""Verdicts with their numbers, and statistics that several claims share.

The rule of each claim is in `verdicts`.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Literal, NamedTuple, ParamSpec, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from asi_lens.base.errors import DataError, require, require_known
from asi_lens.base.facts import facts_html
from asi_lens.results.numbers import Number
from asi_lens.results.rows import LOSSES

Values: TypeAlias = pd.Series | np.ndarray | Sequence[float | int]
Holds: TypeAlias = bool | Literal["partly"] | None
Outcome = Literal["supported", "partly supported", "not supported", "not testable here"]
Given = ParamSpec("Given")

OUTCOMES: tuple[str, ...] = typing.get_args(Outcome)
"""All possible outcomes of a claim."""
MOST_NUMBERS = 4
"""Largest number of `Number`s in a verdict."""
# In how many orders of n points that have no correlation the whole 95 % interval lies below zero, where 2.5 %
# should: 16.7, 4.2 and 6.7 % of 3, 4 and 5 points, 1.8 % of 6 (all orders counted).
_FEWEST_POINTS = 6


@dataclass(frozen=True)
class Verdict:
    """The result of testing one claim of the paper on one table.

    Raises OptionError for a claim that is not `C1`, `C2`, ..., and for more than four numbers.
    """

    claim: str
    """`C1`, `C2`, ..."""
    statement: str
    paper_value: str
    numbers: tuple[Number, ...]
    """At most four numbers, which decide the verdict."""
    over: str
    """Values that the spread covers, such as `3 seeds`."""
    holds: Holds
    """Whether the claim holds; None if seeds disagree or the claim cannot be judged."""

    def __post_init__(self) -> None:
        require_claim(self.claim)
        n = len(self.numbers)
        require(n <= MOST_NUMBERS, f"{self.claim}: numbers", n, f"at most {MOST_NUMBERS}")

    def verdict(self, profile: str) -> Outcome:
        """Return the verdict in words. A `smoke` run is too small for a verdict."""
        if profile == "smoke" or self.holds is None:
            return "not testable here"
        if self.holds == "partly":
            return "partly supported"
        return "supported" if self.holds else "not supported"

    def _repr_html_(self) -> str:
        facts = {
            "claim": self.statement,
            "paper": self.paper_value,
            **{number.name: number.text for number in self.numbers},
            "spread over": self.over,
            "holds": "not decided" if self.holds is None else self.holds,
        }
        return facts_html(f"Verdict on {self.claim}", facts)


def require_claim(claim: str) -> None:
    """Raise OptionError unless `claim` is `C1`, `C2`, ..."""
    require(re.fullmatch(r"C[1-9]\d*", claim) is not None, "claim", claim, "C1, C2, ...")


class UntestedError(Exception):
    """The table lacks rows that a claim compares, so there is no verdict on the claim."""


class Found(NamedTuple):
    """Result of a claim's rule; see the attributes of the same names of `Verdict`."""

    numbers: Sequence[Number]
    over: str
    holds: Holds


Rule: TypeAlias = Callable[Given, Found]
Judge: TypeAlias = Callable[Given, Verdict | None]


def claim(name: str, statement: str, paper_value: str) -> Callable[[Rule[Given]], Judge[Given]]:
    """Decorate the rule of the claim `name`: the decorated function returns a Verdict.

    The decorated function returns None if the rule raises `UntestedError`.
    """

    def decorate(rule: Rule[Given]) -> Judge[Given]:
        @wraps(rule)
        def judge(*args: Given.args, **kwargs: Given.kwargs) -> Verdict | None:
            try:
                numbers, over, holds = rule(*args, **kwargs)
            except UntestedError:
                return None
            return Verdict(name, statement, paper_value, tuple(numbers), over, holds)

        return judge

    return decorate


def combined(verdicts: Sequence[str]) -> str:
    """Return one verdict for a claim that several notebooks tested.

    Notebooks that could not test the claim do not count. If the other notebooks agree, the result is their
    verdict, else `partly supported`. Raises UnknownNameError for a word that is not in `OUTCOMES`.
    """
    require_known(verdicts, OUTCOMES, "verdict")
    found = set(verdicts) - {"not testable here"}
    if not found:
        return "not testable here"
    return found.pop() if len(found) == 1 else "partly supported"


def taken(table: pd.DataFrame, keys: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Return the columns `keys` and `measures` of a table; measures are floats (NaN if not measured).

    Raises DataError naming the columns that the table lacks.
    """
    missing = [name for name in (*keys, *measures) if name not in table.columns]
    if missing:
        raise DataError(f"the table has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    return table[[*keys, *measures]].astype(dict.fromkeys(measures, float))


def spread(
    name: str, values: pd.Series | float | int, *, value: float | None = None, percent: bool = False
) -> list[Number]:
    """Return the mean of `values` (or the given `value`) with their range, as a list of one Number.

    A single value has no range. The list is empty if nothing was measured.
    """
    values = pd.Series(values, dtype=float).dropna()
    shown = float(values.mean()) if value is None else value
    if values.empty or math.isnan(shown):
        return []
    low, high = (float(values.min()), float(values.max())) if len(values) > 1 else (None, None)
    return [Number(name, shown, low, high, percent)]


def spreads(values: Mapping[str, pd.Series | float | int], *, percent: bool = False) -> list[Number]:
    """Return the `spread` of each entry of `values`, by name; what was not measured is left out."""
    return [number for name, one in values.items() for number in spread(name, one, percent=percent)]


def counted(n: int, noun: str) -> str:
    """Return `1 seed`, `3 seeds`."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def in_every_seed(better: pd.DataFrame) -> bool | None:
    """Return whether a claim of several parts holds. `better` has a row per seed and a column per part.

    True if every part holds in every seed, False if a part fails in every seed, else None (seeds disagree).
    """
    if bool(better.all(axis=None)):
        return True
    return False if bool((~better).all(axis=0).any()) else None


def graded(main: pd.DataFrame, rest: pd.DataFrame) -> bool | Literal["partly"] | None:
    """Return whether a claim holds that has a main and another part; both have a row per seed.

    True if both hold in every seed, "partly" if the main part does, else `in_every_seed` of the main part.
    """
    found = in_every_seed(main)
    return "partly" if found and not rest.all(axis=None) else found


def tied_at_zero(one: pd.DataFrame | pd.Series, other: pd.DataFrame | pd.Series) -> bool:
    """Return whether a number is zero in both somewhere: where nothing dies, nothing can be kept alive."""
    return bool(((one == 0) & (other == 0)).to_numpy().any())


def if_known(holds: Holds | np.bool_, *measured: pd.DataFrame | pd.Series | float | int) -> Holds:
    """Return `holds`; None if one of the `measured` numbers is NaN."""
    if any(np.isnan(np.asarray(one, dtype=float)).any() for one in measured):
        return None
    return bool(holds) if isinstance(holds, np.bool_) else holds


def by_seed(numbers: Sequence[Number], holds: Holds, *measured: pd.DataFrame) -> Found:
    """Return the result of a claim on the `measured` tables, all with a row per seed; see `if_known`."""
    return Found(numbers, counted(len(measured[0]), "seed"), if_known(holds, *measured))


def held_out(table: pd.DataFrame, keys: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Return the held-out rows of `DeadFeatureRow`s, with the columns of `taken`, `split` among them."""
    table = taken(table, [*keys, "split"], measures)
    return table[table.split == "held_out"]


def by_method(
    table: pd.DataFrame, keys: Sequence[str], measures: Sequence[str], methods: Sequence[str]
) -> pd.DataFrame:
    """Return means of held-out rows, `keys` x (measure, method).

    Raises UntestedError if a method has no rows.
    """
    held = held_out(table, [*keys, "method"], measures)
    held = held[held.method.isin(methods)]
    if not set(methods) <= set(held.method):
        raise UntestedError
    return held.groupby([*keys, "method"])[list(measures)].mean().unstack("method")


def ends(table: pd.DataFrame, dead_window: int, methods: Sequence[str]) -> list[pd.DataFrame]:
    """Return `final_numbers` by seed, one table per method. Raises UntestedError if a method has no rows.

    A seed that a method lacks is a row of NaN in that method's table.
    """
    final = final_numbers(table, dead_window)
    if not set(methods) <= set(final.index.unique("method")):
        raise UntestedError
    final = final.loc[list(methods)]
    seeds = final.index.unique("seed").sort_values()
    return [final.xs(name, level="method").reindex(seeds) for name in methods]


def final_numbers(table: pd.DataFrame, dead_window: int) -> pd.DataFrame:
    """Return the numbers at the end of every run, a row per method and seed, from `DeadFeatureRow`s.

    Columns: `dead_in_training` (over the last `dead_window` tokens), and on held-out text `silent_held_out`,
    `fvu`, `l0`, `cross_entropy_delta`, `cross_entropy_delta_error`, `kl`. NaN if not measured.
    """
    who = ["method", "seed"]
    keys = [*who, "split", "tokens", "dead_window_tokens"]
    table = taken(table, keys, ["dead_fraction", "fvu", "l0", *LOSSES])
    train = table[(table.split == "train") & (table.dead_window_tokens == dead_window)]
    last = train[train.tokens == train.groupby(who).tokens.transform("max")].set_index(who)
    held = table[table.split == "held_out"].set_index(who)
    numbers = held[["dead_fraction", "fvu", "l0", *LOSSES]]
    numbers = numbers.rename(columns={"dead_fraction": "silent_held_out"})
    numbers.insert(0, "dead_in_training", last.dead_fraction)
    return numbers


def loss_is_higher(numbers: pd.DataFrame, others: pd.DataFrame) -> pd.Series:
    """Return, per row, whether the loss in `numbers` exceeds that in `others` by two standard errors.

    Both are rows of `final_numbers` with the same index. Dictionaries of all seeds are evaluated on the same
    text, so all seeds may show a difference that other text would not show. Therefore the standard error of
    the difference is over sequences of text. Its formula is for independent samples, which is an upper bound
    for losses that rise and fall together.
    """
    delta, error = (
        [table[column] for table in (numbers, others)]
        for column in ("cross_entropy_delta", "cross_entropy_delta_error")
    )
    return delta[0] - delta[1] > 2 * (error[0] ** 2 + error[1] ** 2) ** 0.5


def rank_correlation(x: Values, y: Values, seed: int = 0) -> tuple[float, float, float]:
    """Return (Spearman's rank correlation, low, high): a 95 % percentile interval of 2,000 resamplings.

    All are NaN for fewer than 6 points, and if `x` or `y` does not vary; resamplings in which `x` or `y` does
    not vary are left out. Of fewer points the interval is too narrow: of three in any order that falls, it
    would be -1 to -1. Raises OptionError if `x` and `y` differ in length.
    """
    require(len(x) == len(y), "lengths of x and y", (len(x), len(y)), "equal")
    points = np.stack([np.asarray(x, dtype=float), np.asarray(y, dtype=float)])
    n = points.shape[1]
    if n < _FEWEST_POINTS:
        return math.nan, math.nan, math.nan
    chosen = np.random.default_rng(seed).integers(0, n, (2_000, n))
    draws = _spearman(points[0][chosen], points[1][chosen])
    found = float(_spearman(points[:1], points[1:])[0])
    if math.isnan(found):
        return found, found, found
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return found, float(low), float(high)


def _spearman(x: Float[np.ndarray, "rows n"], y: Float[np.ndarray, "rows n"]) -> Float[np.ndarray, " rows"]:
    """Return the correlation of the ranks [rows], row by row; NaN for a row that does not vary."""
    ranks = [pd.DataFrame(part).rank(axis=1).to_numpy() for part in (x, y)]
    a, b = (part - part.mean(1, keepdims=True) for part in ranks)
    norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norms, out=np.full(len(norms), np.nan), where=norms > 0)
