"""Parts and their manifest: what comes back, and what is told of parts that are missing or changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from asi_lens.base.errors import CacheError, DataError
from asi_lens.reproduce import parts


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of three files in parts of 400 bytes; the contents are as random as bytes can be."""
    root, folder = tmp_path / "root", tmp_path / "bundle"
    (root / "deep").mkdir(parents=True)
    folder.mkdir()
    (root / "a").write_bytes(os.urandom(1500))
    (root / "deep" / "b").write_bytes(b"")
    (root / "c.lock").write_bytes(b"a lock is not taken along")
    (root / "c").write_bytes(os.urandom(10))
    about = parts.write_parts(folder, parts.files_below(root, "cache/x"), 400)
    parts.write_manifest(folder, about)
    return folder


def unpack(bundle: Path, into: Path) -> dict[str, bytes]:
    parts.unpack_parts(bundle, parts.read_manifest(bundle), into)
    found = (path for path in sorted(into.rglob("*")) if path.is_file() and path.name != "unpacked.json")
    return {path.relative_to(into).as_posix(): path.read_bytes() for path in found}


def test_the_files_come_back_in_parts_of_the_size(bundle: Path, tmp_path: Path) -> None:
    manifest = parts.read_manifest(bundle)
    sizes = [part["size"] for part in manifest["parts"]]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {400}
    assert 0 < sizes[-1] <= 400
    parts.check_parts(bundle, manifest)
    found = unpack(bundle, tmp_path / "into")
    assert list(found) == ["cache/x/a", "cache/x/c", "cache/x/deep/b"]
    assert all((tmp_path / "root" / name[8:]).read_bytes() == data for name, data in found.items())


def test_unpacking_again_does_nothing_and_never_writes_into_another_folder(
    bundle: Path, tmp_path: Path
) -> None:
    unpack(bundle, tmp_path / "into")
    (bundle / "part-001.tar.gz").unlink()  # it is not needed any more
    unpack(bundle, tmp_path / "into")
    (tmp_path / "mine").mkdir()
    with pytest.raises(CacheError, match="mine holds something else than this bundle"):
        unpack(bundle, tmp_path / "mine")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "part-001.tar.gz is missing"),
        (cut, r"part-001.tar.gz has 399 bytes, not 400"),
        (flip, r"part-001.tar.gz has sha256 [0-9a-f]{64}, not [0-9a-f]{64}"),
    ],
)
def test_a_part_that_is_not_as_it_was_is_named(
    bundle: Path, damage: Callable[[Path], None], told: str
) -> None:
    damage(bundle / "part-001.tar.gz")
    with pytest.raises(CacheError, match=rf"bundle is not as it was made; copy these again:\n  {told}"):
        parts.check_parts(bundle, parts.read_manifest(bundle))


def change(bundle: Path, **changes: object) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, **changes}))


def test_parts_of_two_bundles_do_not_mix(bundle: Path, tmp_path: Path) -> None:
    manifest = parts.read_manifest(bundle)
    stamp = {"size": 3, "sha256": "0" * 64}
    change(bundle, files={**manifest["files"], "cache/y": stamp})
    with pytest.raises(CacheError, match=r"the parts in .*bundle lack cache/y"):
        unpack(bundle, tmp_path / "into")
    change(bundle, files={name: one for name, one in manifest["files"].items() if name != "cache/x/a"})
    with pytest.raises(CacheError, match="do not belong together"):
        unpack(bundle, tmp_path / "into")
    change(bundle, files=dict.fromkeys(manifest["files"], stamp))
    with pytest.raises(CacheError, match="cache/x/a has another sha256"):
        unpack(bundle, tmp_path / "into")
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not a whole bundle"),
        ("[]", "is not a whole bundle"),
        ('{"format": 1, "parts": [{"file": "../x", "size": 1, "sha256": ""}], "files": {}}', "leads out of"),
        ('{"format": 9, "parts": [], "files": {}}', "has another format than 1; make the bundle anew"),
    ],
)
def test_a_manifest_that_cannot_be_used(bundle: Path, text: str, told: str) -> None:
    (bundle / "bundle.json").write_text(text)
    with pytest.raises(DataError, match=told):
        parts.read_manifest(bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a whole bundle"):
        parts.read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", ""])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(DataError, match="leads out"):
        parts.write_parts(tmp_path, {name: tmp_path / "a"}, 100)
