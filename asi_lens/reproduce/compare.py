"""Compare a run with the published one: `python -m asi_lens.reproduce.compare --profile quick`.

Tolerances, stated before any comparison:

- the same dtype and the same instructions of the processor: every number to its last written digit;
- else: a number differs by at most a fiftieth of the largest number of its column; where a table has several
  seeds, its mean over seeds may differ by the range over seeds in either run, if that is more.

A column of the second kind agrees if nine of ten numbers do. Columns that differ nowhere (names, sizes) say
which numbers belong together. Times (columns of seconds) are not compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asi_lens.base.errors import AsiLensError, DataError
from asi_lens.base.files import write_text
from asi_lens.base.paths import figures_dir, published_dir
from asi_lens.reproduce.gallery import DEFAULT_MODEL
from asi_lens.reproduce.staleness import changed_since
from asi_lens.results.sidecar import read_sidecars

if TYPE_CHECKING:
    import pandas as pd

REPORT = "compared.md"
SHARE = 0.9
"""Least share of a column's numbers that agree."""
OF_LARGEST = 1 / 50
"""Largest difference of a number, as a share of the largest number of its column."""
EXACT, NEAR = "last digit", "a fiftieth or range over seeds"
# Not part of the setting: where a run writes, and how.
_PASSING = ("output_folder", "profile", "store_budget_gb")


@dataclass(frozen=True)
class Compared:
    """What the comparison of one table found."""

    table: str
    rule: str
    """The tolerance, or why there is nothing to compare."""
    numbers: int = 0
    agree: int = 0
    """Numbers within the tolerance."""
    apart: tuple[str, ...] = ()
    """Columns that do not agree, with the share of their numbers that does."""
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether every column agrees."""
        return not self.apart and not self.reason


def compare(fresh: Path, published: Path) -> list[Compared]:
    """Return a result for every published table whose notebook has run. Raises DataError if none has."""
    new, old = read_sidecars(fresh), read_sidecars(published)
    shared = [name for name in old if name in new]
    if not shared:
        raise DataError(f"{fresh} has no run of a notebook that {published} has; run `make figures` first")
    found = []
    for name in shared:
        why = changed_since(fresh, name) or _other_setting(new[name], old[name])
        exact = _arithmetic(new[name]) == _arithmetic(old[name])
        for stem in old[name]["tables"]:
            if why or stem not in new[name]["tables"]:
                found.append(Compared(stem, "", reason=why or "the run has no such table"))
            else:
                tables = [_read(folder / f"{stem}.csv") for folder in (fresh, published)]
                found.append(compare_tables(stem, tables[0], tables[1], exact))
        found.append(_verdicts(name, new[name], old[name]))
    return found


def compare_tables(name: str, new: pd.DataFrame, old: pd.DataFrame, exact: bool) -> Compared:
    """Return how two tables of the same rows agree; `exact` asks for the last digit."""
    rule = EXACT if exact else NEAR
    new, old = (table[[name for name in table if not name.endswith("_seconds")]] for table in (new, old))
    if list(new.columns) != list(old.columns):
        differ = ", ".join(sorted(set(new.columns) ^ set(old.columns)))
        return Compared(name, rule, reason=f"other columns: {differ or 'in another order'}")
    if len(new) != len(old):
        return Compared(name, rule, reason=f"{len(new):,} rows, published {len(old):,}")
    apart, numbers, agree = [], 0, 0
    same = [column for column in old if new[column].equals(old[column])]
    for column in old:
        if column in same:
            numbers, agree = numbers + len(old), agree + len(old)
            continue
        within = _within(column, new, old, rule, [one for one in same if one != "seed"])
        numbers, agree = numbers + len(within), agree + int(within.sum())
        if within.mean() < (1 if exact else SHARE):
            apart.append(f"{column} ({within.mean():.0%})")
    return Compared(name, rule, numbers, agree, tuple(apart))


def _within(column: str, new: pd.DataFrame, old: pd.DataFrame, rule: str, keys: list[str]) -> pd.Series:
    """Return for each number of a column (or each mean over seeds) whether it is within the tolerance."""
    import pandas as pd

    a, b = new[column], old[column]
    if rule == EXACT or not all(pd.api.types.is_numeric_dtype(one) for one in (a, b)):
        return (a == b) | (a.isna() & b.isna())
    groups = [one.groupby([old[key] for key in keys], dropna=False, sort=False) for one in (a, b)]
    means, ranges = [one.mean() for one in groups], [one.max() - one.min() for one in groups]
    allowed = pd.concat(ranges, axis=1).max(axis=1).clip(lower=OF_LARGEST * b.abs().max())
    return ((means[0] - means[1]).abs() <= allowed) | (means[0].isna() & means[1].isna())


def _verdicts(name: str, new: Mapping[str, Any], old: Mapping[str, Any]) -> Compared:
    """Compare the verdicts of a notebook, claim by claim."""
    told = [{one["claim"]: one["verdict"] for one in sidecar["verdicts"]} for sidecar in (new, old)]
    apart = [
        f"{claim}: {told[0].get(claim, 'none')}, published {verdict}"
        for claim, verdict in told[1].items()
        if told[0].get(claim) != verdict
    ]
    return Compared(f"{name}, verdicts", "equal", len(told[1]), len(told[1]) - len(apart), tuple(apart))


def _other_setting(new: Mapping[str, Any], old: Mapping[str, Any]) -> str:
    ours, theirs = (
        {key: value for key, value in one["parameters"].items() if key not in _PASSING} for one in (new, old)
    )
    differ = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    return f"other parameters: {', '.join(differ)}" if differ else ""


def _arithmetic(sidecar: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the processor's instructions and the sources with their dtypes, on which last digits depend."""
    return str(sidecar["machine"].get("torch_cpu_capability")), sorted(sidecar["sources"])


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def report(found: Sequence[Compared], fresh: Path, published: Path) -> str:
    """Return the comparison in Markdown, with the machines of both runs."""
    new, old = read_sidecars(fresh), read_sidecars(published)
    name = next(name for name in old if name in new)
    lines = ["# A run compared with the published one", ""]
    for what, run in (("This run", new[name]), ("Published", old[name])):
        machine, git = run["machine"], run["git"]
        cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine.get('torch_cpu_capability')}"
        commit = f"commit {git['commit'][:10]}" if git else "no git checkout"
        lines.append(f"- {what}: {run['finished'][:10]}, {commit}, {cpu}, torch {run['versions']['torch']}")
    held = sum(one.holds for one in found)
    lines += [
        "",
        f"{held} of {len(found)} comparisons hold.",
        "",
        (__doc__ or "").split("\n\n", 1)[1].strip(),
        "",
    ]
    lines += ["| table | tolerance | numbers | within it | |", "|---|---|---:|---:|---|"]
    for one in found:
        told = "holds" if one.holds else "**differs**: " + (one.reason or "; ".join(one.apart))
        lines.append(f"| {one.table} | {one.rule} | {one.numbers:,} | {one.agree:,} | {told} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 if a comparison does not hold."""
    parser = argparse.ArgumentParser(prog="python -m asi_lens.reproduce.compare", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--profile", default="quick")
    parser.add_argument(
        "--report", type=Path, help=f"file of the report; {REPORT} beside the run if left out"
    )
    chosen = parser.parse_args(arguments)
    fresh, published = (place(chosen.model, chosen.profile) for place in (figures_dir, published_dir))
    try:
        found = compare(fresh, published)
        text = report(found, fresh, published)
        write_text(chosen.report or fresh / REPORT, text)
    except (AsiLensError, OSError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0 if all(one.holds for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
