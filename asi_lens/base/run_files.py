"""Commands that are given one YAML file and may run in several processes: `sae.run` and `harvest_run`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from asi_lens.base.errors import AsiLensError, DataError, OptionError, require, require_known
from asi_lens.base.ranks import Ranks, joined


@runtime_checkable
class RunFile(Protocol):
    """What such a file holds."""

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        ...

    @property
    def timeout_s(self) -> float | int:
        """How long a process waits for another."""
        ...


Config = TypeVar("Config", bound=RunFile)


def read_yaml(
    path: Path | str,
    known: Sequence[str],
    needed: Sequence[str],
    sections: Sequence[str],
    folders: Sequence[str],
) -> dict[str, Any]:
    """The keys and values of a file: `sections` hold keys and values too, `folders` are relative to it.

    Raises DataError for what is no such file, UnknownNameError for another key than those `known`,
    OptionError for one that is missing or no section.
    """
    import yaml

    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold keys and values")
    require_known(values, known, f"key in {path.name}")
    for key in needed:
        if key not in values:
            raise OptionError(f"{path.name} has no {key}")
    for key in sections:
        require(isinstance(values.get(key, {}), dict), key, values.get(key), "keys and values")
    return values | {key: path.parent / Path(str(values[key])).expanduser() for key in folders}


def require_machine(device: str, timeout_s: float | int) -> None:
    """Raise OptionError for a device or a time limit that cannot be."""
    require(device in ("cpu", "cuda"), "device", device, "'cpu' or 'cuda'")
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    require(number and timeout_s > 0, "timeout_s", timeout_s, "seconds above 0")


def device_here(device: str) -> str:
    """The GPU of this process among those of its machine, or the CPU."""
    if device != "cuda":
        return device
    import torch

    here = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    torch.cuda.set_device(here)  # or NCCL and kernels that name no GPU would all use the first one
    return here


def agree(ranks: Ranks, values: Mapping[str, object]) -> None:
    """Raise RankError, on every rank, where they run other versions or were given other files.

    Folders need not be the same: they may be mounted in different places.
    """
    names = ("asi_lens", "torch", "safetensors", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in names}}
    ranks.require_same("versions", versions)
    told = {key: value for key, value in values.items() if not isinstance(value, Path)}
    ranks.require_same("configurations", told)


def command(
    name: str,
    text: str | None,
    read: Callable[[Path], Config],
    run: Callable[[Config, Ranks, bool], object],
    arguments: Sequence[str] | None = None,
) -> int:
    """`python -m name file.yaml`, by `torchrun` too. Returns 0, or 1 after saying what is wrong."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=name, description=text, formatter_class=form)
    parser.add_argument("file", type=Path, help="the YAML file")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    given = parser.parse_args(arguments)
    try:
        config = read(given.file)
        with joined(config.device, config.timeout_s) as ranks:
            run(config, ranks, not given.quiet)
    except (AsiLensError, OSError) as error:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"{rank}{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
