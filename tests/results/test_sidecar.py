"""Sidecars: what they hold, what is refused, and the tables that are joined of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asi_lens.base.errors import CacheError, DataError
from asi_lens.results.claims import CLAIMS_FILE, ClaimRow
from asi_lens.results.sidecar import files_of, join, read_sidecar, read_sidecars, sidecar_path, write_sidecar
from asi_lens.results.tables import read_rows

FIGURE = {"title": "t", "subtitle": "s", "caption": "c", "png": True, "reason": ""}


def content(notebook: str = "01_alpha", **changes: Any) -> dict[str, Any]:
    whole = {
        "notebook": notebook,
        "parameters": {"seed": 0},
        "seeds": [0],
        "sources": {"news": "f1"},
        "tables": [notebook],
        "figures": {notebook: FIGURE},
        "verdicts": [],
    }
    return {**whole, **changes}


def verdict(claim: str, **changes: Any) -> dict[str, Any]:
    numbers = [{"name": "attn_out", "value": 0.5, "low": 0.4, "high": 0.6, "percent": False}]
    numbers.append({"name": "silent", "value": 0.123, "percent": True})
    told = {"claim": claim, "statement": "s", "paper_value": "p", "numbers": numbers, "over": "3 seeds"}
    return {**told, "verdict": "supported", "budget": "b", **changes}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_sidecar(tmp_path, content())
    assert read_sidecar(tmp_path, "01_alpha") == {"format": 1, **content()}
    assert read_sidecar(tmp_path, "02_beta") is None
    write_sidecar(tmp_path, content("00_explore"))
    assert list(read_sidecars(tmp_path)) == ["00_explore", "01_alpha"]


def test_files_are_tables_pages_and_the_images_that_were_drawn() -> None:
    undrawn = {"01_b": {**FIGURE, "png": False}}
    assert files_of(content(figures={"01_a": FIGURE, **undrawn}, tables=["01_a", "01_c"])) == [
        "01_a.csv",
        "01_a.html",
        "01_a.png",
        "01_b.html",
        "01_c.csv",
    ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"format": 99}', '{"format": 1, "notebook": "01_alpha"}']
)
def test_a_damaged_one_is_named(tmp_path: Path, text: str) -> None:
    sidecar_path(tmp_path, "01_alpha").write_text(text)
    with pytest.raises(CacheError, match=r"01_alpha\.json is damaged .* delete it"):
        read_sidecars(tmp_path)


def test_one_under_another_notebooks_name_is_refused(tmp_path: Path) -> None:
    write_sidecar(tmp_path, content())
    sidecar_path(tmp_path, "01_alpha").rename(sidecar_path(tmp_path, "02_beta"))
    with pytest.raises(CacheError, match="02_beta"):
        read_sidecar(tmp_path, "02_beta")


def test_only_json_values_are_recorded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only JSON values"):
        write_sidecar(tmp_path, content(parameters={"x": float("nan")}))
    assert not sidecar_path(tmp_path, "01_alpha").exists()


def test_claims_are_joined_in_order_with_their_numbers(tmp_path: Path) -> None:
    write_sidecar(tmp_path, content("01_alpha", verdicts=[verdict("C10"), verdict("C2")]))
    write_sidecar(tmp_path, content("02_beta", verdicts=[verdict("C2", verdict="not supported")]))
    join(tmp_path)
    rows = read_rows(tmp_path / CLAIMS_FILE, ClaimRow)
    assert [(row.claim, row.notebook) for row in rows] == [
        ("C2", "01_alpha"),
        ("C2", "02_beta"),
        ("C10", "01_alpha"),
    ]
    assert rows[0].our_value == "attn_out 0.5; silent 12.3 %"
    assert rows[0].spread == "over 3 seeds: attn_out 0.4 to 0.6"
    assert rows[1].verdict == "not supported"
    about = json.loads((tmp_path / "run.json").read_text())["notebooks"]
    assert about["01_alpha"]["parameters"] == {"seed": 0}
    assert "verdicts" not in about["01_alpha"]


def test_claims_that_no_notebook_judges_any_more_go(tmp_path: Path) -> None:
    write_sidecar(tmp_path, content(verdicts=[verdict("C2")]))
    join(tmp_path)
    write_sidecar(tmp_path, content())
    join(tmp_path)
    assert not (tmp_path / "claims.csv").exists()
