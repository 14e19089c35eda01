"""Starts of dictionaries: a file for each way of drawing the initial directions.

To add a start, write a file with a function under `@start` and add its name to the import below.
"""

from __future__ import annotations

from asi_lens.sae.starts import asi, asi_authors, asi_datapoint, datapoint, orthogonal, random, variance
from asi_lens.sae.starts.start import STARTS, Draw, Start, find_start

__all__ = [
    "STARTS",
    "Draw",
    "Start",
    "asi",
    "asi_authors",
    "asi_datapoint",
    "datapoint",
    "find_start",
    "orthogonal",
    "random",
    "variance",
]
