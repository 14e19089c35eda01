"""The short name of `python -m asi_lens.experiments.diagnose`."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("asi_lens.experiments.diagnose", run_name="__main__")
