"""Publishing: what is copied, what is refused, and the README's table of the best evidence."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from PIL import Image

from asi_lens.base.errors import DataError
from asi_lens.base.paths import figures_dir, figures_root, project_root
from asi_lens.reproduce import publish as module
from asi_lens.reproduce.gallery import DEFAULT_MODEL, find_runs
from asi_lens.reproduce.publish import (
    BEGIN,
    BEST,
    END,
    claims_of,
    evidence_page,
    main,
    publish,
    readme_section,
    update_readme,
)
from asi_lens.reproduce.staleness import record
from asi_lens.results.claims import CLAIMS_FILE, ClaimRow
from asi_lens.results.sidecar import read_sidecars, write_sidecar
from asi_lens.results.tables import read_rows

# Blue to yellow, and noise that an encoder cannot shorten.
SHADES = np.linspace([0, 32, 76], [255, 234, 70], 4096).reshape(64, 64, 3).astype(np.uint8)
SHADES = SHADES + np.random.default_rng(0).integers(0, 4, SHADES.shape, np.uint8)
FIGURE = {"title": "t", "subtitle": "s", "caption": "c", "png": True, "reason": ""}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose `figures` a test fills."""
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    monkeypatch.delenv("ASI_LENS_FIGURES", raising=False)
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end\n")
    return tmp_path / "figures"


def left(root: Path, profile: str, notebook: str, told: str = "supported", **changes: Any) -> Path:
    """What a run of one notebook leaves that tests C2 and C10."""
    folder = root / DEFAULT_MODEL / profile
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".html"):
        (folder / f"{notebook}{suffix}").write_text(f"{profile}{suffix}")
    Image.fromarray(SHADES).save(folder / f"{notebook}.png")
    verdicts = [
        {
            "claim": claim,
            "statement": f"{notebook} | says & so",
            "paper_value": "0.6",
            "numbers": [{"name": f"of {profile}", "value": 0.5, "low": 0.4, "high": 0.6}],
            "over": "seeds",
            "budget": "b",
            "verdict": told,
        }
        for claim in ("C10", "C2")
    ]
    content = {"parameters": {}, "seeds": [0], "sources": {}, "tables": [notebook]}
    content |= {"figures": {notebook: FIGURE}, "verdicts": verdicts, "notebook": notebook}
    write_sidecar(folder, {**content, **changes})
    return folder


def test_tables_images_and_records_are_copied_and_nothing_else(root: Path) -> None:
    left(root, "quick", "01_a")
    folder = publish(DEFAULT_MODEL, "quick")
    assert folder == root / "published" / DEFAULT_MODEL / "quick"
    assert sorted(path.name for path in folder.iterdir()) == [
        "01_a.csv",
        "01_a.json",
        "01_a.png",
        "claims.csv",
        "run.json",
    ]
    assert [row.claim for row in read_rows(folder / CLAIMS_FILE, ClaimRow)] == ["C2", "C10"]


def test_images_are_copied_in_fewer_bytes_and_look_the_same(root: Path) -> None:
    source = left(root, "quick", "01_a") / "01_a.png"
    copy = publish(DEFAULT_MODEL, "quick") / "01_a.png"
    with Image.open(copy) as image:
        shown = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(shown - SHADES).max() <= 20
    assert copy.stat().st_size < source.stat().st_size


def test_a_notebook_replaces_its_own_files_only(root: Path) -> None:
    left(root, "quick", "01_a", tables=["01_a", "01_old"])
    (root / DEFAULT_MODEL / "quick" / "01_old.csv").write_text("x")
    left(root, "quick", "02_b")
    folder = publish(DEFAULT_MODEL, "quick")
    assert (folder / "01_old.csv").is_file()
    left(root, "quick", "01_a")
    left(root, "quick", "02_b", "not supported")
    publish(DEFAULT_MODEL, "quick", ["01_a"])
    assert not (folder / "01_old.csv").exists()
    assert {one["verdicts"][0]["verdict"] for one in read_sidecars(folder).values()} == {"supported"}


def test_the_longest_time_under_the_same_parameters_stays(root: Path) -> None:
    for seconds, key, longest in ((600.0, "a", 600), (5.0, "a", 600), (7.0, "b", 7)):
        left(root, "quick", "01_a", longest_wall_time_s=seconds, timed_key=key)
        found = read_sidecars(publish(DEFAULT_MODEL, "quick"))
        assert found["01_a"]["longest_wall_time_s"] == longest


def test_what_stands_for_nothing_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left(root, "smoke", "01_a")
    with pytest.raises(DataError, match="smoke is not published"):
        publish(DEFAULT_MODEL, "smoke")
    with pytest.raises(DataError, match="has no run of a notebook"):
        publish(DEFAULT_MODEL, "quick")
    left(root, "quick", "01_a", figures={"01_a": {**FIGURE, "png": False}})
    with pytest.raises(DataError, match="01_a has no image of 01_a"):
        publish(DEFAULT_MODEL, "quick")
    with pytest.raises(DataError, match="has no run of 02_b; run"):
        publish(DEFAULT_MODEL, "quick", ["01_a", "02_b"])
    assert main(["--profile", "full"]) == 1
    assert "stopped:" in capsys.readouterr().err
    assert not (root / "published").exists()


def test_the_readme_gets_one_row_a_claim_of_the_best_evidence(root: Path) -> None:
    left(root, "quick", "01_a")
    left(root, "quick", "02_b")
    left(root, "full", "01_a", "not supported")
    for profile in ("quick", "full"):
        publish(DEFAULT_MODEL, profile)
    text = readme_section(root)
    rows = {line.split("**")[1]: line for line in text.splitlines() if line.startswith("| **C")}
    assert list(rows) == ["C2", "C10"]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows.values()), "a bar in a cell is escaped"
    assert "| of full 0.5 |" in rows["C2"]
    assert (
        "[01](notebooks/01_a.ipynb) full: not supported; [02](notebooks/02_b.ipynb) quick: supported"
        in rows["C2"]
    )
    assert "**partly supported**" in rows["C2"]
    found = claims_of([run for run in find_runs(root) if run.published])
    assert [[one.profile for one in claim.evidence] for claim in found] == [
        ["full", "quick"],
        ["full", "quick"],
    ]


def test_the_command_publishes_and_updates_the_readme(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left(root, "quick", "01_a")
    assert main([]) == 0
    assert "README.md has the new table" in capsys.readouterr().out
    readme = project_root() / "README.md"
    text = readme.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("The end\n")
    assert "old" not in text
    before = readme.stat().st_mtime_ns
    assert not update_readme()
    assert readme.stat().st_mtime_ns == before, "nothing new, nothing written"
    assert (figures_root() / "index.html").is_file()


def test_a_readme_without_its_markers_is_refused_and_left_alone(root: Path) -> None:
    left(root, "quick", "01_a")
    publish(DEFAULT_MODEL, "quick")
    readme = project_root() / "README.md"
    for text in ("# Title\n", f"{END} {BEGIN}", BEGIN * 2 + END):
        readme.write_text(text)
        with pytest.raises(DataError, match="needs one"):
            update_readme()
        assert readme.read_text() == text


def test_nothing_published_has_no_table(root: Path) -> None:
    left(root, "quick", "01_a")
    with pytest.raises(DataError, match="has no run of smollm2-135m"):
        readme_section(root)


def test_the_committed_readme_is_what_the_published_figures_give() -> None:
    text = (project_root() / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    between = text.split(BEGIN)[1].split(END)[0].strip()
    root = project_root() / "figures"
    assert any(run.published and run.profile in BEST for run in find_runs(root))
    assert between == readme_section(root), "make publish writes it anew"
    page = root / "published" / "README.md"
    assert page.read_text(encoding="utf-8") == evidence_page(root)
    images = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert len(images) >= 12
    assert all((page.parent / image).is_file() for image in images)


def test_published_records_name_files_that_are_there() -> None:
    for folder in sorted((project_root() / "figures" / "published").glob("*/*/")):
        for notebook, sidecar in read_sidecars(folder).items():
            names = [f"{stem}.csv" for stem in sidecar["tables"]]
            names += [f"{stem}.png" for stem in sidecar["figures"]]
            assert all((folder / name).is_file() for name in names), notebook
    assert module.BEST[0] == "gpu", "the best evidence comes first"


def test_a_model_in_the_project_is_published(root: Path) -> None:
    project = runs.project(root.parent)
    model = project / "models" / DEFAULT_MODEL
    model.mkdir(parents=True)
    asked = {"model": f"models/{DEFAULT_MODEL}", "profile": "quick", "seed": 1, "x": 1}

    def publish_run(**changes: Any) -> Path:
        folder = left(root, "quick", "01_alpha", parameters=asked | changes)
        shutil.copytree(folder, figures_dir(str(model), "quick"), dirs_exist_ok=True)
        return publish(str(model), "quick")

    assert (publish_run() / "01_alpha.csv").is_file()
    with pytest.raises(DataError, match="model 'models/other', not 'models/"):
        publish_run(model="models/other")


def test_only_whole_runs_of_the_profile_are_published(root: Path) -> None:
    project = runs.project(root.parent)
    (project / "parameters" / f"{DEFAULT_MODEL}.yaml").write_text(f"model: {DEFAULT_MODEL}\n")
    asked = {"model": DEFAULT_MODEL, "profile": "quick", "output_folder": "elsewhere", "seed": 1, "x": 1}
    for changes, told in (({"x": 5}, "x 5, not 1"), ({"seed": 2, "x": 5}, "seed 2, not 1, x 5, not 1")):
        left(root, "quick", "01_alpha", parameters=asked | changes)
        with pytest.raises(DataError, match=f"01_alpha ran with other parameters .*: {told}; run it again"):
            publish(DEFAULT_MODEL, "quick")
    folder = left(root, "quick", "01_alpha", parameters=asked)
    record(folder, "01_alpha", {})
    publish(DEFAULT_MODEL, "quick")
    (folder / "01_alpha.csv").write_text("of a run that was stopped")
    with pytest.raises(DataError, match=r"stopped in a later run, or edited \(01_alpha.csv was changed\)"):
        publish(DEFAULT_MODEL, "quick")
