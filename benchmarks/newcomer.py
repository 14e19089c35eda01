"""A newcomer's path, timed: from a clone to a first figure, a first dictionary and a feature's card.

    python benchmarks/newcomer.py

Everything happens in a fresh clone with an empty home and an empty cache; pip's own index is the machine's.
The code is that of `docs/index.md`, block by block.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ["make", "figures", "NOTEBOOKS=00_explore"]
CARD = ["asi-lens", "browse", "runs/asi/sae", "--model", "smollm2-135m", "--corpus", "news-en"]
_BLOCK = re.compile(r"^## (.+?)$|^```python\n(.*?)^```", re.M | re.S)
_TIMED = """
import time
code, seconds, names = {code!r}, {{}}, {{}}
for title, block in code:
    begin = time.perf_counter()
    exec(block, names)
    seconds[title] = round(time.perf_counter() - begin, 1)
print("SECONDS", seconds)
"""


def blocks() -> list[tuple[str, str]]:
    """Title and code of each block of Python on the first page of the documentation."""
    title, found = "", []
    for match in _BLOCK.finditer((ROOT / "docs" / "index.md").read_text(encoding="utf-8")):
        title = match[1] or title
        if match[2]:
            found.append((title, match[2]))
    return found


def run(command: list[str], clone: Path, environment: dict[str, str]) -> tuple[float, str]:
    """Seconds and output of a command in the clone."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return round(time.perf_counter() - begin, 1), done.stdout


def main() -> None:
    """Print one JSON object."""
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone, home = Path(folder, "project"), Path(folder, "home")
        home.mkdir()
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        path = f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"
        # What this process was told about caches and folders is not a newcomer's.
        given = {k: v for k, v in os.environ.items() if not k.startswith(("ASI_LENS_", "PYTHON", "XDG_"))}
        environment = {**given, "HOME": str(home), "PATH": path}
        seconds = {"make setup": run(["make", "setup"], clone, environment)[0]}
        seconds[" ".join(FIGURE)] = run(FIGURE, clone, environment)[0]
        code = _TIMED.format(code=blocks())
        whole, printed = run([str(clone / ".venv" / "bin" / "python"), "-c", code], clone, environment)
        parts = json.loads(printed.rpartition("SECONDS")[2].replace("'", '"'))
        seconds |= parts
        seconds["imports"] = round(whole - sum(parts.values()), 1)
        seconds[" ".join(CARD[:2])] = run(CARD, clone, environment)[0]
        seconds["all"] = round(sum(seconds.values()), 1)
    print(json.dumps({"seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
