"""Small results on disk: computed once, keyed by everything, never half there."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from asi_lens.base.cache import MANIFEST, cached_folder, cached_json, cached_jsons
from asi_lens.base.errors import CacheError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    return tmp_path


def test_computed_once_per_key() -> None:
    calls = []
    for key in ({"a": 1}, {"a": 1}, {"a": 2}):
        assert cached_json("x", key, lambda key=key: calls.append(key) or {"r": key["a"]}) == {"r": key["a"]}
    assert calls == [{"a": 1}, {"a": 2}]


def test_numbers_come_back_exactly() -> None:
    values = {"third": 1 / 3, "tiny": 5e-324, "none": None}
    cached_json("x", {"n": 1}, lambda: values)
    assert cached_json("x", {"n": 1}, lambda: pytest.fail("computed again")) == values


def test_a_failed_computation_leaves_nothing(own_cache: Path) -> None:
    def fail() -> object:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_json("x", {"a": 1}, fail)
    assert list(own_cache.glob("x/*.json")) == []
    assert cached_json("x", {"a": 1}, lambda: 7) == 7


@pytest.mark.parametrize("content", ["", '{"key": {"a": 1}, "resul', "[]", "{}"])
def test_a_damaged_file_is_named(own_cache: Path, content: str) -> None:
    cached_json("x", {"a": 1}, lambda: 7)
    (path,) = own_cache.glob("x/*.json")
    path.write_text(content)
    with pytest.raises(CacheError, match=path.name):
        cached_json("x", {"a": 1}, lambda: 7)


def _slow(folder: str) -> int:
    def compute() -> int:
        time.sleep(0.3)
        with (Path(folder) / "calls").open("a") as file:
            file.write("x")
        return 7

    return cached_json("x", {"a": 1}, compute)


def test_two_processes_compute_once(own_cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_slow, [str(own_cache)] * 2) == [7, 7]
    assert (own_cache / "calls").read_text() == "x"


def test_only_what_is_missing_is_computed_and_at_once() -> None:
    asked: list[list[int]] = []

    def compute(missing: list[int]) -> list[str]:
        asked.append(missing)
        return [f"{len(asked)}.{position}" for position in missing]

    keys = [{"n": n} for n in range(3)]
    assert cached_jsons("x", [keys[1]], compute) == ["1.0"]
    assert cached_jsons("x", [keys[0], keys[1], keys[2], keys[0]], compute) == ["2.0", "1.0", "2.2", "2.0"]
    assert cached_jsons("x", keys, compute) == ["2.0", "1.0", "2.2"]
    assert cached_jsons("x", [], compute) == []
    assert asked == [[0], [0, 2]]


def test_too_few_results_are_no_results() -> None:
    with pytest.raises(ValueError, match="zip"):
        cached_jsons("x", [{"n": 1}, {"n": 2}], lambda missing: [1])
    assert cached_jsons("x", [{"n": 1}], lambda missing: [2]) == [2]


def _fill(folder: Path) -> dict[str, str]:
    (folder / "sub").mkdir()
    (folder / "a.txt").write_text("abc")
    (folder / "sub" / "b.txt").write_text("de")
    return {"told": "yes"}


def test_a_folder_is_filled_once_and_described(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    first = cached_folder(folder, {"format": 1}, _fill, "delete it")
    assert first == json.loads((folder / MANIFEST).read_text())
    assert (first["format"], first["told"]) == (1, "yes")
    assert {name: file["size"] for name, file in first["files"].items()} == {"a.txt": 3, "sub/b.txt": 2}
    assert first["files"]["a.txt"]["sha256"].startswith("ba7816bf")
    again = cached_folder(folder, {"format": 1}, lambda _: pytest.fail("filled again"), "delete it")
    assert again == first


def test_a_folder_that_could_not_be_filled_is_not_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, str]:
        _fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path / "kept", {"format": 1}, fail, "delete it")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.lock"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda f: (f / "sub" / "b.txt").write_text("d"),
            r"sub/b\.txt: 1 bytes, sha256 18ac.*expected 2 bytes",
        ),
        (lambda f: (f / "a.txt").unlink(), r"a\.txt: missing; expected 3 bytes, sha256 ba78"),
        (lambda f: (f / MANIFEST).unlink(), "missing or cannot be read"),
        (lambda f: (f / MANIFEST).write_text('{"format": 1, "files": {"a.txt": 3}}'), "cannot be read"),
        (lambda f: (f / MANIFEST).write_text('{"format": 2, "files": {}}'), "another version"),
        (lambda f: (f / MANIFEST).write_text('{"files": {}}'), "another version"),
    ],
)
def test_a_folder_that_was_changed_is_told_with_its_repair(tmp_path: Path, damage, told: str) -> None:
    folder = tmp_path / "kept"
    cached_folder(folder, {"format": 1}, _fill, "delete it")
    damage(folder)
    with pytest.raises(CacheError, match=told) as caught:
        cached_folder(folder, {"format": 1}, _fill, "delete it")
    assert str(folder) in str(caught.value) or folder.name in str(caught.value)
    assert str(caught.value).endswith("delete it")


def test_a_read_only_cache_and_a_bundle_serve_what_they_have(
    own_cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, refuse_writes
) -> None:
    keys = [{"n": n} for n in range(3)]
    compute = lambda missing: [10 * position for position in missing]  # noqa: E731
    assert cached_jsons("x", keys[:2], compute) == [0, 10]
    folder = own_cache / "downloads" / "one"
    cached_folder(folder, {"format": 1}, lambda into: {"n": (into / "a").write_text("a")}, "Delete it.")
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path_factory.mktemp("empty")))
    monkeypatch.setenv("ASI_LENS_BUNDLE", str(own_cache))
    refuse_writes()
    assert cached_jsons("x", keys[:2], lambda _: pytest.fail("computed again")) == [0, 10]
    assert cached_folder(folder, {"format": 1}, pytest.fail, "Delete it.")["n"] == 1
    with pytest.raises(OSError, match=r"cannot write .*empty.*x.*: Read-only file system"):
        cached_jsons("x", keys, compute)


def test_results_that_the_bundle_lacks_go_to_the_cache(
    own_cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_json("x", {"n": 0}, lambda: "bundle")
    monkeypatch.setenv("ASI_LENS_BUNDLE", str(own_cache))
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ASI_LENS_CACHE", str(cache))
    found = cached_jsons("x", [{"n": 0}, {"n": 1}], lambda missing: ["cache"] * len(missing))
    assert found == ["bundle", "cache"]
    assert len(list((own_cache / "x").glob("*.json"))) == len(list((cache / "x").glob("*.json"))) == 1
