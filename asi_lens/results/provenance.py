"""Provenance of numbers for a notebook's sidecar: versions, commit and machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asi_lens.base.paths import project_root
from asi_lens.base.threads import cores

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
"""Packages whose version can change a number or an image."""


def told_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters for a record: paths below the project relative to it, without the output folder."""
    return {key: _relative(value) for key, value in parameters.items() if key != "output_folder"}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Return the checkout's commit and whether the sources differ from it; None outside git.

    Changed figures and a changed README do not count, since a run writes them.
    """
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)figures", ":(exclude)README.md")
    return {"commit": commit, "dirty": bool(changed)}


def machine() -> dict[str, Any]:
    """Return processor, cores, memory (GiB) and the devices that torch can use, without the host name."""
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


def _relative(value: Any) -> Any:
    """Return `value` with paths below the project made relative, so that a record hides local folders."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(project_root()):
        return str(Path(value).relative_to(project_root()))
    return [_relative(one) for one in value] if isinstance(value, list | tuple) else value


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
