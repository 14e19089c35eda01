"""Finding a browser: which one is taken, when one is refused, and what is told without any."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import kaleido
import pytest

from asi_lens.results import chrome

Browser = Callable[..., str]


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No browser named in the environment or installed, and nothing remembered of earlier ones."""
    for variable in chrome.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(chrome, "_candidates", list)
    chrome._starts.cache_clear()


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    """A script in a browser's place that exits with `code` on `--version`."""
    if sys.platform == "win32":
        pytest.skip("shell scripts")

    def make(name: str = "chrome", code: int = 0) -> str:
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit {code}\nexit 3\n')
        path.chmod(0o755)
        return str(path)

    return make


def test_without_any_browser_the_reason_says_what_to_do() -> None:
    found, reason = chrome.chrome_or_reason()
    assert found is None
    assert "no Chrome or Chromium is installed" in reason
    assert "python -m asi_lens.results.chrome" in reason
    assert "BROWSER_PATH" in reason
    assert "apt-get install chromium" in reason


def test_the_first_candidate_that_starts_is_taken(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, good = browser("stub", code=1), browser("good")
    monkeypatch.setattr(chrome, "_candidates", lambda: [broken, good])
    assert chrome.chrome_or_reason() == (good, "")


def test_a_browser_that_does_not_start_is_named(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = browser("stub", code=127)
    monkeypatch.setattr(chrome, "_candidates", lambda: [broken])
    found, reason = chrome.chrome_or_reason()
    assert found is None
    assert broken in reason


@pytest.mark.parametrize("variable", chrome.VARIABLES)
def test_a_browser_named_by_hand_wins(
    variable: str, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, mine = browser("other"), browser("mine")
    monkeypatch.setattr(chrome, "_candidates", lambda: [other])
    monkeypatch.setenv(variable, mine)
    assert chrome.chrome_or_reason() == (mine, "")


@pytest.mark.parametrize("variable", chrome.VARIABLES)
def test_a_wrong_name_is_refused_and_nothing_else_used(
    variable: str, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = browser("other")
    monkeypatch.setattr(chrome, "_candidates", lambda: [other])
    monkeypatch.setenv(variable, "/no/such/chrome")
    found, reason = chrome.chrome_or_reason()
    assert found is None
    assert f"{variable}='/no/such/chrome'" in reason


def test_a_name_on_the_path_will_do(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    path = browser("my-chrome")
    monkeypatch.setenv("PATH", str(Path(path).parent))
    monkeypatch.setenv("CHROME", "my-chrome")
    assert chrome.chrome_or_reason() == (path, "")


def test_without_a_download_setup_goes_on_installs_nothing_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chrome, "_download", lambda: "download failed: no route to host")
    monkeypatch.setattr(chrome.subprocess, "run", lambda *command, **_: pytest.fail(f"ran {command}"))
    assert chrome.main() == 0
    told = capsys.readouterr().err
    assert "PNG images will be MISSING" in told
    assert "no route to host" in told
    assert "Debian: `apt-get install chromium`" in told


def test_setup_takes_the_browser_that_was_downloaded(
    browser: Browser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = browser()

    def download() -> str:
        monkeypatch.setattr(chrome, "_candidates", lambda: [path])
        return ""

    monkeypatch.setattr(chrome, "_download", download)
    monkeypatch.setattr(chrome, "can_draw", lambda _: "")
    assert chrome.main() == 0
    assert capsys.readouterr().out.endswith(f"Static images: {path}\n")


def test_setup_fetches_nothing_over_a_browser_named_by_hand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/no/such/chrome")
    monkeypatch.setattr(chrome, "_download", lambda: pytest.fail("downloaded against the user's choice"))
    assert chrome.main() == 0
    assert "BROWSER_PATH" in capsys.readouterr().err


def test_a_failed_download_is_told_and_leaves_the_timeout_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline() -> str:
        assert socket.getdefaulttimeout() is not None
        raise OSError("Name or service not known")

    monkeypatch.setattr(kaleido, "get_chrome_sync", offline)
    before = socket.getdefaulttimeout()
    assert chrome._download() == "download failed: Name or service not known"
    assert socket.getdefaulttimeout() == before


def test_a_browser_that_cannot_draw_is_told_not_raised(browser: Browser) -> None:
    path = browser()
    assert path in chrome.can_draw(path)


def test_an_installed_browser_draws_a_png(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found, reason = chrome.chrome_or_reason()
    if found is None:
        pytest.skip(reason)
    assert chrome.can_draw(found) == ""
