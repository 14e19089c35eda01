"""Where numbers come from: `run.json` beside the tables of one model and profile.

For each notebook the parameters, seeds, fingerprints of weights and text, package versions, git
commit, machine and wall time; for each figure its title, caption, and why an image is missing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asi_lens.base.errors import CacheError, DataError
from asi_lens.base.files import cache_key, locked, write_whole
from asi_lens.base.paths import project_root
from asi_lens.base.threads import cores

RUN_FILE = "run.json"
_FORMAT = 1
PACKAGES = (
    "torch",
    "transformers",
    "transformer-lens",
    "tokenizers",
    "numpy",
    "pandas",
    "plotly",
    "kaleido",
    "gguf",
    "safetensors",
)
"""Packages whose version can change a number or a picture."""


def read_run(folder: Path | str) -> dict[str, Any]:
    """The content of `folder/run.json`, or an empty one.

    Raises CacheError if the file is no JSON or of another format: delete it and run again.
    """
    path = Path(folder) / RUN_FILE
    if not path.exists():
        return {"format": _FORMAT, "notebooks": {}, "figures": {}}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["format"] == _FORMAT and {"notebooks", "figures"} <= run.keys():
            return run
    except (ValueError, TypeError, KeyError):
        pass
    raise CacheError(f"{path} is damaged or from another version; delete it and run again")


def record_run(
    folder: Path | str,
    notebook: str,
    *,
    parameters: Mapping[str, Any],
    sources: Mapping[str, str] | None = None,
    seeds: list[int] | None = None,
) -> None:
    """Record how a notebook made its tables (its last cell calls this).

    `sources` names what went in with its fingerprint, as `{"weights smollm2-135m (4-bit weights,
    dequantised)": "9f3c...", "corpus news-en": "77ab..."}`; seeds default to `parameters["seed"]`.
    Folders below the project are written relative to it.
    """
    parameters = {key: _relative(value) for key, value in parameters.items() if key != "output_folder"}
    if seeds is None:
        seeds = [parameters["seed"]] if "seed" in parameters else []
    facts = {
        "parameters": parameters,
        "seeds": seeds,
        "sources": dict(sources or {}),
        "versions": versions(),
        "git": git_state(),
        "machine": machine(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }

    def change(run: dict[str, Any]) -> None:
        old = run["notebooks"].get(notebook, {})
        if sources is None:  # the runner knows no fingerprints: keep what the notebook told
            facts["sources"] = old.get("sources", {})
        run["notebooks"][notebook] = {**old, **facts}

    _update(folder, change)


def record_wall_time(folder: Path | str, notebook: str, seconds: float) -> None:
    """Record how long a notebook took; the longest under its parameters is kept beside the last.

    A run from warm caches takes seconds; the longest one tells what the numbers cost.
    """

    def change(run: dict[str, Any]) -> None:
        entry = run["notebooks"].setdefault(notebook, {})
        wall = round(seconds, 1)
        key = cache_key(parameters=entry.get("parameters"), sources=entry.get("sources"))
        same = entry.get("timed_key") == key
        longest = max(wall, entry.get("longest_wall_time_s", 0.0)) if same else wall
        entry |= {"wall_time_s": wall, "longest_wall_time_s": longest, "timed_key": key}

    _update(folder, change)


def record_figure(
    folder: Path | str, stem: str, *, title: str, subtitle: str, caption: str, png: bool, reason: str
) -> None:
    """Record that figure `stem` was written; `reason` says why its PNG was not."""
    entry = {"title": title, "subtitle": subtitle, "caption": caption, "png": png, "reason": reason}
    _update(folder, lambda run: run["figures"].__setitem__(stem, entry))


def forget_figure(folder: Path | str, stem: str) -> None:
    """Take a figure that is no longer made out of `run.json`."""
    _update(folder, lambda run: run["figures"].pop(stem, None))


def versions() -> dict[str, str]:
    """Version of Python and of each of `PACKAGES` that is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout and whether sources differ from it; None outside git.

    Figures and README do not count as differing: they are what a run makes.
    """
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)figures", ":(exclude)README.md")
    return {"commit": commit, "dirty": bool(changed)}


def machine() -> dict[str, Any]:
    """Processor, cores, memory (GiB) and what torch can use of them. No host name."""
    import torch

    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "system": platform.system(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def _update(folder: Path | str, change: Callable[[dict[str, Any]], Any]) -> None:
    path = Path(folder) / RUN_FILE
    with locked(path.with_name(".run")):
        run = read_run(folder)
        change(run)
        try:
            text = json.dumps(run, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: only JSON values can be recorded ({error})") from error
        with write_whole(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _relative(value: Any) -> Any:
    """Paths below the project without its folder, so that `run.json` tells nothing of the machine."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(project_root()):
        return str(Path(value).relative_to(project_root()))
    return list(value) if isinstance(value, tuple) else value


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(project_root()), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None
