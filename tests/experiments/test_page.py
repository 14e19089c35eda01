"""What a notebook opens: parameters as they ran, files as they come, a record at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import made_up_ranks as tables
import numpy as np
import pandas as pd
import pytest
import runs
import small_plain
import tiny_models

from asi_lens import figures
from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.experiments.page import Page
from asi_lens.results import drawing
from asi_lens.results.rows import RankRow, read_rows
from asi_lens.results.sidecar import read_sidecar
from asi_lens.results.verdicts import Number, Verdict

MORE = """dtype = "float32"
context = 16
main_corpus = "text"
n_seeds = 2
n_tokens = 64
n_tokens_held_out = 32
store_budget_gb = 1
batch_size = 64
n_tokens_train = 1_280
dead_window = 256
lr = 8e-4
"""


@pytest.fixture
def namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the cell of parameters leaves in a notebook, papermill's changes included."""
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    monkeypatch.delenv("ASI_LENS_FIGURES", raising=False)
    monkeypatch.setattr(drawing, "chrome_or_reason", lambda: (None, "no Chrome here"))
    runs.project(tmp_path)
    path = tmp_path / "notebooks" / "03_page.ipynb"
    runs.notebook(path, parameters=runs.PARAMETERS + MORE)
    names: dict[str, Any] = {}
    exec(runs.PARAMETERS + MORE, names)
    return {**names, "seed": 4, "other": "not a parameter"}


def verdict(claim: str, value: float = 0.5) -> Verdict:
    return Verdict(claim, "statement", "paper", (Number("n", value, 0.4, 0.6),), "2 seeds", True)


def test_parameters_are_those_that_ran(namespace: dict[str, Any], tmp_path: Path) -> None:
    page = Page("03_page", namespace)
    assert page["seed"] == 4
    assert page.seeds == [4, 5]
    assert page.folder == tmp_path / "figures" / "tiny" / "quick"
    assert "other" not in page.parameters
    assert Page("03_page", {**namespace, "output_folder": str(tmp_path / "x")}).folder == tmp_path / "x"


def test_what_is_missing_or_unknown_is_named(namespace: dict[str, Any]) -> None:
    with pytest.raises(UnknownNameError, match="did you mean '03_page'"):
        Page("03_pag", namespace)
    del namespace["dtype"]
    with pytest.raises(OptionError, match="03_page: dtype is not set; run the cell of parameters first"):
        Page("03_page", namespace)
    with pytest.raises(OptionError, match="n_seeds=0"):
        Page("03_page", {**namespace, "dtype": "auto", "n_seeds": 0})
    page = Page("03_page", {**namespace, "dtype": "auto"})
    with pytest.raises(OptionError, match="has no parameter 'k'"):
        page["k"]


def test_a_parameter_of_another_kind_is_told_at_once(namespace: dict[str, Any]) -> None:
    """As papermill's `-p` leaves them, which reads lists and some numbers as text."""
    for key, value, told in (
        ("context", "[16]", "context='.16.' .* must be a whole number"),
        ("lr", "8e-4", "lr must be a number"),
        ("main_corpus", ["a"], "main_corpus must be text"),
        ("n_seeds", True, "n_seeds must be a whole number"),
        ("output_folder", None, "output_folder must be text"),
    ):
        with pytest.raises(OptionError, match=f"03_page: {told}|03_page: {key}=.*{told}"):
            Page("03_page", {**namespace, key: value})


def test_files_are_written_as_they_come_and_recorded_at_the_end(namespace: dict[str, Any]) -> None:
    page = Page("03_page", namespace)
    records = [dict(row) for row in tables.ranks().to_dict("records")]
    table = page.table(records, RankRow)
    assert len(read_rows(page.folder / "03_page.csv", RankRow)) == len(table) == len(records)
    page.table([RankRow(**row) for row in records[:2]], stem="03_more")
    drawn = page.figure(figures.rank_curves(table), "Of m, 4,096 tokens.")
    assert (page.folder / "03_page.html").is_file()
    assert read_sidecar(page.folder, "03_page") is None
    shown = page.judge(verdict("C1"), None, verdict("C2"), budget="b")
    assert shown.reset_index().claim.tolist() == ["C1", "C2"]
    page.done()
    found = read_sidecar(page.folder, "03_page")
    assert found is not None
    assert found["tables"] == ["03_more", "03_page"]
    figure = found["figures"]["03_page"]
    assert figure["title"] == drawn.layout.title.text
    assert (figure["png"], figure["reason"]) == (False, "no Chrome here")
    assert found["parameters"]["seed"] == 4
    assert "output_folder" not in found["parameters"]
    assert [one["claim"] for one in found["verdicts"]] == ["C1", "C2"]
    first = found["verdicts"][0]
    assert first["verdict"] == "supported"
    assert first["budget"] == "b"
    assert first["numbers"][0] == {"name": "n", "value": 0.5, "low": 0.4, "high": 0.6, "percent": False}
    json.dumps(found)


def test_a_cell_that_runs_again_replaces_its_verdict(namespace: dict[str, Any]) -> None:
    page = Page("03_page", namespace)
    page.judge(verdict("C1", 0.45))
    page.judge(verdict("C1", 0.55))
    page.done()
    found = read_sidecar(page.folder, "03_page")
    assert found is not None
    assert [one["numbers"][0]["value"] for one in found["verdicts"]] == [0.55]


def test_a_smoke_run_gives_no_verdict(namespace: dict[str, Any]) -> None:
    page = Page("03_page", {**namespace, "profile": "smoke"})
    assert page.judge(verdict("C1")).reset_index().verdict.tolist() == ["not testable here"]
    assert isinstance(page.judge(None), pd.DataFrame)


def test_names_of_files_begin_with_the_notebooks_number(namespace: dict[str, Any]) -> None:
    page = Page("03_page", namespace)
    rows = [RankRow(**row) for row in tables.ranks().to_dict("records")]
    with pytest.raises(OptionError, match="begins with 03_"):
        page.table(rows, stem="04_other")
    with pytest.raises(OptionError, match="need `row`"):
        page.table([{"x": 1}])


def test_training_follows_the_parameters(namespace: dict[str, Any]) -> None:
    page = Page("03_page", namespace)
    config = page.train_config()
    assert (config.lr, config.batch_size, config.n_tokens, config.dead_window) == (8e-4, 64, 1_280, 256)
    assert page.train_config(lr=0.1).lr == 0.1
    with pytest.raises(OptionError, match="load_model and harvest come before"):
        page.budget([])


def test_a_decoder_is_loaded_by_its_part(
    namespace: dict[str, Any], plain_folder: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(2):
        silence = np.zeros(small_plain.RATE, np.int16)
        small_plain.write_wav(folder / f"{number}.wav", silence, small_plain.RATE)
    given = {"model": str(plain_folder("whisper")), "output_folder": "x"}
    page = Page("03_page", {**namespace, **given})
    page.parameters["speech"] = str(folder)
    lens = page.load_model()
    assert page.load_inputs(lens, small_plain.POSITIONS).n_rows == small_plain.POSITIONS
    decoder = page.load_model(part="decoder")
    assert (lens.part, decoder.part) == ("encoder", "decoder")
    assert sum(" decoder (" in name for name in page._sources) == 1


def test_what_is_loaded_notes_its_fingerprint(
    namespace: dict[str, Any], tiny_folder: Any, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 400, encoding="utf-8")
    page = Page(
        "03_page",
        {**namespace, "model": str(tiny_folder("llama")), "main_corpus": str(text), "output_folder": "x"},
    )
    lens = page.load_model()
    data = page.harvest(lens, [("attn_out", 1), ("attn_out", 1)])
    assert list(data.train) == [("attn_out", 1)]
    tokens = page.load_tokens(lens, 32, after=data.train_tokens, what="for losses")
    assert tokens.fingerprint == data.held_out_tokens.fingerprint
    assert page.setting(lens, tokens).endswith("32 tokens, context 16")
    own = page.load_tokens(page.small_tokenizer(257), 32, what="own tokens")
    assert own.ids.max() < 257
    sources = page._sources
    assert own.fingerprint in sources.values()
    assert data.train_tokens.fingerprint in sources.values()
    assert any(name.endswith("for losses") for name in sources)
    assert len(sources) == 5
    # Another model reads the same text as rows of its own, and both are noted.
    other = page.load_tokens(page.load_model(str(tiny_folder("gpt2"))), 32, what="for losses")
    assert {tokens.fingerprint, other.fingerprint} < set(page._sources.values())


def test_two_of_one_name_are_refused(namespace: dict[str, Any], tiny_folder: Any, tmp_path: Path) -> None:
    """Tables, captions and records tell models and texts apart by their names."""
    texts = [tmp_path / name / "own.txt" for name in ("a", "b")]
    for text in texts:
        text.parent.mkdir()
        text.write_text(f"{text.parent.name}bcdefgh " * 400, encoding="utf-8")
    given = {"model": str(tiny_folder("llama")), "main_corpus": str(texts[0]), "output_folder": "~/x"}
    page = Page("03_page", {**namespace, **given})
    assert page.folder == Path.home() / "x"
    lens = page.load_model()
    page.load_tokens(lens, 32)
    page.load_tokens(lens, 32, str(texts[0]), what="again")
    with pytest.raises(OptionError, match=r"a/own.txt and .*b/own.txt are both called 'own.txt'"):
        page.load_tokens(lens, 32, str(texts[1]))
    again = tiny_models.build("gpt2", tmp_path / "tiny-llama")
    with pytest.raises(OptionError, match=r"are both called 'tiny-llama \("):
        page.load_model(str(again))
