"""Images: drawn at once by a notebook alone, together at the end of a run, and told where they are not."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import kaleido
import plotly.graph_objects as go
import pytest

from asi_lens.base.errors import DataError
from asi_lens.results import chrome, drawing
from asi_lens.results.drawing import LATER, WAITING, draw, draw_later

FIGURE: dict[str, Any] = {"data": [{"y": [0, 1]}], "layout": {"width": 300, "height": 200}}


class Browser:
    """Stands for kaleido's: what it was asked for, and what it fails at."""

    opened = 0
    closed = 0
    fails: tuple[int, ...] = ()
    begins = True
    hangs = 0  # first starts that never end

    def __init__(self, **options: Any) -> None:
        assert options["path"] == "/usr/bin/chrome"

    async def __aenter__(self) -> Browser:
        if not Browser.begins:
            raise RuntimeError("no display")
        Browser.opened += 1
        if Browser.opened <= Browser.hangs:
            await asyncio.sleep(600)
        return self

    async def __aexit__(self, *error: object) -> None:
        Browser.closed += 1

    async def calc_fig(self, figure: Any, opts: Any) -> bytes:
        if figure["layout"]["width"] in Browser.fails:
            raise ValueError("too wide")
        return f"{opts['format']} {opts['width']}x{opts['height']} at {opts['scale']}".encode()


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> type[Browser]:
    monkeypatch.setattr(drawing, "chrome_or_reason", lambda: ("/usr/bin/chrome", ""))
    monkeypatch.setattr(kaleido, "Kaleido", Browser)
    monkeypatch.setattr(drawing, "_browser", None)
    for name, value in (("opened", 0), ("closed", 0), ("fails", ()), ("begins", True), ("hangs", 0)):
        monkeypatch.setattr(Browser, name, value)
    return Browser


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LATER, "1")


def sized(width: int) -> dict[str, Any]:
    return {**FIGURE, "layout": {"width": width, "height": 200}}


def test_figures_wait_and_one_browser_draws_them_all(
    later: None, browser: type[Browser], tmp_path: Path
) -> None:
    pngs = [tmp_path / f"01_{width}.1.png" for width in (300, 400)]
    pngs[0].write_bytes(b"an image of other numbers")
    for png, width in zip(pngs, (300, 400), strict=True):
        assert draw(sized(width), png) == WAITING
        assert not png.exists()
    other = tmp_path / "02_other.png"
    assert draw_later([*pngs, other]) == dict.fromkeys(pngs, "")
    assert [png.read_bytes() for png in pngs] == [b"png 300x200 at 2", b"png 400x200 at 2"]
    assert browser.opened == 1
    assert draw_later(pngs) == {}, "nothing waits any more"
    assert browser.opened == 1


def test_one_that_fails_costs_its_own_image_and_may_be_tried_again(
    later: None, browser: type[Browser], tmp_path: Path
) -> None:
    pngs = [tmp_path / f"01_{width}.png" for width in (300, 400)]
    for png, width in zip(pngs, (300, 400), strict=True):
        draw(sized(width), png)
    browser.fails = (300,)
    assert draw_later(pngs) == {
        pngs[0]: "chrome could not draw the figure: ValueError: too wide",
        pngs[1]: "",
    }
    assert [png.exists() for png in pngs] == [False, True]
    browser.fails = ()
    assert draw_later(pngs) == {pngs[0]: ""}


def test_without_a_browser_they_go_on_waiting(
    later: None, browser: type[Browser], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png = tmp_path / "01_a.png"
    draw(FIGURE, png)
    browser.begins = False
    assert draw_later([png]) == {png: "chrome could not draw the figure: RuntimeError: no display"}
    monkeypatch.setattr(drawing, "chrome_or_reason", lambda: (None, "no Chrome"))
    assert draw_later([png]) == {png: "no Chrome"}
    monkeypatch.setattr(drawing, "chrome_or_reason", lambda: ("/usr/bin/chrome", ""))
    browser.begins = True
    assert draw_later([png]) == {png: ""}


def test_a_browser_that_hangs_is_not_waited_for(
    later: None, browser: type[Browser], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png = tmp_path / "01_a.png"
    draw(FIGURE, png)
    monkeypatch.setattr(drawing, "MOST_SECONDS", 0.05)
    browser.hangs = 2
    told = "chrome could not draw the figure: TimeoutError: no answer in 0.05 s"
    assert draw_later([png]) == {png: told}
    assert (browser.opened, browser.closed) == (2, 2), "once is chance"
    browser.hangs = 3
    assert draw_later([png]) == {png: ""}, "it went on waiting, and the second browser answers"
    assert (browser.opened, browser.closed) == (4, 3)


def test_a_waiting_figure_that_is_damaged_is_named(
    later: None, browser: type[Browser], tmp_path: Path
) -> None:
    png = tmp_path / "01_a.png"
    draw(FIGURE, png)
    (tmp_path / ".drawings" / "01_a.json").write_text("{")
    with pytest.raises(DataError, match=r"01_a\.json cannot be read"):
        draw_later([png])


def test_alone_a_failure_is_told_and_an_older_image_goes(
    browser: type[Browser], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    png = tmp_path / "01_a.png"
    png.write_bytes(b"an image of other numbers")
    browser.fails = (300,)
    assert draw(FIGURE, png) == "chrome could not draw the figure: ValueError: too wide"
    assert not png.exists()
    browser.fails = ()
    assert draw(FIGURE, png) == draw(FIGURE, png) == ""
    assert (browser.opened, browser.closed) == (2, 1), "another browser after the failure, kept from then on"
    monkeypatch.setattr(drawing, "chrome_or_reason", lambda: (None, "no Chrome"))
    assert draw(FIGURE, png) == "no Chrome"


@pytest.mark.gallery
def test_a_real_browser_draws_now_and_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reason = chrome.chrome_or_reason()
    if path is None:
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    figure = json.loads(go.Figure(go.Scatter(y=[1, 2]), layout={"width": 300, "height": 200}).to_json())
    now, later = tmp_path / "01_now.png", tmp_path / "01_later.png"
    drawing.close()
    assert draw(figure, now) == ""
    assert draw(figure, now) == ""
    monkeypatch.setenv(LATER, "1")
    draw(figure, later)
    assert draw_later([later]) == {later: ""}
    drawing.close()
    assert now.read_bytes()[:8] == later.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
