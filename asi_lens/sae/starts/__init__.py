"""Where dictionaries can begin: one file for each way of drawing directions.

A new start is a file with a function under `@start`, and its name in the import below.
"""

from __future__ import annotations

from asi_lens.sae.starts import asi, asi_authors, orthogonal, random
from asi_lens.sae.starts.start import STARTS, Draw, Start, find_start

__all__ = ["STARTS", "Draw", "Start", "asi", "asi_authors", "find_start", "orthogonal", "random"]
