"""Files that a notebook writes: tables, claims, figures, provenance. Row types are names of this package."""

from __future__ import annotations

import importlib
from typing import Any

_OTHERS = ("LOSSES", "VARIANTS", "columns", "frame", "left_out", "read_rows", "write_rows")


def __getattr__(name: str) -> Any:
    """Return a row type such as `results.RankRow`, imported on first use (the import loads pandas)."""
    if name.endswith("Row") or name in _OTHERS:
        return getattr(importlib.import_module("asi_lens.results.rows"), name)
    raise AttributeError(f"module 'asi_lens.results' has no attribute {name!r}")
