"""All commands behind one name: `asi-lens COMMAND ...`, or `python -m asi_lens COMMAND ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """A command: the module whose `main` runs it, what it does, and an example of its arguments."""

    module: str
    does: str
    example: str


COMMANDS = {
    "figures": Command(
        "reproduce.__main__",
        "run the notebooks that are out of date and build the gallery",
        "--model smollm2-135m --notebooks 01,04",
    ),
    "harvest": Command("activations.__main__", "store activations, by a YAML file", "harvest.yaml"),
    "train": Command("sae.__main__", "train a dictionary, by a YAML file", "run.yaml"),
    "diagnose": Command(
        "experiments.diagnose",
        "tell what dictionaries of a model will suffer from, before any is trained",
        "smollm2-135m news-en --features 16384",
    ),
    "verify": Command("inputs.__main__", "check a model's numbers against the plain model", "smollm2-135m"),
    "browse": Command(
        "lorsa.browse",
        "write a page of cards of a dictionary's features, or of a Lorsa's units",
        "runs/asi/sae --model smollm2-135m --corpus news-en",
    ),
    "bundle": Command(
        "reproduce.bundle",
        "pack everything for a machine without a network, check it, use it there",
        "make away --profile quick",
    ),
}
"""Commands by name, each also a module command (`python -m asi_lens.<module>`)."""


def usage() -> str:
    """Return the text of `asi-lens --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.does}" for name, command in COMMANDS.items()]
    examples = [f"  asi-lens {name} {command.example}" for name, command in COMMANDS.items()]
    last = "`asi-lens COMMAND --help` shows a command's own options."
    return "\n".join(["usage: asi-lens COMMAND ...", "", *lines, "", "Examples:", *examples, "", last])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command named first and return its exit status; 2 for a command that does not exist."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    name, *rest = given
    if name == "--version":
        from asi_lens import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        from asi_lens.base.errors import unknown_name

        print(f"asi-lens: {unknown_name('command', name, COMMANDS)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"asi_lens.{COMMANDS[name].module}").main(rest))


if __name__ == "__main__":
    raise SystemExit(main())
