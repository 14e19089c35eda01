"""The older name of `python -m asi_lens.activations`."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("asi_lens.activations", run_name="__main__")
