"""Causes of a change: a file at a path that a parameter names is one, a packaged name is none.

What the runner does with a cause stands in test_main.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from asi_lens.reproduce import staleness

CAUSES = {"the notebook", "its parameters", "the package", "installed versions"}


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(staleness, "sha256_of", lambda path: path.name)  # the package stays as it is
    return lambda **parameters: staleness.key_of("01_rank_curves", parameters)


def test_files_at_paths_are_inputs(key: Any, tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text.txt"
    (model / "deep").mkdir(parents=True)
    weights, config = model / "deep" / "model.safetensors", model / "config.json"
    for path in (weights, config, text):
        path.write_text("old")
    given = {"model": str(model), "other_corpora": ["news-en", str(text)], "n_tokens": 3, "beside": None}
    known = key(**given)
    assert set(known) == {*CAUSES, "its inputs"}
    assert key(**given) == known

    def changed() -> list[str]:
        found = key(**given)
        return [cause for cause in found if found[cause] != known[cause]]

    for path in (weights, config, text):
        time = path.stat().st_mtime_ns
        path.write_text("longer")
        assert changed() == ["its inputs"]
        path.write_text("new")  # as long as before, written later
        os.utime(path, ns=(time, time + 1))
        assert changed() == ["its inputs"]
        path.write_text("old")
        os.utime(path, ns=(time, time))
        assert changed() == []
    config.rename(model / "other.json")
    assert changed() == ["its inputs"]


def test_names_have_no_files(key: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()
    (tmp_path / "news-en").write_text("a file of a packaged text's name, in the folder where `make` runs")
    given = {"model": "smollm2-135m", "profile": "quick", "other_corpora": ["news-en"], "site": "attn_out"}
    assert set(key(**given)) == CAUSES
    assert set(key(**given, output_folder=str(tmp_path))) == CAUSES
