"""Commands that read one YAML file and can run in several processes: `sae.run` and `harvest_run`."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from asi_lens import __version__
from asi_lens.base.errors import AsiLensError, OptionError, require, require_known
from asi_lens.base.files import read_yaml_mapping
from asi_lens.base.ranks import Ranks, joined


@runtime_checkable
class RunFile(Protocol):
    """Options that every run file has."""

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        ...

    @property
    def timeout_s(self) -> float | int:
        """Seconds that a process waits for another process."""
        ...


# Numbers without a point or without a sign in the exponent are text for YAML 1.1.
_EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
Config = TypeVar("Config", bound=RunFile)


def read_yaml(
    path: Path | str,
    known: Sequence[str],
    needed: Sequence[str],
    sections: Sequence[str],
    folders: Sequence[str],
) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Values under `sections` must be mappings. Values under `folders` are returned as paths relative to the
    file's folder.

    Raises DataError for a file that cannot be read or is not a mapping, UnknownNameError for a key that is
    not in `known`, and OptionError for a missing key of `needed`, a section that is not a mapping, or a
    number that YAML reads as text.
    """
    path = Path(path)
    values = read_yaml_mapping(path)
    require_known(values, known, f"key in {path.name}")
    for key in needed:
        if key not in values:
            raise OptionError(f"{path.name} has no key {key!r}; add it")
    _require_numbers(values, [key for key in values if key not in folders])
    for key in sections:
        require(isinstance(values.get(key, {}), dict), key, values.get(key), "keys and values")
    for key in folders:
        require(isinstance(values[key], str) and values[key] != "", key, values[key], "the path of a folder")
    return values | {key: path.parent / Path(str(values[key])).expanduser() for key in folders}


def _require_numbers(values: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise OptionError for a number that YAML reads as text, such as 8e-4."""
    for key in keys:
        value = values[key]
        if isinstance(value, dict):
            _require_numbers(value, list(value))
        elif isinstance(value, str) and _EXPONENT.fullmatch(value):
            raise OptionError(
                f"{key}={value!r} is not allowed: YAML reads {value} as text; write {float(value)!r}"
                + (f" or, for a whole number, {float(value):_.0f}" if float(value) >= 1 else "")
            )


def require_machine(device: str, timeout_s: float | int) -> None:
    """Raise OptionError for an invalid device or time limit."""
    require(device in ("cpu", "cuda"), "device", device, "'cpu' or 'cuda'")
    number = isinstance(timeout_s, int | float) and not isinstance(timeout_s, bool)
    require(number and timeout_s > 0, "timeout_s", timeout_s, "seconds above 0")


def device_here(device: str) -> str:
    """Return this process's device: "cuda:<LOCAL_RANK>", which becomes torch's current GPU, or "cpu".

    Raises OptionError if this PyTorch finds no GPU, or too few.
    """
    if device != "cuda":
        return device
    import torch

    here = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if torch.device(here).index >= there:
        found = f"PyTorch {torch.__version__} finds {f'{there} GPUs' if there else 'no GPU'} on this machine"
        raise OptionError(f"device={here!r} is not allowed: {found}; take device: cpu, or fewer processes")
    torch.cuda.set_device(here)  # else NCCL and kernels without a device would use GPU 0
    return here


def agree(ranks: Ranks, values: Mapping[str, object]) -> None:
    """Raise RankError on every rank if the ranks have different versions or different options.

    Paths are not compared: folders may be mounted in different places.
    """
    names = ("torch", "safetensors", "numpy")
    # A checkout that is only on the path has no installed version.
    versions = {"asi_lens": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in names}
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
    """Run `python -m name file.yaml`, also under `torchrun`. Returns 0, or 1 after printing the error."""
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
