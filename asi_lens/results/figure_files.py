"""Figures on disk: an interactive page, and a still image if a Chrome is found.

Pages share one local copy of plotly.js, so pages are small and work without a network. Title, subtitle and
caption wrap: in the page as HTML text, in the image as lines broken to the image's width. Plotly's own
`write_html` is not used: its titles do not wrap on a phone, and each folder would get a plotly.js of 5 MB.
"""

from __future__ import annotations

import html
import json
import os
import re
import textwrap
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import quote

import plotly.graph_objects as go

from asi_lens.base.errors import require
from asi_lens.base.files import locked, write_text
from asi_lens.base.paths import figures_root
from asi_lens.results.drawing import draw

PLOTLY_JS = "plotly.min.js"
CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
    # Removes plotly.js's offer to upload the figure.
    "showSendToCloud": False,
    "plotlyServerURL": "",
}
WIDTH = 1000
"""Width of the PNG's layout in pixels, for figures without their own width."""

# Average width of a character over the font's size. DejaVu Sans, the widest of our fonts, has 0.50; the value
# here is a little larger, since lines differ. Bold is wider.
_CHARACTER, _BOLD = 0.53, 1.15
_TITLE_SIZE, _SUBTITLE_SIZE, _CAPTION_SIZE = 20, 14, 13
_LINE = 1.35
_PAD = 16

_PAGE = Path(__file__).parent / "templates" / "figure.html"


class SavedFigure(NamedTuple):
    """Files that `save` wrote."""

    png: Path | None
    """The still image; None if it could not be drawn."""
    html: Path
    """The interactive page."""
    reason: str
    """Why there is no PNG; "" if there is a PNG."""


def save(figure: go.Figure, stem: Path | str, *, caption: str) -> SavedFigure:
    """Write `<stem>.html` and `<stem>.png`; return their paths.

    The caption states model, text, tokens and seed, unless the subtitle does. If no Chrome can draw, no PNG
    is written (an older PNG is removed, since it would show other numbers) and the result holds the reason;
    see `drawing.draw`. On a page narrower than `layout.meta["min_width"]` pixels the plot scrolls sideways.
    """
    stem = Path(stem)
    title, _ = titles(figure)
    require(
        bool(title), "figure.layout.title.text", title, "a text (the builders of asi_lens.figures set it)"
    )
    require(bool(caption.strip()), "caption", caption, "a text")
    page, png = (stem.with_name(stem.name + suffix) for suffix in (".html", ".png"))
    script = shared_plotly_js(stem.parent)
    write_text(page, page_text(figure, caption=caption, plotly_js=_relative_url(script, stem.parent)))
    reason = draw(json.loads(for_paper(figure, caption).to_json()), png)
    return SavedFigure(None if reason else png, page, reason)


def page_text(figure: go.Figure, *, caption: str, plotly_js: str) -> str:
    """Return the interactive page as HTML text; the page loads plotly.js from the URL `plotly_js`."""
    title, subtitle = titles(figure)
    bare = go.Figure(figure)
    bare.update_layout(autosize=True, width=None)
    bare.layout.title = None  # update_layout would merge an empty title with the old title
    if figure.layout.margin.t is not None:
        bare.update_layout(margin_t=max(40, figure.layout.margin.t - _title_height(figure)))
    data = '{"config":' + json.dumps(CONFIG) + "," + bare.to_json()[1:]
    meta = figure.layout.meta or {}
    return Template(_PAGE.read_text(encoding="utf-8")).substitute(
        plain_title=html.escape(re.sub(r"<[^>]*>", "", title)),
        title=rich(title),
        subtitle=rich(subtitle),
        caption=rich(caption),
        min_width=int(meta.get("min_width", 320)),
        height=int(bare.layout.height or 450),
        plotly_js=html.escape(plotly_js),
        data=data.replace("</", "<\\/").replace("<!--", "<\\u0021--"),
    )


def for_paper(figure: go.Figure, caption: str) -> go.Figure:
    """Return a copy of the figure with title, subtitle and caption broken into lines that fit its width.

    The plot keeps its size; the figure grows by the height of the text.
    """
    paper = go.Figure(figure)
    width = figure.layout.width or WIDTH
    margin = figure.layout.margin
    left, top, bottom = margin.l or 80, margin.t or 80, margin.b or 70
    title, subtitle = titles(figure)
    room = width - 2 * _PAD
    title_lines = _wrap(title, round(room / _BOLD), _TITLE_SIZE)
    subtitle_lines = _wrap(subtitle, room, _SUBTITLE_SIZE)
    caption_lines = _wrap(caption, room, _CAPTION_SIZE)
    more_titles, more_subtitles = max(0, len(title_lines) - 1), max(0, len(subtitle_lines) - 1)
    grown_top = top + round(_LINE * (_TITLE_SIZE * more_titles + _SUBTITLE_SIZE * more_subtitles))
    grown_bottom = bottom + round(_LINE * _CAPTION_SIZE * len(caption_lines)) + _PAD
    height = (figure.layout.height or 450) + (grown_top - top) + (grown_bottom - bottom)
    head = f"<b>{'<br>'.join(title_lines)}</b>"
    if subtitle_lines:
        small = "<br>".join(subtitle_lines)
        head += f'<br><span style="font-size:{_SUBTITLE_SIZE}px;color:#555">{small}</span>'
    margins = {"t": grown_top, "b": grown_bottom}
    paper.update_layout(width=width, height=height, autosize=False, margin=margins)
    paper.layout.title = None
    # Annotations are placed relative to the plot's corners, so plotly must not change the margins.
    paper.update_xaxes(automargin=False)
    paper.update_yaxes(automargin=False)
    common = {"xref": "paper", "yref": "paper", "xanchor": "left", "align": "left", "showarrow": False}
    common |= {"x": 0, "xshift": _PAD - left, "yanchor": "top"}
    paper.add_annotation(text=head, y=1, yshift=grown_top - _PAD, font={"size": _TITLE_SIZE}, **common)
    paper.add_annotation(
        text="<br>".join(caption_lines),
        y=0,
        yshift=-bottom,
        font={"size": _CAPTION_SIZE, "color": "#333"},
        **common,
    )
    return paper


def rich(text: str) -> str:
    """Return text escaped for HTML, except the few tags (b, i, sub, sup) that plotly also supports."""
    return re.sub(r"&lt;(/?(?:b|i|sub|sup))&gt;", r"<\1>", html.escape(text))


def shared_plotly_js(folder: Path) -> Path:
    """Return the path of the local plotly.js for figures of `folder`; write a missing or outdated copy.

    Folders below the project's figures folder share one copy; a folder elsewhere has its own copy.
    """
    from plotly.offline import get_plotlyjs

    root = figures_root()
    folder = folder.resolve()
    path = (root if folder.is_relative_to(root.resolve()) else folder) / PLOTLY_JS
    text = get_plotlyjs()
    with locked(path.with_name(".plotly")):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return path


def titles(figure: go.Figure) -> tuple[str, str]:
    """Return the title and the subtitle of a figure; "" where it has none."""
    title = figure.layout.title
    return title.text or "", (title.subtitle.text if title.subtitle else "") or ""


def _title_height(figure: go.Figure) -> int:
    title, subtitle = titles(figure)
    return round(_LINE * (_TITLE_SIZE * bool(title) + _SUBTITLE_SIZE * bool(subtitle)))


def _wrap(text: str, width: int, size: int) -> list[str]:
    plain = " ".join(text.split())
    return textwrap.wrap(plain, max(20, int(width / (size * _CHARACTER))), break_long_words=True)


def _relative_url(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix())
