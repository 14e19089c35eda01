"""What is built and installed: the same bytes from the same files, a library that works without notebooks."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_project import ROOT

import asi_lens

PARTS = (
    "asi_lens",
    "notebooks",
    "parameters",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    ".gitignore",
)
EXAMPLE = """
import sys, torch, asi_lens as al
assert al.__file__.startswith(sys.argv[1]), al.__file__
rows = torch.randn(2000, 8) @ torch.randn(8, 24)
store = al.ActivationStore.from_tensor(rows)
sae = al.SparseAutoencoder(al.SAEConfig(d_in=24, d_sae=64, k=4))
al.initialize(sae, method="asi", spectrum=store.spectrum, d_init="auto", sample=store.sample(500))
al.Trainer(sae, al.TrainConfig(n_tokens=4000, batch_size=200)).fit(store, progress=False)
assert al.evaluate(sae, store).fvu < 0.9
sae.save("sae")
assert al.SparseAutoencoder.load("sae").d_sae == 64
from asi_lens.sae.browse import _template
assert _template()
"""


def built(source: Path, into: Path) -> dict[str, Path]:
    """The wheel and sdist of a source tree, by suffix."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(into)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.suffix: path for path in into.iterdir()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return built(ROOT, tmp_path_factory.mktemp("built"))


def test_the_same_files_make_the_same_bytes(wheel: dict[str, Path], tmp_path: Path) -> None:
    """From a copy elsewhere, with other times of its files."""
    (tmp_path / "source").mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, tmp_path / "source" / name)
    for path in (tmp_path / "source").rglob("*"):
        os.utime(path, (1e9, 1e9))
    for suffix, path in built(tmp_path / "source", tmp_path / "again").items():
        digests = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (path, wheel[suffix])]
        assert digests[0] == digests[1], path.name


def test_nothing_is_missing_and_nothing_too_much(wheel: dict[str, Path]) -> None:
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "asi_lens").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel[".whl"]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == source
    with tarfile.open(wheel[".gz"]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert source < names
    others = {name.split("/")[0] for name in names - source}
    assert others == {*PARTS, "PKG-INFO"} - {"asi_lens"}


def test_the_installed_wheel_works_alone(wheel: dict[str, Path], tmp_path: Path) -> None:
    """No checkout is near: the library trains, the command answers, and says what it needs for notebooks."""
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
    ]
    subprocess.run([*install, str(wheel[".whl"])], check=True)
    alone = {**os.environ, "PYTHONPATH": str(site), "ASI_LENS_CACHE": str(tmp_path / "cache")}
    away = tmp_path / "away"
    away.mkdir()

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=away, env=alone, capture_output=True, text=True)

    done = run(sys.executable, "-c", EXAMPLE, str(site))
    assert done.returncode == 0, done.stderr
    command = str(site / "bin" / "asi-lens")
    assert run(sys.executable, command, "--version").stdout == f"{asi_lens.__version__}\n"
    failed = run(sys.executable, command, "figures", "--profile", "smoke")
    assert failed.returncode == 1
    assert "there are no notebooks in" in failed.stderr
    assert "Traceback" not in failed.stderr
