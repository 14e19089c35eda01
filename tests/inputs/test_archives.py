"""archives.py: what is taken out of wheels, zips, sdists and Debian packages, and what is refused."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from asi_lens.base.errors import FetchError
from asi_lens.inputs import archives


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def _tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "name", ["../evil.txt", "a/../../evil.txt", "/etc/evil.txt", "C:/evil.txt", "..\\evil.txt", "\\evil.txt"]
)
def test_paths_that_climb_out_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in" / "here"
    folder.mkdir(parents=True)
    info = tarfile.TarInfo(name)
    hostile = {
        "zip": _zip(tmp_path / "a.whl", {"good.txt": b"1", name: b"evil"}),
        "tar": _tar(tmp_path / "a.tar.gz", [(tarfile.TarInfo("good.txt"), b"1"), (info, b"evil")]),
    }
    for archive in hostile.values():
        for pattern in ("*", "good.txt"):  # even when only a harmless member is wanted
            with pytest.raises(FetchError, match="leads out of the folder"):
                archives.unpack(archive, pattern, None, folder)
    assert list(folder.iterdir()) == []
    assert not list(tmp_path.rglob("evil.txt"))
    with pytest.raises(FetchError, match="leads out of the folder"):
        archives.unpack(_zip(tmp_path / "b.whl", {"good.txt": b"1"}), "good.txt", name, folder)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    link = tarfile.TarInfo("data.txt")
    link.type, link.linkname = kind, "/etc/passwd"
    with pytest.raises(FetchError, match="link or device"):
        archives.unpack(_tar(tmp_path / "a.tar.gz", [(link, b"")]), "data.txt", None, tmp_path)
    assert not (tmp_path / "data.txt").exists()


def test_zip_symlinks_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("data.txt")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(FetchError, match="is a link"):
        archives.unpack(tmp_path / "a.whl", "data.txt", None, tmp_path)


def test_unpack_joins_reaches_into_inner_zips_and_keeps_paths(tmp_path: Path) -> None:
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("table.csv", "text\nhello\n")
    archive = _zip(
        tmp_path / "a.whl",
        {"pkg/data.zip": inner.getvalue(), "pkg/b.py": b"b", "pkg/sub/a.py": b"a", "pkg/c.txt": b"c"},
    )
    out = tmp_path / "out"
    out.mkdir()
    assert archives.unpack(archive, "pkg/data.zip!table.csv", "t.csv", out) == [out / "t.csv"]
    assert (out / "t.csv").read_text() == "text\nhello\n"
    archives.unpack(archive, "pkg/*.py", None, out)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()) == [
        "pkg/b.py",
        "pkg/sub/a.py",
        "t.csv",
    ]
    archives.unpack(archive, "pkg/b.py", "joined", out)
    archives.unpack(archive, "pkg/c.txt", "joined", out)
    assert (out / "joined").read_bytes() == b"bc"
    with pytest.raises(FetchError, match=r"no member 'pkg/d\.txt'"):
        archives.unpack(archive, "pkg/d.txt", None, out)


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    for name in ("a.whl", "a.tar.gz"):
        (tmp_path / name).write_bytes(b"not an archive")
        with pytest.raises(FetchError, match=name.replace(".", r"\.")):
            archives.unpack(tmp_path / name, "*", None, tmp_path)


def _ar(*members: tuple[str, bytes]) -> bytes:
    parts = [b"!<arch>\n"]
    for name, data in members:
        parts += [f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode(), data]
        parts += [b"\n"] * (len(data) % 2)
    return b"".join(parts)


@pytest.mark.parametrize("mode", ["xz", "gz"])
def test_debian_packages(tmp_path: Path, mode: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{mode}") as tar:  # type: ignore[call-overload]
        for name in ("./usr/share/b.wav", "./usr/share/silence/a.wav", "./usr/share/copyright"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"abc"))
    path = tmp_path / "a.deb"
    data = (f"data.tar.{mode}", buffer.getvalue())
    path.write_bytes(_ar(("debian-binary", b"2.0"), ("control.tar.xz/", b"odd"), data))
    written = archives.unpack(path, "./usr/share/[a-rt-z]*.wav", None, tmp_path / "out")
    assert written == [tmp_path / "out" / "usr" / "share" / "b.wav"]
    assert written[0].read_bytes() == b"abc"
    for broken in (b"", b"PK\3\4", _ar(("debian-binary", b"2.0\n")), path.read_bytes()[:-9], _ar(data)[:50]):
        path.write_bytes(broken)
        with pytest.raises(FetchError, match=r"a\.deb"):
            archives.unpack(path, "*", None, tmp_path / "out")
