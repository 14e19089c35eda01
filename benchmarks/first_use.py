"""What the first use of a model costs: load, fingerprint of every byte, verification of its sites.

    python benchmarks/first_use.py [smollm2-135m gemma3-270m ...]

Names are those of `load_model`. The first load of a `.gguf` file (dequantizing) is not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from asi_lens.inputs import models, structure, verify
from asi_lens.inputs.fingerprint import model_fingerprint


def seconds(work: Callable[[], Any], rounds: int = 1) -> float:
    """The shortest of some rounds."""
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return round(min(found), 3)


def first_use(name: str) -> dict[str, Any]:
    """Seconds of each part for one model, in float32 on the CPU."""
    model = models.load_model(name, dtype="float32", device="cpu")
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    load = seconds(lambda: models.load_model(name, dtype="float32", device="cpu"))
    ids = torch.zeros(1, 64, dtype=torch.long)
    return {
        "model": name,
        "megabytes": round(size / 1e6),
        "load": load,
        "verification": seconds(lambda: verify.verification(model)),
        "own_computation": seconds(lambda: verify.own_error(model)),
        "fingerprint": seconds(lambda: model_fingerprint(model), 5),
        "structure": seconds(lambda: structure.state_of(model), 5),
        "forward_of_64_tokens": seconds(lambda: models.forward(model, ids, {}), 5),
    }


def main() -> None:
    """Print one JSON object."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", default=["smollm2-135m", "gemma3-270m"], metavar="name")
    print(json.dumps({"models": [first_use(name) for name in parser.parse_args().names]}, indent=1))


if __name__ == "__main__":
    main()
