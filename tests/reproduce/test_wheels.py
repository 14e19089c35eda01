"""Which packages are needed, and how pip is asked for their wheels."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from asi_lens.base.errors import DataError, FetchError, OptionError
from asi_lens.base.paths import project_root
from asi_lens.reproduce import wheels
from asi_lens.reproduce.wheels import download_wheels, needed

VERSIONS = {"numpy": "2.0", "source-only": "0.5", "torch": "2.9"}


class Pip:
    """Stands in for pip: what it was asked, and an index where `source-only` has no wheel."""

    def __init__(self, built: str = "source_only-0.5-py3-none-any.whl") -> None:
        self.asked: list[tuple[str, ...]] = []
        self.built = built

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.asked.append(arguments)
        folder = Path(arguments[arguments.index("-d" if "-d" in arguments else "-w") + 1])
        lines = [word for word in arguments if "==" in word]
        if arguments[0] == "wheel":
            (folder / self.built).touch()
        elif "source-only==0.5" in lines:
            told = "ERROR: No matching distribution found for source-only==0.5\n"
            return subprocess.CompletedProcess([], 1, "", told)
        else:
            for line in lines:
                (folder / f"{line.replace('==', '-')}-py3-none-any.whl").touch()
        return subprocess.CompletedProcess([], 0, "", "")


@pytest.fixture
def get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    monkeypatch.delenv("ASI_LENS_OFFLINE", raising=False)

    def names(pip: Callable[..., object], **options: object) -> list[str]:
        monkeypatch.setattr(wheels, "_pip", pip)
        given = {"python": "3.12", "platform": "linux_x86_64", **options}
        return [path.name for path in download_wheels(VERSIONS, tmp_path, **given)]  # type: ignore[arg-type]

    return names


@pytest.mark.parametrize(
    ("python", "platform", "more"),
    [
        ("3.11", "linux_x86_64", set()),
        ("3.12", "linux_aarch64", {"aiohttp", "yarl", "multidict"}),
        ("3.13", "macosx_11_0_arm64", {"appnope"}),
        ("3.14", "win_amd64", {"colorama"}),
    ],
)
def test_what_the_project_needs_is_in_the_lock_and_no_tools_are_among_it(
    python: str, platform: str, more: set[str]
) -> None:
    root = project_root()
    found = needed(root / "requirements.lock", root, python=python, platform=platform)
    assert {name for name in ("aiohttp", "yarl", "multidict", "appnope", "colorama") if name in found} == more
    assert ("pexpect" in found) == (platform != "win_amd64")  # IPython needs it elsewhere
    assert {"torch", "transformer-lens", "transformers", "papermill", "pyzmq", "numpy"} <= found.keys()
    assert not {"ruff", "mypy", "pytest", "jupyterlab"} & found.keys()
    assert not [name for name in found if name.startswith(("nvidia", "triton"))]
    lock = (root / "requirements.lock").read_text()
    assert all(f"=={version}" in lock for version in found.values())


def test_a_lock_that_lacks_a_package_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("# none\nnumpy==1\n")
    with pytest.raises(DataError, match="is needed and not in lock"):
        needed(tmp_path / "lock", project_root(), python="3.11", platform="linux_x86_64")


def test_wheels_are_asked_for_the_other_machine(get: Callable[..., list[str]]) -> None:
    pip = Pip()
    found = get(pip, platform="linux_aarch64")
    assert found == [
        "numpy-2.0-py3-none-any.whl",
        "source_only-0.5-py3-none-any.whl",
        "torch-2.9-py3-none-any.whl",
    ]
    first, build, second, torch = pip.asked
    for asked in (first, second, torch):
        assert asked[asked.index("--python-version") + 1] == "3.12"
        assert "--only-binary=:all:" in asked
        assert "manylinux_2_28_aarch64" in asked
    assert "--no-deps" in second
    assert build[:2] == ("wheel", "--no-deps")
    assert "--no-deps" not in torch  # its CUDA packages come with it


def test_without_torch(get: Callable[..., list[str]]) -> None:
    assert get(Pip(), without=["torch"]) == ["numpy-2.0-py3-none-any.whl", "source_only-0.5-py3-none-any.whl"]


def test_a_source_that_is_not_pure_python_is_refused(get: Callable[..., list[str]]) -> None:
    with pytest.raises(FetchError, match=r"source-only==0\.5 has no wheel for the other machine"):
        get(Pip("source_only-0.5-cp311-cp311-linux_x86_64.whl"))


def test_pips_own_words_are_told(get: Callable[..., list[str]]) -> None:
    def down(*_: str) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no route to host\n")

    with pytest.raises(FetchError, match=r"could not download the wheels:\n(.|\n)*no route to host"):
        get(down)


@pytest.mark.parametrize(
    "option", [{"python": "3"}, {"python": "py312"}, {"platform": "amiga"}, {"platform": "linux"}]
)
def test_a_machine_that_is_not_written_so(get: Callable[..., list[str]], option: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=next(iter(option))):
        get(Pip(), **option)


def test_offline_pip_is_not_asked(get: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_OFFLINE", "1")
    with pytest.raises(FetchError, match="refuses the network"):
        get(lambda *_: pytest.fail("asked pip"))
