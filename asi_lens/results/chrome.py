"""The browser that draws static images: find, start or download a Chrome.

Plotly's kaleido drives a Chrome. `python -m asi_lens.results.chrome` (part of `make setup`) uses an installed
Chrome, else downloads one as `plotly_get_chrome` does. If neither works, the command prints what to install:
no module of this package installs system packages. Without a Chrome, figures are still written as HTML and
tables, and the reason for the missing images is printed.
"""

from __future__ import annotations

import asyncio
import functools
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from asi_lens.base.offline import VARIABLE, offline

# A browser set in one of these variables comes first. kaleido itself reads BROWSER_PATH.
VARIABLES = ("BROWSER_PATH", "CHROME")
# Names to try if the browser that kaleido would choose does not start (Ubuntu's `chromium-browser` may be a
# stub that only asks for a snap).
_NAMES = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser", "chrome", "microsoft-edge")
_INSTALL = "install one (Debian: `apt-get install chromium`; Ubuntu: Google's own package)"
_RETRY = f"run `python -m asi_lens.results.chrome` to download one, {_INSTALL}, or set BROWSER_PATH to one"


def chrome_or_reason() -> tuple[str | None, str]:
    """Return (path of a Chrome, ""), or (None, the reason why no Chrome was found).

    If `BROWSER_PATH` or `CHROME` names a browser that does not start, no other browser is tried.
    """
    for variable in VARIABLES:
        named = os.environ.get(variable)
        if named:
            path = shutil.which(named)
            if path and _starts(path):
                return path, ""
            return None, f"{variable}={named!r} does not start as a browser; correct the variable or unset it"
    tried = []
    for path in _candidates():
        if _starts(path):
            return path, ""
        tried.append(path)
    if tried:
        return None, f"no installed Chrome starts (tried: {', '.join(tried)}); {_RETRY}"
    return None, f"no Chrome or Chromium is installed; {_RETRY}"


def kaleido_options(chrome: str) -> dict[str, Any]:
    """Return the options of `kaleido.Kaleido(...)` and `kopts=` for `chrome`.

    The sandbox is off, since Chrome as root (containers, CI) does not start with a sandbox, and Chrome opens
    only our own page. MathJax is off, since kaleido would load MathJax from a server.
    """
    return {"path": chrome, "enable_sandbox": False, "mathjax": False}


def can_draw(chrome: str) -> str:
    """Draw a small figure with `chrome`; return "" if the result is a PNG, else the reason."""
    import kaleido

    figure = {"data": [{"type": "scatter", "y": [0, 1]}], "layout": {"title": {"text": "asi_lens"}}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figure.png")
        try:
            kopts = {**kaleido_options(chrome), "timeout": 60}
            asyncio.run(kaleido.write_fig(figure, path=path, kopts=kopts))  # in a browser of its own
            drawn = path.read_bytes()
        except Exception as error:  # setup continues after any error of a broken browser
            return f"{chrome} cannot draw: {type(error).__name__}: {error}"
    return "" if drawn.startswith(b"\x89PNG\r\n") else f"{chrome} wrote a file that is not a PNG"


def _candidates() -> list[str]:
    from choreographer.browsers.chromium import Chromium

    found = [Chromium.find_browser(skip_local=False), Chromium.find_browser(skip_local=True)]
    found += [shutil.which(name) for name in _NAMES]
    return list(dict.fromkeys(path for path in found if path))


@functools.cache
def _starts(path: str) -> bool:
    """Return whether `path --version` works; it fails if Chrome's system libraries are missing."""
    if platform.system() == "Windows":  # chrome.exe opens a window on --version
        return Path(path).is_file()
    try:
        done = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _download() -> str:
    """Download Chrome for Testing into kaleido's folder; return "", or the reason for the failure."""
    import kaleido

    if offline():
        return f"nothing is downloaded ({VARIABLE}=1)"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # the download sets no timeout and would hang if packets are lost
    try:
        path = str(kaleido.get_chrome_sync())
    except Exception as error:  # no network, an unsupported machine, a full disk
        return f"download failed: {error}"
    finally:
        socket.setdefaulttimeout(before)
    _starts.cache_clear()
    return "" if _starts(path) else f"the downloaded {path} does not start (system libraries missing?)"


def main() -> int:
    """Find or download a Chrome, draw a test figure and print the result.

    Always returns 0: missing PNGs are not a reason for a failed setup.
    """
    warnings.simplefilter("ignore")  # kaleido's warnings on Ubuntu would hide the lines printed below
    chrome, reason = chrome_or_reason()
    reasons = [reason]
    if chrome is None and not any(os.environ.get(variable) for variable in VARIABLES):
        print("No Chrome for static images yet. Downloading Chrome for Testing ...", flush=True)
        reasons.append(_download())
        chrome, _ = chrome_or_reason()
    broken = can_draw(chrome) if chrome else ""
    if chrome and not broken:
        print(f"Static images: {chrome}")
        return 0
    lines = [f"  - {text}" for text in ([broken] if chrome else reasons) if text]
    print(
        "*" * 100,
        "WARNING: figures will be written as HTML and CSV only. PNG images will be MISSING:",
        *lines,
        "*" * 100,
        sep="\n",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
