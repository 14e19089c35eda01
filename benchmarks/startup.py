"""What stands before any work: importing the package, and notebooks whose data and runs are in the cache.

    python benchmarks/startup.py [--profile quick] [--notebook 04_dead_feature_curves] [--rounds 3]

`import asi_lens` in fresh processes; that notebook run headless (its parts: starting the kernel, its imports,
loading the model, all other cells, ending); all notebooks by `python -m asi_lens.reproduce --force --jobs 2`.
What is not in the cache yet is made first, in an untimed run: with an empty cache that takes an hour. Figures
of the profile are written anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from asi_lens.base.paths import figures_dir
from asi_lens.reproduce import EXECUTED

MODEL = "smollm2-135m"


def seconds_of(command: list[str]) -> float:
    """Wall time of a process that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def reproduce(profile: str, *more: str) -> list[str]:
    """The command that runs notebooks."""
    return [
        sys.executable,
        "-m",
        "asi_lens.reproduce",
        "--model",
        MODEL,
        "--profile",
        profile,
        *more,
    ]


def parts(executed: Path) -> dict[str, float]:
    """Seconds of a notebook that papermill ran, by what they went into."""
    notebook = json.loads(executed.read_text(encoding="utf-8"))
    timed = [
        ("".join(cell["source"]), cell["metadata"]["papermill"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and cell["metadata"].get("papermill", {}).get("duration") is not None
    ]
    whole = notebook["metadata"]["papermill"]
    begun, ended = (datetime.fromisoformat(whole[key]) for key in ("start_time", "end_time"))
    first, last = (
        datetime.fromisoformat(timed[i][1][key]) for i, key in ((0, "start_time"), (-1, "end_time"))
    )
    imports = sum(cell["duration"] for source, cell in timed if "import asi_lens" in source)
    model = sum(cell["duration"] for source, cell in timed if "load_model(" in source)
    return {
        "start": (first - begun).total_seconds(),
        "imports": imports,
        "model": model,
        "other cells": sum(cell["duration"] for _, cell in timed) - imports - model,
        "end": (ended - last).total_seconds(),
        "in all": whole["duration"],
    }


def main() -> None:
    """Print one JSON object; seconds are medians over rounds."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--notebook", default="04_dead_feature_curves")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    subprocess.run(reproduce(args.profile, "--jobs", "2"), check=True, stdout=sys.stderr)
    light = [seconds_of([sys.executable, "-c", "import asi_lens"]) for _ in range(args.rounds)]
    executed = figures_dir(MODEL, args.profile) / EXECUTED / f"{args.notebook}.ipynb"
    one = []
    for _ in range(args.rounds):
        seconds_of(reproduce(args.profile, "--force", "--notebooks", args.notebook))
        one.append(parts(executed))
    every = [seconds_of(reproduce(args.profile, "--force", "--jobs", "2")) for _ in range(2)]
    found = {
        "import": round(statistics.median(light), 2),
        "notebook": {key: round(statistics.median(part[key] for part in one), 1) for key in one[0]},
        "all notebooks": round(min(every)),
    }
    print(json.dumps({"profile": args.profile, "name": args.notebook, "seconds": found}, indent=1))


if __name__ == "__main__":
    main()
