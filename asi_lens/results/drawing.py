"""Still images of figures, drawn by a Chrome through kaleido.

Starting Chrome and loading plotly.js takes seconds; drawing one figure takes tenths of a second. A process
keeps one browser for all its images. A run of many notebooks sets `LATER`: figures are then saved as JSON,
and `draw_later` draws all figures of a folder together after the run, or on another machine.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from asi_lens.base.errors import DataError
from asi_lens.base.files import read_json, write_text, write_whole
from asi_lens.results.chrome import chrome_or_reason, kaleido_options

LATER = "ASI_LENS_DRAW_LATER"
"""Environment variable: not empty if images are drawn at the end of a run."""
WAITING = "not drawn yet"
SCALE = 2
"""Pixels of the PNG for each pixel of the layout."""
MOST_SECONDS = 60.0
"""Longest start of a browser, and longest drawing of a figure."""
_FOLDER = ".drawings"
_browser: Any = None
_loop: asyncio.AbstractEventLoop | None = None
T = TypeVar("T")


def draw(figure: Mapping[str, Any], png: Path) -> str:
    """Draw a figure (plotly's JSON) into the file `png`; return "", or the reason why there is no image.

    If the figure cannot be drawn, an older image is removed, since it would show other numbers. If `LATER` is
    set, the figure is saved for `draw_later` instead.
    """
    if os.environ.get(LATER):
        png.unlink(missing_ok=True)
        waiting = _waiting(png)
        waiting.parent.mkdir(parents=True, exist_ok=True)
        write_text(waiting, json.dumps(figure))
        return WAITING
    reason = _drawn(figure, png)
    if reason:
        png.unlink(missing_ok=True)
    return reason


def draw_later(pngs: list[Path]) -> dict[Path, str]:
    """Draw the saved figures of `pngs`; return the reason of each ("" if it was drawn).

    The result has no entry for an image without a saved figure. Raises DataError for a saved figure that
    cannot be read.
    """
    repair = "delete it and run its notebook again"
    waiting = {png: path for png in pngs if (path := _waiting(png)).is_file()}
    figures = {png: read_json(path, DataError, repair) for png, path in waiting.items()}
    reasons = {}
    for png, figure in figures.items():
        reasons[png] = _drawn(figure, png)
        if not reasons[png]:
            waiting[png].unlink()
    return reasons


def _drawn(figure: Mapping[str, Any], png: Path) -> str:
    """Draw into a file; return "" or the reason why not, whatever the browser does."""
    chrome, reason = chrome_or_reason()
    if chrome is None:
        return reason
    try:
        try:
            image = _image(figure, chrome)
        except TimeoutError:  # on a busy machine a browser hangs now and then: once is chance
            image = _image(figure, chrome)
    except Exception as error:  # a browser fails in many ways; the figure's page is written anyway
        return _told(chrome, error)
    with write_whole(png) as temporary:
        temporary.write_bytes(image)
    return ""


def _image(figure: Mapping[str, Any], chrome: str) -> bytes:
    """Return the image. A browser that fails or hangs is given up, and the next image has a new one."""
    global _browser
    try:
        if _browser is None:
            import kaleido

            _browser = kaleido.Kaleido(**kaleido_options(chrome))
            _waited(_browser.__aenter__(), MOST_SECONDS)
        return _waited(_browser.calc_fig(figure, opts=_options(figure)), MOST_SECONDS)
    except BaseException:
        close()
        raise


def close() -> None:
    """Close the browser that this process keeps, if there is one."""
    global _browser
    browser, _browser = _browser, None
    if browser is not None:
        with suppress(Exception):  # it has failed, or hangs
            _waited(browser.__aexit__(None, None, None), 10.0)


def _waited(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """Return what `work` returns, done in a thread of its own. Raises TimeoutError after `seconds`.

    Kaleido itself waits without end for a browser that hangs.
    """
    global _loop
    if _loop is None:
        _loop = asyncio.new_event_loop()
        Thread(target=_loop.run_forever, daemon=True, name="drawing").start()
        atexit.register(close)
    future = asyncio.run_coroutine_threadsafe(work, _loop)
    try:
        return future.result(seconds)
    except BaseException:
        future.cancel()
        raise


def _options(figure: Mapping[str, Any]) -> dict[str, Any]:
    size = {side: figure["layout"][side] for side in ("width", "height")}
    return {"format": "png", "scale": SCALE, **size}


def _told(chrome: str, error: Exception) -> str:
    why = f"no answer in {MOST_SECONDS:g} s" if isinstance(error, TimeoutError) else str(error)
    return f"{Path(chrome).name} could not draw the figure: {type(error).__name__}: {why}"


def _waiting(png: Path) -> Path:
    return png.parent / _FOLDER / f"{png.stem}.json"
