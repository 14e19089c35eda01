"""The wheels that the project needs on another machine, downloaded with pip in the versions of the lock."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from asi_lens.base.errors import DataError, FetchError, require
from asi_lens.base.offline import offline, refused

TORCH = "torch"
# pip takes a wheel for any of these; the newest wheels name glibc 2.28, older ones older versions.
_LINUX = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1", "linux")
# The first word of a platform tag: as markers of requirements call such a system.
_SYSTEMS = {
    "linux": {"platform_system": "Linux", "sys_platform": "linux", "os_name": "posix"},
    "macosx": {"platform_system": "Darwin", "sys_platform": "darwin", "os_name": "posix"},
    "win": {"platform_system": "Windows", "sys_platform": "win32", "os_name": "nt"},
}
_NO_WHEEL = re.compile(r"No matching distribution found for ([A-Za-z0-9._-]+)==")


def needed(lock: Path, project: Path, *, python: str, platform: str) -> dict[str, str]:
    """Return version by name of the project's dependencies and of theirs, in the versions of the lock.

    The packages are those of a Python version ("3.12") and a platform ("linux_x86_64"). Dependencies are read
    from the packages installed here, and the lock's lines with a condition. Raises DataError for a dependency
    that is not in the lock, and OptionError for a Python or platform that is not written so.
    """
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    system, machine = _system_of(python, platform)
    there = {**_SYSTEMS[system], "platform_machine": machine, "python_version": python}
    there["python_full_version"] = f"{python}.0"

    def holds(one: Requirement, extra: str = "") -> bool:
        return one.marker is None or one.marker.evaluate({**there, "extra": extra})

    lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    pins = [one for one in map(Requirement, lines) if holds(one)]
    locked = {canonicalize_name(one.name): next(iter(one.specifier)).version for one in pins}
    # What only other systems need is not installed here, so its dependencies are unknown: all of it counts.
    elsewhere = {name: locked[name] for name in (canonicalize_name(one.name) for one in pins if one.marker)}
    about = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    todo = [Requirement(line) for line in about["dependencies"]]
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        # Builds for cards come with torch, in the versions that it names.
        done = name in elsewhere or (name, str(one.extras)) in seen
        if done or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        if name not in locked:
            raise DataError(f"{name} is needed and not in {lock.name}")
        seen.add((name, str(one.extras)))
        found[name] = locked[name]
        for line in importlib.metadata.requires(name) or []:
            inner = Requirement(line)
            if any(holds(inner, extra) for extra in ("", *one.extras)):
                todo.append(inner)
    return dict(sorted((found | elsewhere).items()))


def download_wheels(
    versions: dict[str, str], folder: Path, *, python: str, platform: str, without: Sequence[str] = ()
) -> list[Path]:
    """Download wheels for a Python version ("3.12") and platform ("linux_x86_64"); returns their paths.

    torch comes with the packages that its wheel names (CUDA's, on Linux), all others alone, as `versions` is
    complete. A package without a wheel is built if it is pure Python. Raises FetchError with pip's last
    lines, and OptionError for a Python or platform that is not written so.
    """
    system, machine = _system_of(python, platform)
    if offline():
        raise refused(f"the wheels of {len(versions)} packages", "Download them elsewhere")
    tags = [f"{kind}_{machine}" for kind in _LINUX] if system == "linux" else [platform]
    target = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    target += [word for tag in tags for word in ("--platform", tag)]
    alone = {name: version for name, version in versions.items() if name not in (*without, TORCH)}
    while True:
        lines = [f"{name}=={version}" for name, version in alone.items()]
        done = _pip("download", "--no-deps", *target, "-d", str(folder), *lines)
        if done.returncode == 0:
            break
        missing = _NO_WHEEL.search(done.stderr)
        if missing is None or missing[1] not in alone:
            raise FetchError(f"pip could not download the wheels:\n{_last(done)}")
        _build(f"{missing[1]}=={alone.pop(missing[1])}", folder)
    if TORCH in versions and TORCH not in without:
        done = _pip("download", *target, "-d", str(folder), f"{TORCH}=={versions[TORCH]}")
        if done.returncode:
            raise FetchError(f"pip could not download torch:\n{_last(done)}")
    return sorted(folder.glob("*.whl"))


def _system_of(python: str, platform: str) -> tuple[str, str]:
    """Return the first word of a platform tag and its machine ("x86_64")."""
    require(re.fullmatch(r"3\.\d+", python) is not None, "python", python, "like '3.12'")
    system, _, machine = platform.partition("_")
    require(system in _SYSTEMS and bool(machine), "platform", platform, "like 'linux_x86_64'")
    return system, re.sub(r"^\d+_\d+_", "", machine)


def _build(line: str, folder: Path) -> None:
    """Build the wheel of a package that is offered as source only. Raises FetchError if it is not pure."""
    done = _pip("wheel", "--no-deps", "-w", str(folder), line)
    built = [path for path in folder.glob("*.whl") if path.name.startswith(_stem(line))]
    if done.returncode or not built:
        raise FetchError(f"{line} has no wheel and could not be built:\n{_last(done)}")
    if not built[0].name.endswith("-none-any.whl"):
        raise FetchError(f"{line} has no wheel for the other machine, and its own would only fit this one")


def _stem(line: str) -> str:
    name, _, version = line.partition("==")
    return f"{re.sub(r'[-_.]+', '_', name)}-{version}"


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(done.stderr.strip().splitlines()[-4:])
