"""The gallery holds everything that runs left, and works from disk."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import browser
import made_up_ranks as tables
import pytest

from asi_lens.figures import collapse, output_projection
from asi_lens.reproduce import gallery
from asi_lens.results import chrome, drawing
from asi_lens.results.figure_files import save
from asi_lens.results.rows import RankRow as Rank
from asi_lens.results.rows import write_rows
from asi_lens.results.sidecar import write_sidecar

VERDICTS = ("supported", "not supported", "not testable here", "partly supported")
BUILT = {
    "01_rank_curves": lambda: collapse.rank_curves(tables.ranks(models=("m", "n"))),
    "01_spectra": lambda: collapse.spectra(tables.spectra()),
    "01_rank_heatmap": lambda: collapse.rank_heatmap(tables.ranks(models=("m", "n"))),
    "01_rank_vs_tokens": lambda: collapse.rank_vs_tokens(tables.ranks(n_tokens=(512, 4096))),
    "02_downstream_loss": lambda: collapse.downstream_loss(tables.losses()),
    "03_wo_ablation": lambda: output_projection.wo_ablation(tables.projections()),
    "03_head_overlap": lambda: output_projection.head_overlap(tables.overlaps()),
}


def verdict(number: int, **changes: Any) -> dict[str, Any]:
    numbers = [{"name": "attn <b>out</b>", "value": 0.5, "low": 0.4, "high": 0.6}]
    numbers.append({"name": "silent", "value": number / 100, "percent": True})
    told = {
        "claim": f"C{number}",
        "statement": "attention | MLP & <b>residual</b>",
        "paper_value": "0.6",
        "numbers": numbers,
        "over": "3 seeds",
        "budget": "65,536 tokens",
        "verdict": VERDICTS[number % 4],
    }
    return {**told, **changes}


def sidecar(notebook: str, stems: list[str], folder: Path, *verdicts: dict[str, Any]) -> None:
    """Save the figures and write the record of one notebook."""
    figures = {}
    for stem in stems:
        figure, caption = BUILT[stem](), f"Caption of {stem}, C2, seed 0."
        saved = save(figure, folder / stem, caption=caption)
        title = figure.layout.title
        told = {"title": title.text, "subtitle": title.subtitle.text, "caption": caption}
        figures[stem] = {**told, "png": saved.png is not None, "reason": saved.reason}
    about = {
        "parameters": {"seed": 0},
        "seeds": [0],
        "sources": {"news": "f1n6e4"},
        "longest_wall_time_s": 3.0,
    }
    tables = [path.stem for path in folder.glob(f"{notebook[:2]}_*.csv")]
    told = {"notebook": notebook, **about, "tables": tables, "figures": figures, "verdicts": list(verdicts)}
    write_sidecar(folder, told)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A figures folder with two models, made once: no image is drawn."""
    root = tmp_path_factory.mktemp("gallery") / "a folder" / "figures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASI_LENS_FIGURES", str(root))
        patch.setattr(drawing, "chrome_or_reason", lambda: (None, "no Chrome here"))
        folder = root / gallery.DEFAULT_MODEL / "quick"
        rows = [Rank(*row) for row in tables.ranks().itertuples(index=False)]
        write_rows(folder / "01_rank_curves.csv", rows[:3])
        stems = {number: [stem for stem in BUILT if stem.startswith(number)] for number in ("01", "02", "03")}
        sidecar("01_rank_curves", stems["01"], folder, verdict(10), verdict(2), verdict(3))
        sidecar("02_downstream_loss", stems["02"], folder, verdict(2, verdict="supported"))
        sidecar("03_wo_ablation", stems["03"], folder)
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


def section(page: Path, run: str) -> str:
    """One run's part of the gallery."""
    return page.read_text().split(f'<section id="{run}"')[1].split("</section>")[0]


def test_claims_come_first_in_order_and_every_figure_is_there(made: Path) -> None:
    first = section(made / "index.html", "smollm2-135m-quick")
    assert re.findall(r"<h3><span>(C\d+)</span>", first) == ["C2", "C3", "C10"]
    assert first.index("<span>C10</span>") < first.index("data-figure")
    for stem in BUILT:
        assert f'id="plot-smollm2-135m-quick-{stem}" data-figure' in first
        assert f"Caption of {stem}, C2, seed 0." in first
    assert "attention | MLP &amp; &lt;b&gt;residual" in first
    assert "attn &lt;b&gt;out" in first
    for told in ("seed = 0", "news: f1n6e4", "65,536 tokens", "3 s", "no image: no Chrome here"):
        assert told in first
    assert 'href="smollm2-135m/quick/01_rank_curves.csv"' in first
    assert 'href="smollm2-135m/quick/01_rank_curves.json"' in first


def test_a_claim_has_one_verdict_from_all_notebooks_that_test_it(made: Path) -> None:
    run = next(run for run in gallery.find_runs(made) if run.profile == "quick")
    claims = {claim.name: claim for claim in run.claims}
    assert [one.notebook for one in claims["C2"].evidence] == ["01_rank_curves", "02_downstream_loss"]
    assert [one.verdict for one in claims["C2"].evidence] == ["not testable here", "supported"]
    assert claims["C2"].verdict == "supported"
    assert claims["C10"].verdict == "not testable here"
    assert claims["C2"].evidence[0].figure is not None
    card = section(made / "index.html", run.id).split("<article")[1]
    assert 'class="verdict supported">supported</span>' in card, "told in words, not by its color alone"
    for told in ("0.4 to 0.6", "2.0 %", "Paper: 0.6.", "spread over 3 seeds"):
        assert told in card
    assert f'href="#{run.id}-01_rank_curves"' in card


def test_the_run_just_made_comes_first_and_the_published_one_beside_it(root: Path) -> None:
    shutil.copytree(
        root / gallery.DEFAULT_MODEL / "quick", root / "published" / gallery.DEFAULT_MODEL / "full"
    )
    shutil.copytree(root / "org--other" / "smoke", root / "published" / "org--other" / "smoke")
    runs = gallery.find_runs(root, newest=root / "org--other" / "smoke")
    assert [(run.url, run.published) for run in runs] == [
        ("org--other/smoke", False),
        ("published/org--other/smoke", True),
        ("smollm2-135m/quick", False),
        ("published/smollm2-135m/full", True),
    ]
    assert "as published" in section(gallery.build_gallery(root), "published-org--other-smoke")


def test_every_link_leads_somewhere_local(made: Path) -> None:
    text = re.sub(
        r'<script type="application/json".*?</script>', "", (made / "index.html").read_text(), flags=re.S
    )
    links = [link for link in re.findall(r'(?:src|href)="([^"]*)"', text) if link != "data:,"]
    assert links
    for link in links:
        known = f'id="{link[1:]}"' in text if link.startswith("#") else (made / link).is_file()
        assert known, link
    assert "http" not in text


NAMES = ["run #3", "run  3", "run-3", "50%25 pruned", "what? & 'a' \"b\"", "模型 1.5", "a+b=c~d", "x<y>"]


def test_folders_of_any_name_have_their_own_links(root: Path) -> None:
    shutil.rmtree(root / "org--other")
    for name in NAMES:
        shutil.copytree(root / gallery.DEFAULT_MODEL / "quick", root / name / "quick")
        (root / name / "quick" / "01_spectra.png").write_bytes(b"png")
    text = re.sub(
        r'<script type="application/json".*?</script>',
        "",
        gallery.build_gallery(root).read_text(),
        flags=re.S,
    )
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert not [one for one in ids if re.search(r"\s", one)]
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    local = [html.unescape(link) for link in links if not link.startswith("data:")]
    for link in local:
        if link.startswith("#"):
            assert unquote(link[1:]) in ids, link
        else:
            assert not re.search(r"[#?]", link), link
            assert (root / unquote(link)).is_file(), link
    for name in NAMES:
        assert {f"{quote(name)}/quick/01_spectra.png", f"{quote(name)}/quick/01_rank_curves.csv"} <= set(
            local
        )


def test_a_fresh_clone_shows_images_and_without_either_the_reason(root: Path) -> None:
    folder = root / gallery.DEFAULT_MODEL / "quick"
    for page in folder.glob("*.html"):
        page.unlink()
    (folder / "01_spectra.png").write_bytes(b"png")
    text = gallery.build_gallery(root).read_text()
    assert '<img src="smollm2-135m/quick/01_spectra.png"' in text
    assert "Neither page nor image is here: no Chrome here" in text


def test_an_empty_folder_gives_a_page_that_says_what_to_do(tmp_path: Path) -> None:
    page = gallery.build_gallery(tmp_path / "figures")
    assert "make figures" in page.read_text()


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
    ids = [
        f"plot-{run}-{stem}" for run in ("smollm2-135m-quick", "org--other-smoke") for stem in sorted(BUILT)
    ]
    assert seen.found["runs"] == 2
    assert sorted(seen.found["drawn"]) == sorted(ids)
    assert seen.complaints == []
    local = [url for url in seen.requests if not url.startswith("data:")]
    assert sorted(set(local)) == sorted({page, (made / "plotly.min.js").as_uri()})
    assert seen.found["wide"] <= width, "the page itself does not scroll sideways"


@pytest.mark.gallery
def test_a_single_page_draws_too(made: Path, installed: str) -> None:
    page = (made / gallery.DEFAULT_MODEL / "quick" / "03_wo_ablation.html").as_uri()
    script = "document.querySelectorAll('#figure svg.main-svg').length"
    seen = browser.visit(installed, page, script)
    assert seen.found > 0
    assert seen.complaints == []
    assert sorted(set(seen.requests)) == sorted({page, (made / "plotly.min.js").as_uri()})


def test_figures_of_the_gallery_are_the_pages_own(made: Path) -> None:
    run = next(run for run in gallery.find_runs(made) if run.profile == "quick")
    assert [figure.stem for figure in run.figures] == sorted(BUILT)
    assert json.loads(run.figures[0].data)["config"]["showSendToCloud"] is False
