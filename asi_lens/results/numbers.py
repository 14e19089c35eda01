"""Measured numbers of verdicts, with their spread, and their text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asi_lens.base.errors import OptionError, require


@dataclass(frozen=True)
class Number:
    """One measured number of a verdict, with its spread.

    Raises OptionError for a number that is not finite, for only one of `low` and `high`, and for `low` above
    `high`.
    """

    name: str
    """Name of the measured quantity, such as `attn_out` or `random, silent held out`."""
    value: float
    low: float | None = None
    """Lower end of the spread; None if there is only one value."""
    high: float | None = None
    """Upper end of the spread."""
    percent: bool = False
    """Whether `value`, a share of 1, is shown in percent."""

    def __post_init__(self) -> None:
        for key in ("value", "low", "high"):
            given = getattr(self, key)
            require(given is None or math.isfinite(given), f"{self.name}: {key}", given, "finite")
        ends = (self.low, self.high)
        half = (self.low is None) != (self.high is None)
        if half or (self.low is not None and self.high is not None and self.low > self.high):
            raise OptionError(f"{self.name}: low and high={ends!r} are not allowed; give both, low first")

    @property
    def text(self) -> str:
        """Return the number and its spread: `34.6 % (33.9 to 35.2 %)`, or `0.51` (3 significant digits)."""
        return f"{self.middle} ({self.range})" if self.range else self.middle

    @property
    def middle(self) -> str:
        """Return the number without its spread: `34.6 %`."""
        return self._told()[0] + self._unit

    @property
    def range(self) -> str:
        """Return only the spread: `33.9 to 35.2 %`; "" if there is no spread."""
        told = self._told()
        return f"{told[1]} to {told[2]}{self._unit}" if len(told) == 3 else ""

    @property
    def _unit(self) -> str:
        return " %" if self.percent else ""

    def _told(self) -> list[str]:
        values = [value for value in (self.value, self.low, self.high) if value is not None]
        return [_fixed(100 * value, 1) for value in values] if self.percent else _significant(values)


def _significant(values: Sequence[float]) -> list[str]:
    """Return all values as text with the same decimals: enough for 3 significant digits of the largest.

    Decimals that are 0 in all values are left out.
    """
    largest = max(abs(value) for value in values)
    decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 0
    while decimals and all(_fixed(value, decimals).endswith("0") for value in values):
        decimals -= 1
    return [_fixed(value, decimals) for value in values]


def _fixed(value: float, decimals: int) -> str:
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"  # + 0.0: no minus before a zero
