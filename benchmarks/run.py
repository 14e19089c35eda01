"""Run the benchmarks one after the other: `make bench`, or `python benchmarks/run.py [names]`.

What each prints goes into `benchmarks/results.json` as it comes, with the machine and the versions, and as
tables between the markers of `benchmarks/README.md`. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asi_lens.base.files import write_whole
from asi_lens.results import provenance

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.json", HERE / "README.md"

COMMANDS: dict[str, list[str]] = {
    "train_step": ["train_step.py"],
    "lorsa_step": ["lorsa_step.py"],
    "search_quality": ["search_quality.py"],
    "dictionaries": ["dictionaries.py"],
    "growth": ["growth.py", "--plot", str(HERE.parent / "docs" / "growth.png")],
    "scaling": ["scaling.py"],
    "harvest_speed": ["harvest.py", "speed"],
    "harvest_memory": ["harvest.py", "memory"],
    "counterfactuals": ["harvest.py", "counterfactuals"],
    "startup": ["startup.py"],
    "first_use": ["first_use.py"],
    "contexts": ["contexts.py"],
    "newcomer": ["newcomer.py"],
}
"""Scripts and their arguments, by name."""


def objects(text: str) -> list[Any]:
    """The JSON objects in what a script printed."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := text.find("{", at)) >= 0:
        value, at = decoder.raw_decode(text, at)
        found.append(value)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _train_step(results: list[Any]) -> str:
    head = ["", "tokens/s", "steps", "of the product", "times sparsify", "peak MiB", "FVU"]
    keys = ("tokens_per_s", "steps", "of_the_product", "times_sparsify", "peak_mib", "fvu")
    return table(head, [[name, *(one.get(key) for key in keys)] for name, one in results[0]["ways"].items()])


def _lorsa_step(results: list[Any]) -> str:
    head = ["", "positions/s", "times plain PyTorch", "FVU"]
    return table(head, [[name, *one.values()] for name, one in results[0]["ways"].items()])


def _search_quality(results: list[Any]) -> str:
    head = ["site", "search", "times exact", "coordinates", "mass found", "FVU", "silent", "delta LM loss"]

    def over_seeds(one: Mapping[str, Any]) -> str:
        return f"{one['mean']:.4f} ({one['least']:.4f} to {one['most']:.4f})"

    rows = []
    for one in results[:-1]:
        coordinates = ", ".join(map(str, sorted(set(one.get("coordinates", [])))))
        mass = f"{min(one.get('share_of_mass', [1.0])):.4%}"
        numbers = [over_seeds(one[name]) for name in ("fvu", "silent", "delta_lm_loss")]
        rows.append([one["site"], one["search"], one["times_exact"], coordinates, mass, *numbers])
    return table(head, rows)


def _dictionaries(results: list[Any]) -> str:
    kinds = results[0]["kinds"].items()
    head = ["", "time of a step, times TopK's", "peak MiB", "l0"]
    return table(head, [[name, one["times_topk"], one["peak_mib"], one["l0"]] for name, one in kinds])


def _growth(results: list[Any]) -> str:
    head = ["varied", "from, to", "seconds a step", "exponent", "peak MiB", "exponent"]
    rows: list[list[object]] = []
    for name, one in results[0]["exponents"].items():
        points = [point for point in results[0]["points"] if point["varied"] == name]
        least, most = points[0], points[-1]
        ends = {
            key: f"{least[key]:,.{digits}f}, {most[key]:,.{digits}f}"
            for key, digits in ((name, 0), ("seconds", 3), ("peak_mib", 0))
        }
        rows.append(
            [name, ends[name], ends["seconds"], one["seconds"], ends["peak_mib"], one["peak_mib"]],
        )
    return table(head, rows)


def _scaling(results: list[Any]) -> str:
    head = [
        "data x model",
        "peak MiB a rank",
        "of them weights and moments",
        "bytes a step",
        "by the formula",
        "seconds a step",
    ]
    return table(head, [list(one.values()) for one in results])


def _harvest_speed(results: list[Any]) -> str:
    head = ["a pass that", "tokens/s", "of the plain forward"]
    what = {
        "plain": "is the model's own forward",
        "harvest": "hands on one site of all layers",
        "moments": "accumulates their second moments",
        "store": "stores one site of the last layer",
    }
    rates, ratios = (results[0][key] for key in ("tokens_per_s", "ratio_to_plain"))
    return table(head, [[words, rates[name], ratios[name]] for name, words in what.items()])


def _harvest_memory(results: list[Any]) -> str:
    return table(["tokens", "peak MiB"], [list(one.values()) for one in results])


def _counterfactuals(results: list[Any]) -> str:
    return table(["layers", "seconds for all counterfactuals"], [list(one.values()) for one in results])


def _startup(results: list[Any]) -> str:
    found, name = results[0]["seconds"], results[0]["name"]
    told = {f"`{name}`, {part}": seconds for part, seconds in found["notebook"].items()}
    rows = {
        "`import asi_lens`": found["import"],
        **told,
        "all notebooks, two at a time": found["all notebooks"],
    }
    return table(["everything in the cache", "seconds"], [list(row) for row in rows.items()])


def _first_use(results: list[Any]) -> str:
    keys = ("megabytes", "load", "verification", "own_computation", "fingerprint", "forward_of_64_tokens")
    head = ["model", *(key.replace("_", " ") for key in keys)]
    return table(head, [[f"`{one['model']}`", *(one[key] for key in keys)] for one in results[0]["models"]])


def _contexts(results: list[Any]) -> str:
    one = results[0]
    head = ["tokens", "features", "k", "seconds", "MiB on top", "a card, seconds"]
    keys = ("tokens", "d_sae", "k", "features_s", "peak_mib", "card_s")
    return table(head, [[one[key] for key in keys]])


def _newcomer(results: list[Any]) -> str:
    return table(["step", "seconds"], [list(step) for step in results[0]["seconds"].items()])


TABLES: dict[str, Callable[[list[Any]], str]] = {
    "train_step": _train_step,
    "lorsa_step": _lorsa_step,
    "search_quality": _search_quality,
    "dictionaries": _dictionaries,
    "growth": _growth,
    "scaling": _scaling,
    "harvest_speed": _harvest_speed,
    "harvest_memory": _harvest_memory,
    "counterfactuals": _counterfactuals,
    "startup": _startup,
    "first_use": _first_use,
    "contexts": _contexts,
    "newcomer": _newcomer,
}


def record(name: str, results: list[Any]) -> None:
    """Put what a benchmark found into both files."""
    every = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    every[name] = {
        "results": results,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "git": provenance.git_state(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with write_whole(RESULTS) as temporary:
        temporary.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
    write_tables(every)


def write_tables(every: Mapping[str, Any]) -> None:
    """Put the tables between their markers in the README."""
    text = README.read_text(encoding="utf-8")
    for name, one in every.items():
        made = f"<!-- {name} -->\n{TABLES[name](one['results'])}\n<!-- /{name} -->"
        text, n = re.subn(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, made=made: made, text, flags=re.DOTALL
        )
        assert n == 1, f"{README} has {n} places for {name}"
    with write_whole(README) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """Run those that were asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*COMMANDS, []], metavar="name")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python that has the peers")
    args = parser.parse_args()
    for name in args.names or COMMANDS:
        script, *arguments = COMMANDS[name]
        command = [sys.executable, str(HERE / script)]
        print(f"== {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            if name == "train_step":  # the peers' environment need not have what reads the model
                activations = str(Path(folder, "rows.npy"))
                subprocess.run([*command, "--harvest", activations], check=True)
                command = [args.peers_python, *command[1:], "--rows", activations]
            if name == "lorsa_step":
                command[0] = args.peers_python
            done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True, check=True)
        record(name, objects(done.stdout))


if __name__ == "__main__":
    main()
