"""The browser that draws images: it stays, is replaced when it dies, and is closed when nobody needs it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kaleido
import pytest

from asi_lens.results import chrome, drawing

OPTIONS = {"format": "png", "width": 300, "height": 200}
FIGURE: dict[str, Any] = {"data": [{"type": "scatter", "y": [0, 1]}], "layout": {}}


class Fake:
    """A kaleido that counts; `fails` has what the next calls raise (None: nothing)."""

    opened: list[str]
    closed: int
    fails: list[BaseException | None]
    slow: bool

    def __init__(self, *, path: str, **_: object) -> None:
        self.path = path

    async def open(self) -> None:
        Fake.opened.append(self.path)

    async def calc_fig(self, figure: object, opts: dict[str, Any]) -> bytes:
        if Fake.slow:
            await asyncio.sleep(60)
        error = Fake.fails.pop(0) if Fake.fails else None
        if error is not None:
            raise error
        return f"{self.path} {opts['format']}".encode()

    async def close(self) -> None:
        Fake.closed += 1
        raise RuntimeError("already dead")


@pytest.fixture(autouse=True)
def own_browser(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(drawing, "_browser", None)
    yield
    drawing.close()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    Fake.opened, Fake.closed, Fake.fails, Fake.slow = [], 0, [], False
    monkeypatch.setattr(kaleido, "Kaleido", Fake)
    return Fake


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_one_browser_draws_all_images(fake: type[Fake]) -> None:
    images = [drawing.draw(FIGURE, "a", OPTIONS) for _ in range(3)]
    assert images == [b"a png"] * 3
    assert fake.opened == ["a"]
    drawing.close()
    assert fake.closed == 1, "an error while closing is none of the figure's"


def test_another_chrome_takes_the_place_of_the_first(fake: type[Fake]) -> None:
    assert [drawing.draw(FIGURE, path, OPTIONS) for path in ("a", "b")] == [b"a png", b"b png"]
    assert fake.opened == ["a", "b"]
    assert fake.closed == 1


def test_threads_take_turns(fake: type[Fake]) -> None:
    images: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: images.append(drawing.draw(FIGURE, "a", OPTIONS))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert images == [b"a png"] * 8
    assert fake.opened == ["a"]


def test_a_failure_of_a_new_browser_is_told_and_of_one_that_stayed_is_mended(fake: type[Fake]) -> None:
    fake.fails = [RuntimeError("cannot start")]
    with pytest.raises(RuntimeError, match="cannot start"):
        drawing.draw(FIGURE, "a", OPTIONS)
    fake.fails = [None, RuntimeError("died")]
    assert drawing.draw(FIGURE, "a", OPTIONS) == b"a png"
    assert drawing.draw(FIGURE, "a", OPTIONS) == b"a png"
    assert fake.opened == ["a", "a", "a"]
    assert fake.closed == 2
    fake.fails = [RuntimeError("died"), RuntimeError("again")]
    with pytest.raises(RuntimeError, match="again"):
        drawing.draw(FIGURE, "a", OPTIONS)


def test_an_idle_browser_is_closed(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "IDLE_SECONDS", 0.05)
    drawing.draw(FIGURE, "a", OPTIONS)
    wait_for(lambda: fake.closed == 1)
    assert drawing.draw(FIGURE, "a", OPTIONS) == b"a png"
    assert fake.opened == ["a", "a"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers that interrupt")
def test_an_interrupt_stops_the_drawing_and_the_next_one_works(fake: type[Fake]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    fake.slow = True
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            drawing.draw(FIGURE, "a", OPTIONS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    wait_for(lambda: fake.closed == 1)
    fake.slow = False
    assert drawing.draw(FIGURE, "a", OPTIONS) == b"a png"


@pytest.mark.gallery
def test_a_browser_killed_between_two_images_is_replaced() -> None:
    import psutil

    path, reason = chrome.chrome_or_reason()
    if path is None:
        pytest.skip(reason)
    first = drawing.draw(FIGURE, path, OPTIONS)
    for process in psutil.Process().children(recursive=True):
        if Path(path).stem in process.name():
            process.kill()
    assert drawing.draw(FIGURE, path, OPTIONS) == first
    assert first.startswith(b"\x89PNG\r\n")


# --- one browser for several processes --------------------------------------------------------------

DRAW = """
import sys
from asi_lens.results import drawing
drawing._own = lambda: sys.exit("a browser of its own")
drawing.prepare()
sys.stdout.buffer.write(drawing.draw({"data": []}, "a", {"format": "png"}))
"""


def started() -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", DRAW], capture_output=True, check=False)


def test_processes_that_are_started_inside_use_the_shared_browser(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "chrome_or_reason", lambda: ("a", ""))
    with drawing.shared():
        done = [started() for _ in range(2)]
        assert [one.stdout for one in done] == [b"a png"] * 2, done[0].stderr
        assert fake.opened == ["a"]
        fake.fails = [RuntimeError("died"), RuntimeError("cannot draw this")]
        with pytest.raises(RuntimeError, match="RuntimeError: cannot draw this"):
            drawing.draw(FIGURE, "a", OPTIONS)
        assert drawing.draw(FIGURE, "a", OPTIONS) == b"a png"
    assert b"a browser of its own" in started().stderr


def test_strangers_are_refused_and_hold_nobody_up(fake: type[Fake]) -> None:
    with drawing.shared():
        ours = os.environ[drawing._SHARED]
        port = ours.split()[0]
        with socket.create_connection(("127.0.0.1", int(port))):  # and says nothing
            os.environ[drawing._SHARED] = f"{port} {'00' * 16}"
            with pytest.raises(RuntimeError, match="Forbidden"):
                drawing._ask({})
            os.environ[drawing._SHARED] = ours
            assert drawing.draw(FIGURE, "a", OPTIONS) == b"a png"
    assert drawing._SHARED not in os.environ


def test_without_the_process_that_shared_it_images_are_drawn_here(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    with drawing.shared():
        gone = os.environ[drawing._SHARED]
    monkeypatch.setenv(drawing._SHARED, gone)
    assert drawing.draw(FIGURE, "a", OPTIONS) == b"a png"
    drawing.prepare()
