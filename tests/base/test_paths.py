"""Folders that the project reads and writes follow the variables that name them."""

from __future__ import annotations

from pathlib import Path

import pytest

from asi_lens.base import paths
from asi_lens.base.errors import OptionError


def test_cache_root_follows_the_variable_and_is_not_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    assert paths.cache_dir("models") == tmp_path / "cache" / "models"
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv("ASI_LENS_CACHE")
    assert paths.cache_root().name == "asi_lens"


def test_figures_folder_has_no_slash_of_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_FIGURES", str(tmp_path))
    assert (
        paths.figures_dir("meta-llama/Llama-3.1-8B", "quick")
        == tmp_path / "meta-llama--Llama-3.1-8B" / "quick"
    )


def test_checkpoints_of_one_name_have_their_own_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_FIGURES", str(tmp_path / "figures"))
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / run / "checkpoint-500" for run in ("runA", "runB", "a/runA")]
    files = [tmp_path / run / "model.gguf" for run in ("runA", "runB")]
    for path in [*folders, *(file.parent / "x" for file in files)]:
        path.mkdir(parents=True)
    for file in files:
        file.touch()
    found = [paths.figures_dir(str(path), "quick") for path in (*folders, *files)]
    assert len(set(found)) == 5
    assert found[0].parent.name.startswith("checkpoint-500-")
    assert paths.figures_dir("runA/checkpoint-500", "quick") == found[0]
    assert paths.figures_dir("./runB/../runA/checkpoint-500/", "quick") == found[0]
    (tmp_path / "link").symlink_to(folders[1])
    assert paths.figures_dir("link", "quick") == found[1]
    published = {paths.published_dir(str(path), "quick") for path in folders}
    assert len(published) == 3


def test_project_root_is_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASI_LENS_PROJECT", raising=False)
    assert paths.project_root() == Path(__file__).resolve().parents[2]
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    assert paths.notebooks_dir() == tmp_path / "notebooks"
    assert paths.parameters_dir() == tmp_path / "parameters"


def test_the_bundle_is_looked_up_first_and_never_the_place_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    assert paths.bundle_root() is None
    monkeypatch.setenv("ASI_LENS_BUNDLE", str(tmp_path / "bundle"))
    with pytest.raises(OptionError, match=r"ASI_LENS_BUNDLE='.*bundle' is not allowed.*a folder"):
        paths.cached("corpora", "a")
    (tmp_path / "bundle" / "corpora").mkdir(parents=True)
    written = tmp_path / "cache" / "corpora" / "a"
    assert paths.cached("corpora", "a") == written
    there = tmp_path / "bundle" / "corpora" / "a"
    there.mkdir()
    assert paths.cached("corpora", "a") == there
    # A folder without its mark is half there: the bundle does not have it.
    assert paths.cached("corpora", "a", "manifest.json") == written
    (there / "manifest.json").touch()
    assert paths.cached("corpora", "a", "manifest.json") == there
    assert paths.is_cached(there)
    assert paths.is_cached(written)
    assert not paths.is_cached(tmp_path)
