"""Files are written whole or not at all, locks exclude, keys change with any part."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.base import files
from asi_lens.base.errors import CacheError, DataError


def _leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("stop", [RuntimeError("no"), KeyboardInterrupt()])
def test_write_whole_keeps_the_old_file_when_stopped(tmp_path: Path, stop: BaseException) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(type(stop)), files.write_whole(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise stop
    assert path.read_text() == "old"
    assert _leftovers(tmp_path) == ["table.csv"]


def test_write_whole_replaces_only_at_the_end_and_keeps_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    with files.write_whole(path) as temporary:
        assert temporary.suffix == ".csv"
        assert temporary.parent == path.parent  # a rename across file systems would not be whole
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o666 & ~files._umask()
    assert _leftovers(path.parent) == ["table.csv"]


@pytest.mark.parametrize("stop", [RuntimeError("no"), KeyboardInterrupt()])
def test_write_whole_folder_keeps_the_old_folder_when_stopped(tmp_path: Path, stop: BaseException) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(type(stop)), files.write_whole_folder(folder) as temporary:  # noqa: PT012
        (temporary / "a").write_text("half")
        raise stop
    assert (folder / "a").read_text() == "old"
    assert _leftovers(tmp_path) == ["model"]


def test_write_whole_folder_replaces_the_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "gone").write_text("old")
    with files.write_whole_folder(folder) as temporary:
        (temporary / "b").write_text("new")
        assert (folder / "gone").exists()
    assert _leftovers(folder) == ["b"]
    assert _leftovers(tmp_path) == ["model"]


def test_write_whole_folder_puts_the_old_one_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("old")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, target: Path) -> Path:
        if not self.name.endswith(".old") and Path(target) == folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="model"), files.write_whole_folder(folder) as temporary:
        (temporary / "a").write_text("new")
    assert (folder / "a").read_text() == "old"
    assert _leftovers(tmp_path) == ["model"]


def test_full_disk_names_the_path_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match=r"cannot write .*table\.csv: No space left") as caught,
        files.write_whole(path) as temporary,
    ):
        temporary.write_text("new")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_text() == "old"
    assert _leftovers(tmp_path) == ["table.csv"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_while_writing_names_the_path(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"cannot write .*table\.csv: No space left"),
        files.write_whole(tmp_path / "table.csv"),
        open("/dev/full", "w") as full,
    ):
        full.write("x" * 100_000)
    assert _leftovers(tmp_path) == []


def test_read_only_folder_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated, because root may write into a folder whatever its mode says.
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)
    with (
        pytest.raises(PermissionError, match=r"cannot write .*table\.csv: Permission denied"),
        files.write_whole(tmp_path / "table.csv"),
    ):
        pass
    with (
        pytest.raises(PermissionError, match=r"cannot write .*model: Permission denied"),
        files.write_whole_folder(tmp_path / "model"),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write anywhere")
def test_real_read_only_folder_names_the_path(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with (
            pytest.raises(PermissionError, match=r"cannot write .*table\.csv"),
            files.write_whole(tmp_path / "table.csv"),
        ):
            pass
        with (
            pytest.raises(PermissionError, match=r"cannot write .*table\.csv"),
            files.locked(tmp_path / "table.csv"),
        ):
            pass
    finally:
        tmp_path.chmod(0o700)


_COUNT_UP = """
import sys, time
from pathlib import Path
from asi_lens.base.files import locked
path = Path(sys.argv[1])
for _ in range(20):
    with locked(path):
        n = int(path.read_text())
        time.sleep(0.002)
        path.write_text(str(n + 1))
"""


def test_lock_excludes_another_process(tmp_path: Path) -> None:
    path = tmp_path / "counter"
    path.write_text("0")
    command = [sys.executable, "-c", _COUNT_UP, str(path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [p.wait() for p in processes] == [0, 0]
    assert path.read_text() == "40"  # without the lock, updates are lost


def test_lock_is_released_on_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.locked(tmp_path / "x"):
        raise RuntimeError
    with files.locked(tmp_path / "x"):
        pass


def test_a_lock_that_another_holds_is_told_at_once_where_that_is_asked_for(tmp_path: Path) -> None:
    with (
        files.locked(tmp_path / "x"),
        pytest.raises(RuntimeError, match="in use"),
        files.locked(tmp_path / "x", RuntimeError("in use")),
    ):
        pytest.fail("held twice")
    with files.locked(tmp_path / "x", RuntimeError("in use")):
        pass


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.text(min_size=1), _json, min_size=1, max_size=4), _json)
def test_cache_key_changes_with_any_part_and_nothing_else(parts: dict[str, object], other: object) -> None:
    key = files.cache_key(**parts)
    assert files.cache_key(**dict(reversed(parts.items()))) == key
    assert len(key) == 16
    assert set(key) <= set("0123456789abcdef")
    name = next(iter(parts))
    if repr(parts[name]) != repr(other):
        changed = {**parts, name: other}
        # 0.0 and -0.0, or dictionaries in another order, may be equal without being the same.
        if parts[name] != other:
            assert files.cache_key(**changed) != key
    without = {k: v for k, v in parts.items() if k != name}
    assert files.cache_key(**without) != key


def test_cache_key_refuses_what_json_cannot_hold() -> None:
    with pytest.raises(TypeError):
        files.cache_key(path=Path("x"))
    with pytest.raises(ValueError):
        files.cache_key(rate=float("nan"))


def test_sha256_of(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256_of(tmp_path / "x").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


def test_importing_the_light_modules_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "import asi_lens.base.files, asi_lens.base.paths, asi_lens.base.errors, asi_lens.inputs.sources\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pandas', 'unearth', 'plotly'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["模" * 75, "x" * 5000, "ä é " * 60, "a/b" * 90])
def test_a_long_name_is_cut_to_a_file_name_of_its_own(tmp_path: Path, name: str) -> None:
    found = files.file_name(name, "corpus", key="0" * 16)
    assert len(found.encode()) <= 160
    assert found.endswith("0" * 16)
    assert found != files.file_name(name + "y", "corpus", key="0" * 16)
    with files.locked(tmp_path / found), files.write_whole_folder(tmp_path / found) as folder:
        (folder / "a").touch()
    files.write_text(tmp_path / f"{found}.safetensors", "x")


def test_a_short_name_keeps_its_letters() -> None:
    assert files.file_name("owner/name", "news-en", key="k") == "owner-name-news-en-k"
    assert files.file_name("模型 1.5") == "模型-1.5"


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "\ud83d", "~nobody-of-that-name/x", "missing"])
def test_a_text_that_is_no_path_does_not_exist(name: str) -> None:
    assert files.existing(name) is None


def test_a_damaged_json_file_is_named_with_its_repair(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"n": 1}')
    assert files.read_json(path, CacheError, "delete it") == {"n": 1}
    path.write_text('{"n": ')
    with pytest.raises(CacheError, match=r"a\.json cannot be read \(Expecting value.*\); delete it$"):
        files.read_json(path, CacheError, "delete it")
    with pytest.raises(DataError, match=r"b\.json cannot be read"):
        files.read_json(tmp_path / "b.json", DataError, "delete it")


def test_a_yaml_file_holds_keys_and_values_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text, found in (("a: 1", {"a": 1}), ("", {})):
        path.write_text(text)
        assert files.read_yaml_mapping(path) == found
    for text in ("a: [", "words", "[1]"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"a\.yaml"):
            files.read_yaml_mapping(path)


def test_the_digest_is_that_of_a_zip_of_the_same_source(tmp_path: Path) -> None:
    root = Path(files.__file__).parents[2]
    shutil.make_archive(str(tmp_path / "p"), "zip", root, "asi_lens")
    code = "from asi_lens.base.files import source_digest; print(source_digest())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "p.zip")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == files.source_digest()


def test_the_digest_changes_with_every_python_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    inner = tmp_path / "digested" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "__init__.py").write_text("")
    (inner / "__init__.py").write_text("")
    found = {files.source_digest("digested")}
    for path, text in ((inner / "__init__.py", "a = 1"), (inner / "new.py", ""), (inner / "new.py", "a = 1")):
        path.write_text(text)
        found.add(files.source_digest("digested"))
    assert len(found) == 4
    (inner / "data.txt").write_text("no code")
    assert files.source_digest("digested") in found
