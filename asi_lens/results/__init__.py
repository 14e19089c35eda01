"""What a notebook leaves on disk: tables, claims, figures, provenance. Rows are names of the room itself."""

from __future__ import annotations

import importlib
from typing import Any

_OTHERS = ("LOSSES", "VARIANTS", "columns", "frame", "read_rows", "write_rows")


def __getattr__(name: str) -> Any:
    """`results.RankRow` and its like, imported on first use: pandas comes with them."""
    if name.endswith("Row") or name in _OTHERS:
        return getattr(importlib.import_module("asi_lens.results.rows"), name)
    raise AttributeError(f"module 'asi_lens.results' has no attribute {name!r}")
