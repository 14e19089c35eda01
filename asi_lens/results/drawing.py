"""Still images of figures, drawn by a Chrome through kaleido.

Starting Chrome and loading plotly.js takes seconds; drawing one figure takes tenths of a second. A single
notebook keeps one browser for all its images. A run of many notebooks sets `LATER`: figures are then saved as
JSON, and `draw_later` draws all figures of a folder together after the run, or on another machine.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from asi_lens.base.errors import DataError
from asi_lens.base.files import read_json, write_text, write_whole
from asi_lens.results.chrome import chrome_or_reason, kaleido_options

LATER = "ASI_LENS_DRAW_LATER"
"""Environment variable: not empty if images are drawn at the end of a run."""
WAITING = "not drawn yet"
SCALE = 2
"""Pixels of the PNG for each pixel of the layout."""
START_SECONDS = 90.0
"""Longest start of a browser. Kaleido limits the drawing of a figure, but waits for a browser that hangs."""
_FOLDER = ".drawings"
_serving = False


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
    chrome, reason = chrome_or_reason()
    if chrome is not None:
        try:
            _serve(chrome)
            import kaleido

            return _write(png, kaleido.calc_fig_sync(figure, opts=_options(figure)))
        except Exception as error:  # a browser fails in many ways; the figure's page is written anyway
            reason = _told(chrome, error)
    png.unlink(missing_ok=True)
    return reason


def draw_later(pngs: list[Path]) -> dict[Path, str]:
    """Draw the saved figures of `pngs` with one browser; return the reason of each ("" if it was drawn).

    The result has no entry for an image without a saved figure. Raises DataError for a saved figure that
    cannot be read.
    """
    repair = "delete it and run its notebook again"
    waiting = {png: path for png in pngs if (path := _waiting(png)).is_file()}
    figures = {png: read_json(path, DataError, repair) for png, path in waiting.items()}
    chrome, reason = chrome_or_reason()
    if not figures or chrome is None:
        return dict.fromkeys(figures, reason)
    return asyncio.run(_draw_all(figures, chrome))


async def _draw_all(figures: Mapping[Path, Mapping[str, Any]], chrome: str) -> dict[Path, str]:
    import kaleido

    reasons = {}
    try:
        async with AsyncExitStack() as opened:
            async with asyncio.timeout(START_SECONDS):
                browser = await opened.enter_async_context(kaleido.Kaleido(**kaleido_options(chrome)))
            for png, figure in figures.items():
                try:
                    reasons[png] = _write(png, await browser.calc_fig(figure, opts=_options(figure)))
                    _waiting(png).unlink()
                except Exception as error:
                    reasons[png] = _told(chrome, error)
    except Exception as error:  # the browser failed to start or to end: drawn images stay
        reasons = {png: reasons.get(png, _told(chrome, error)) for png in figures}
    return reasons


def _serve(chrome: str) -> None:
    """Start the browser that this process keeps, on the first call."""
    global _serving
    if not _serving:
        import kaleido

        kaleido.start_sync_server(silence_warnings=True, **kaleido_options(chrome))
        atexit.register(kaleido.stop_sync_server, silence_warnings=True)
        _serving = True


def _options(figure: Mapping[str, Any]) -> dict[str, Any]:
    size = {side: figure["layout"][side] for side in ("width", "height")}
    return {"format": "png", "scale": SCALE, **size}


def _write(png: Path, image: bytes) -> str:
    with write_whole(png) as temporary:
        temporary.write_bytes(image)
    return ""


def _told(chrome: str, error: Exception) -> str:
    return f"{Path(chrome).name} could not draw the figure: {type(error).__name__}: {error}"


def _waiting(png: Path) -> Path:
    return png.parent / _FOLDER / f"{png.stem}.json"
