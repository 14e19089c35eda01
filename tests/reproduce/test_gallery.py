"""The gallery holds everything that runs left, and works from disk; the README shows what it should."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import browser
import made_up_ranks as tables
import pytest

from asi_lens.base.errors import DataError
from asi_lens.base.paths import project_root
from asi_lens.figures import collapse
from asi_lens.reproduce import gallery
from asi_lens.results import chrome, provenance
from asi_lens.results.claims import ClaimRow, write_claim
from asi_lens.results.rows import RankRow as Rank
from asi_lens.results.rows import write_rows

VERDICTS = ("supported", "not supported", "not testable here")
BUILT = {
    "01_rank_curves": lambda: collapse.rank_curves(tables.ranks(models=("m", "n"))),
    "01_spectra": lambda: collapse.spectra(tables.spectra()),
    "01_rank_heatmap": lambda: collapse.rank_heatmap(tables.ranks(models=("m", "n"))),
    "01_rank_vs_tokens": lambda: collapse.rank_vs_tokens(tables.ranks(n_tokens=(512, 4096))),
    "02_downstream_loss": lambda: collapse.downstream_loss(tables.losses()),
    "03_wo_ablation": lambda: collapse.wo_ablation(tables.projections()),
    "03_head_overlap": lambda: collapse.head_overlap(tables.overlaps()),
}


def claim(number: int, notebook: str = "01_rank_curves", **changes: str) -> ClaimRow:
    values = {
        "claim": f"C{number}",
        "statement": "attention | MLP & <b>residual</b>",
        "paper_value": "0.6",
        "our_value": f"value {number}",
        "spread": "0.4 to 0.6",
        "budget": "65,536 tokens",
        "verdict": VERDICTS[number % 3],
        "notebook": notebook,
    }
    return ClaimRow(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A figures folder with two models, made once: no image is drawn."""
    root = tmp_path_factory.mktemp("gallery") / "a folder" / "figures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASI_LENS_FIGURES", str(root))
        patch.setattr(chrome, "chrome_or_reason", lambda: (None, "no Chrome here"))
        folder = root / gallery.README_MODEL / "quick"
        for stem, build in BUILT.items():
            collapse.save(build(), folder / stem, caption=f"Caption of {stem}, seed 0.")
        for number in (10, 2, 3):
            write_claim(folder, claim(number))
        rows = [Rank(*row) for row in tables.ranks().itertuples(index=False)]
        write_rows(folder / "01_rank_curves.csv", rows[:3])
        provenance.record_run(folder, "01_rank_curves", parameters={"seed": 0}, sources={"news": "f1n6e4"})
        provenance.record_wall_time(folder, "02_downstream_loss", 3.0)
        shutil.copytree(folder, root / "org--other" / "smoke")
        gallery.build_gallery(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change."""
    copy = tmp_path / "figures"
    shutil.copytree(made, copy)
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    monkeypatch.delenv("ASI_LENS_FIGURES", raising=False)
    return copy


def test_claims_come_first_in_order_and_every_figure_is_there(made: Path) -> None:
    text = (made / "index.html").read_text()
    first = text[text.index('id="smollm2-135m-quick"') : text.index('id="org--other-smoke"')]
    assert re.findall(r"<b>(C\d+)</b>", first) == ["C2", "C3", "C10"]
    assert first.index("<b>C10</b>") < first.index("data-figure")
    for verdict in VERDICTS:
        assert f">{verdict}</span>" in first, "a verdict is told in words, not by its color alone"
    for stem in BUILT:
        assert f'id="smollm2-135m-quick-{stem}" data-figure' in first
        assert f"Caption of {stem}, seed 0." in first
    assert "attention | MLP &amp; &lt;b&gt;residual" in first
    for told in ("seed = 0", "news: f1n6e4", "65,536 tokens", "3 s", "no image: no Chrome here"):
        assert told in first
    assert 'href="smollm2-135m/quick/01_rank_curves.csv"' in first
    assert 'href="smollm2-135m/quick/run.json"' in first


def test_every_link_leads_somewhere_local(made: Path) -> None:
    text = re.sub(
        r'<script type="application/json".*?</script>', "", (made / "index.html").read_text(), flags=re.S
    )
    links = [link for link in re.findall(r'(?:src|href)="([^"]*)"', text) if link != "data:,"]
    assert links
    for link in links:
        assert (made / link).is_file(), link
    assert "http" not in text


def test_a_fresh_clone_shows_images_and_without_either_the_reason(root: Path) -> None:
    folder = root / gallery.README_MODEL / "quick"
    for page in folder.glob("*.html"):
        page.unlink()
    (folder / "01_spectra.png").write_bytes(b"png")
    text = gallery.build_gallery(root).read_text()
    assert '<img src="smollm2-135m/quick/01_spectra.png"' in text
    assert "Neither page nor image is here: no Chrome here" in text


def test_an_empty_folder_gives_a_page_that_says_what_to_do(tmp_path: Path) -> None:
    page = gallery.build_gallery(tmp_path / "figures")
    assert "make figures" in page.read_text()


def markers(root: Path, between: str = "old") -> Path:
    readme = root.parent / "README.md"
    readme.write_text(f"# Title\n\n{gallery.BEGIN}\n{between}\n{gallery.END}\n\nThe end\n")
    return readme


def test_the_readme_gets_claims_and_images_between_its_markers(root: Path) -> None:
    folder = root / gallery.README_MODEL / "quick"
    (folder / "01_rank_curves.png").write_bytes(b"png")
    (folder / "00_explore.png").write_bytes(b"png")
    readme = markers(root)
    assert gallery.update_readme()
    text = readme.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("The end\n")
    assert "old" not in text
    assert "![Effective rank by layer](figures/smollm2-135m/quick/01_rank_curves.png)" in text
    assert "01_spectra" not in text, "it has no image"
    assert "00_explore" not in text
    rows = [line for line in text.splitlines() if line.startswith("| **C")]
    assert [row.split("**")[1] for row in rows] == ["C2", "C3", "C10"]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 7 for row in rows), "a bar inside a cell is escaped"
    assert "**not testable here** ([01_rank_curves](notebooks/01_rank_curves.ipynb))" in rows[0]
    before = readme.stat().st_mtime_ns
    assert gallery.update_readme()
    assert readme.stat().st_mtime_ns == before, "nothing new, nothing written"


def test_the_readme_prefers_the_full_profile_figure_by_figure(root: Path) -> None:
    quick, full = root / gallery.README_MODEL / "quick", root / gallery.README_MODEL / "full"
    for stem in ("01_rank_curves", "03_wo_ablation"):
        (quick / f"{stem}.png").write_bytes(b"png")
    shutil.copytree(quick, full)
    (full / "03_wo_ablation.png").unlink()
    (full / "claims.csv").unlink()
    write_claim(full, claim(2, our_value="from full"))
    text = gallery.readme_section(root)
    assert "figures/smollm2-135m/full/01_rank_curves.png" in text
    assert "figures/smollm2-135m/quick/03_wo_ablation.png" in text
    rows = {line.split("**")[1]: line for line in text.splitlines() if line.startswith("| **C")}
    assert "from full" in rows["C2"]
    assert rows["C2"].endswith("| full |")
    assert rows["C3"].endswith("| quick |")


def test_a_readme_without_its_markers_is_refused_and_left_alone(root: Path) -> None:
    readme = root.parent / "README.md"
    for text in ("# Title\n", f"{gallery.END} {gallery.BEGIN}", gallery.BEGIN * 2 + gallery.END):
        readme.write_text(text)
        with pytest.raises(DataError, match="needs one"):
            gallery.update_readme()
        assert readme.read_text() == text


def test_runs_into_other_folders_or_of_other_models_leave_the_readme_alone(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme = markers(root)
    before = readme.read_text()
    monkeypatch.setenv("ASI_LENS_FIGURES", str(tmp_path / "elsewhere"))
    assert not gallery.update_readme()
    monkeypatch.delenv("ASI_LENS_FIGURES")
    shutil.rmtree(root / gallery.README_MODEL)
    assert not gallery.update_readme()
    assert readme.read_text() == before
    with pytest.raises(DataError, match="no run of smollm2-135m"):
        gallery.readme_section(root)


def test_the_committed_readme_is_what_the_committed_figures_give() -> None:
    text = (project_root() / "README.md").read_text(encoding="utf-8")
    assert text.count(gallery.BEGIN) == text.count(gallery.END) == 1
    between = text.split(gallery.BEGIN)[1].split(gallery.END)[0].strip()
    root = project_root() / "figures"
    if any((root / gallery.README_MODEL / name / "run.json").is_file() for name in gallery.README_PROFILES):
        assert between == gallery.readme_section(root), "python -m asi_lens.reproduce.gallery writes it anew"
    else:
        assert between == ""


DRAW_ALL = """(async () => {
  const out = {runs: 0, drawn: [], wide: document.documentElement.scrollWidth, inner: innerWidth};
  const buttons = [...document.querySelectorAll("nav button")];
  for (const button of buttons) {
    button.click();
    out.runs += 1;
    const shown = [...document.querySelectorAll(".run:not([hidden]) [data-figure]")];
    for (const node of shown) {
      node.scrollIntoView();
      for (let i = 0; i < 300 && !node.querySelector("svg.main-svg"); i++)
        await new Promise((resolve) => setTimeout(resolve, 50));
      const svg = node.querySelector("svg.main-svg");
      const traces = node.querySelectorAll(".trace, .hm, .heatmaplayer image").length;
      if (svg && svg.getBoundingClientRect().width > 200 && traces) out.drawn.push(node.id);
    }
    out.wide = Math.max(out.wide, document.documentElement.scrollWidth);
  }
  return out;
})()"""


@pytest.fixture(scope="module")
def installed() -> str:
    path, reason = chrome.chrome_or_reason()
    if path is None:
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    return path


@pytest.mark.gallery
@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True)], ids=["desktop", "phone"])
def test_every_figure_draws_from_disk_without_a_request_or_a_complaint(
    made: Path, installed: str, width: int, phone: bool
) -> None:
    page = (made / "index.html").as_uri()
    seen = browser.visit(installed, page, DRAW_ALL, width=width, phone=phone)
    ids = [f"{run}-{stem}" for run in ("smollm2-135m-quick", "org--other-smoke") for stem in sorted(BUILT)]
    assert seen.found["runs"] == 2
    assert sorted(seen.found["drawn"]) == sorted(ids)
    assert seen.complaints == []
    local = [url for url in seen.requests if not url.startswith("data:")]
    assert sorted(set(local)) == sorted({page, (made / "plotly.min.js").as_uri()})
    assert seen.found["wide"] <= width, "the page itself does not scroll sideways"


@pytest.mark.gallery
def test_a_single_page_draws_too(made: Path, installed: str) -> None:
    page = (made / gallery.README_MODEL / "quick" / "03_wo_ablation.html").as_uri()
    script = "document.querySelectorAll('#figure svg.main-svg').length"
    seen = browser.visit(installed, page, script)
    assert seen.found > 0
    assert seen.complaints == []
    assert sorted(set(seen.requests)) == sorted({page, (made / "plotly.min.js").as_uri()})


def test_figures_of_the_gallery_are_the_pages_own(made: Path) -> None:
    run = next(run for run in gallery.find_runs(made) if run.profile == "quick")
    assert [figure.stem for figure in run.figures] == sorted(BUILT)
    assert json.loads(run.figures[0].data)["config"]["showSendToCloud"] is False
