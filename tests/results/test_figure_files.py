"""Figures on disk: pages without a network, images, and what is told when there is none."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import plotly.graph_objects as go
import pytest

from asi_lens.base.errors import OptionError
from asi_lens.results import chrome, drawing, figure_files
from asi_lens.results.figure_files import for_paper, rich, save, shared_plotly_js

CAPTION = "C1. model (4-bit weights, dequantised), news-en, 65,536 tokens, context 256, seed 0. " * 4


@pytest.fixture
def figure() -> go.Figure:
    return go.Figure(
        go.Scatter(x=[1, 2], y=[3.0, 4.0]),
        {
            "title": {"text": "A title", "subtitle": {"text": "m · news · 10 tokens"}},
            "height": 400,
            "margin": {"l": 70, "r": 20, "t": 100, "b": 60},
            "meta": {"min_width": 333},
        },
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures"


@pytest.fixture
def no_chrome(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(drawing, "chrome_or_reason", lambda: (None, "no Chrome is installed"))
    return "no Chrome is installed"


def test_without_a_chrome_the_page_is_written_and_the_reason_returned(
    figure: go.Figure, root: Path, no_chrome: str
) -> None:
    stem = root / "m" / "quick" / "01_a.1"
    stem.parent.mkdir(parents=True)
    (stem.parent / "01_a.1.png").write_bytes(b"an image of other numbers")
    saved = save(figure, stem, caption=CAPTION)
    assert saved.png is None
    assert saved.reason == no_chrome
    assert saved.html == stem.parent / "01_a.1.html"
    assert not (stem.parent / "01_a.1.png").exists(), "an older image would show other numbers"


def test_the_page_loads_one_local_script_and_nothing_else(
    figure: go.Figure, root: Path, no_chrome: str
) -> None:
    page = save(figure, root / "m" / "quick" / "01_a", caption=CAPTION).html
    text = page.read_text()
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", text)
    assert sources == ["../../plotly.min.js"]
    assert (page.parent / sources[0]).resolve() == (root / "plotly.min.js").resolve()
    assert (root / "plotly.min.js").stat().st_size > 10**6
    assert "http" not in text
    assert 'name="viewport"' in text
    assert "min-width: 333px" in text


def test_a_folder_of_ones_own_gets_its_own_script(
    figure: go.Figure, root: Path, tmp_path: Path, no_chrome: str
) -> None:
    page = save(figure, tmp_path / "elsewhere" / "01_a", caption=CAPTION).html
    assert 'src="plotly.min.js"' in page.read_text()
    assert (page.parent / "plotly.min.js").is_file()
    assert not root.exists()


def test_the_shared_script_is_written_once_and_replaced_when_another_version(root: Path) -> None:
    path = shared_plotly_js(root / "m" / "quick")
    before = path.stat().st_mtime_ns
    assert shared_plotly_js(root / "n" / "full") == path
    assert path.stat().st_mtime_ns == before
    path.write_text("// plotly.js of another version")
    shared_plotly_js(root)
    assert path.stat().st_size > 10**6


def test_text_cannot_break_out_of_the_page(figure: go.Figure, root: Path, no_chrome: str) -> None:
    figure.data[0].name = "</script><script>alert(1)</script>"
    figure.layout.title.subtitle.text = "<img src=x onerror=alert(1)>"
    page = save(figure, root / "m" / "quick" / "01_a", caption="a <b>bold</b> <script>alert(1)</script>").html
    text = page.read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert "a <b>bold</b> &lt;script&gt;" in text
    data = re.search(r'id="figure-data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1))["data"][0]["name"] == figure.data[0].name


def test_the_page_sets_titles_as_text_and_never_offers_an_upload(
    figure: go.Figure, root: Path, no_chrome: str
) -> None:
    text = save(figure, root / "m" / "quick" / "01_a", caption=CAPTION).html.read_text()
    found = re.search(r'id="figure-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data = json.loads(found.group(1))
    assert "title" not in data["layout"]
    assert "width" not in data["layout"]
    assert data["config"]["showSendToCloud"] is False
    assert "<h1>A title</h1>" in text


@pytest.mark.parametrize(("change", "told"), [({"title": None}, "title"), ({}, "caption")])
def test_a_figure_has_a_title_and_a_caption(figure: go.Figure, root: Path, change: dict, told: str) -> None:
    figure.update_layout(**change)
    with pytest.raises(OptionError, match=told):
        save(figure, root / "m" / "quick" / "01_a", caption=" " if told == "caption" else CAPTION)
    assert not root.exists()


def test_long_text_is_broken_into_lines_and_the_plot_keeps_its_size(figure: go.Figure) -> None:
    figure.layout.title.text = "A title that is far too long for one line of any figure, " * 3
    paper = for_paper(figure, CAPTION)
    head, caption = paper.layout.annotations[-2:]
    assert head.text.startswith("<b>A title")
    lines = caption.text.split("<br>")
    assert len(lines) > 2
    assert " ".join(lines).split() == CAPTION.split(), "no word is lost"
    # DejaVu Sans has 0.50 of its size on average.
    assert max(map(len, lines)) * 13 * 0.52 <= 1000
    plot = paper.layout.height - paper.layout.margin.t - paper.layout.margin.b
    assert plot == 400 - 100 - 60
    assert paper.layout.margin.b >= 60 + 13 * len(lines)
    assert caption.yshift == -60
    assert figure.layout.title.text.startswith("A title"), "the figure itself is not touched"
    assert not figure.layout.annotations


def test_a_wider_figure_has_longer_lines(figure: go.Figure) -> None:
    wide = for_paper(go.Figure(figure).update_layout(width=1600), CAPTION)
    assert wide.layout.width == 1600
    assert len(wide.layout.annotations[-1].text.split("<br>")) < len(
        for_paper(figure, CAPTION).layout.annotations[-1].text.split("<br>")
    )


def test_rich_text_keeps_few_tags() -> None:
    assert rich("W<sub>O</sub> & <i>z</i> < 1 <a href=x>") == (
        "W<sub>O</sub> &amp; <i>z</i> &lt; 1 &lt;a href=x&gt;"
    )


@pytest.mark.gallery
def test_the_image_is_drawn_at_twice_the_size(figure: go.Figure, root: Path) -> None:
    path, reason = chrome.chrome_or_reason()
    if path is None:
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    saved = save(figure, root / "m" / "quick" / "01_a", caption=CAPTION)
    assert saved.reason == ""
    assert saved.png is not None
    content = saved.png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width == drawing.SCALE * figure_files.WIDTH
    assert height == drawing.SCALE * for_paper(figure, CAPTION).layout.height
