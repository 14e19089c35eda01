"""debian.py: a stand-in for apt-get puts a file where the real one would."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from asi_lens.base.errors import FetchError
from asi_lens.inputs.debian import download_deb
from asi_lens.inputs.download import PackageFile

DATA = b"a Debian package"
FILE = PackageFile("sounds", "1.6-1", "sounds_1.6-1_all.deb", hashlib.sha256(DATA).hexdigest(), len(DATA))


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    program = folder / "apt-get"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("ASI_LENS_OFFLINE", raising=False)


def test_downloads_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        tmp_path / "bin", monkeypatch, f'echo "$@" >> {tmp_path}/asked; printf "%s" "{DATA.decode()}" > x.deb'
    )
    path = download_deb(FILE, tmp_path / "archives")
    assert path.read_bytes() == DATA
    assert path.name == f"{FILE.sha256[:12]}-{FILE.filename}"
    assert download_deb(FILE, tmp_path / "archives") == path
    assert (tmp_path / "asked").read_text().splitlines() == ["download -q sounds=1.6-1"]
    path.write_bytes(b"another")  # a damaged copy is fetched again
    assert download_deb(FILE, tmp_path / "archives").read_bytes() == DATA


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "echo 'E: Version 1.6-1 was not found' >&2; exit 100",
            "Version 1.6-1 was not found.*apt-get update",
        ),
        ("true", "did not fetch"),
        ("echo other > x.deb", "not the file that was pinned"),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str) -> None:
    stand_in(tmp_path / "bin", monkeypatch, script)
    with pytest.raises(FetchError, match=told):
        download_deb(FILE, tmp_path / "archives")
    assert not list((tmp_path / "archives").glob("*.deb")) if (tmp_path / "archives").exists() else True


def test_without_apt_or_network_it_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ASI_LENS_OFFLINE", raising=False)
    target = tmp_path / "archives" / f"{FILE.sha256[:12]}-{FILE.filename}"
    with pytest.raises(FetchError, match="does not have") as caught:
        download_deb(FILE, tmp_path / "archives")
    assert str(target) in str(caught.value)
    monkeypatch.setenv("ASI_LENS_OFFLINE", "1")
    with pytest.raises(FetchError, match="refuses the network") as caught:
        download_deb(FILE, tmp_path / "archives")
    assert str(target) in str(caught.value)
