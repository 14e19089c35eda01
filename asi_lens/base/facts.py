"""Short tables of facts, as a notebook shows an object at the end of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from asi_lens.base.errors import require

MOST_FACTS = 12
"""Largest number of rows of a table."""
_LONGEST = 300
"""Characters of a value; the rest is cut off."""


def facts_html(title: str, facts: Mapping[str, object]) -> str:
    """Return a title and a table of two columns as HTML, all text escaped. Facts that are None have no row.

    No color is set, so that light and dark themes show the table in their own colors.
    Raises OptionError for more than 12 facts.
    """
    facts = {name: value for name, value in facts.items() if value is not None}
    require(len(facts) <= MOST_FACTS, "facts", list(facts), f"at most {MOST_FACTS}")
    left = 'style="text-align:left;vertical-align:top"'
    rows = "".join(
        f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(_text(value))}</td></tr>"
        for name, value in facts.items()
    )
    return f"<div><strong>{escape(title)}</strong><table><tbody>{rows}</tbody></table></div>"


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."
