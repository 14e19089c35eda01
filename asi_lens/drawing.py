"""Still images of figures, drawn by a browser that stays for the next one.

Starting Chrome and reading plotly.js into it takes seconds, a drawing tenths of one. So the first image of
a process starts a Chrome, and one that nobody has asked for anything for a while is closed. A process may
share its browser with those that it starts (`shared`).
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import secrets
import threading
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from asi_lens.chrome import chrome_or_reason, kaleido_options

IDLE_SECONDS = 60.0
"""A browser that has drawn nothing for so long is closed; the next image starts another."""
_CLOSE_SECONDS = 10.0
_SHARED = "ASI_LENS_DRAWING"
_READY, _IMAGE, _FAILED = b"ready", b"image ", b"failed "


def draw(figure: Mapping[str, Any], chrome: str, options: Mapping[str, Any]) -> bytes:
    """A figure as an image, drawn by `chrome`.

    Args:
        figure: as plotly's JSON has it. options: kaleido's (format, width, height, scale).

    Raises what kaleido raises, RuntimeError from a shared browser. After a failure, an interrupt too, the
    next image has a new browser; one that died since the last image is replaced at once.
    """
    if _SHARED in os.environ:
        with suppress(OSError, EOFError):  # the process that shared it is gone: so is its browser
            answer = _ask({"figure": figure, "chrome": chrome, "options": options})
            if answer.startswith(_IMAGE):
                return answer.removeprefix(_IMAGE)
            raise RuntimeError(answer.removeprefix(_FAILED).decode())
    return _own().draw(figure, chrome, options)


def prepare() -> None:
    """Start a browser in the background, if there is one, for an image that will be asked for soon."""
    if _SHARED in os.environ:
        with suppress(OSError, EOFError):
            _ask({})
    else:
        threading.Thread(target=_prepare, name="asi_lens drawing, start", daemon=True).start()


def _prepare() -> None:
    chrome, _ = chrome_or_reason()
    if chrome is not None:
        with suppress(Exception):  # `draw` tries again, and tells
            _own().open(chrome)


@contextmanager
def shared() -> Iterator[None]:
    """Processes that are started inside have their images drawn by this one's browser."""
    key = secrets.token_bytes(16)
    # As Jupyter's own: the path of a Unix socket may be too long where temporary files have a long one.
    with Listener(("127.0.0.1", 0), authkey=key) as listener:
        server = threading.Thread(target=_serve, args=(listener,), name="asi_lens drawing, shared")
        server.start()
        os.environ[_SHARED] = f"{key.hex()} {listener.address[1]}"
        try:
            yield
        finally:
            with suppress(OSError, EOFError):
                _ask(None)
            server.join()
            del os.environ[_SHARED]


def _serve(listener: Listener) -> None:
    """Answer one question per connection until one is None. Bytes only: nothing is unpickled."""
    while True:
        try:
            connection = listener.accept()
            asked = json.loads(connection.recv_bytes())
        except (OSError, EOFError, ValueError, AuthenticationError):  # gone, or none of ours
            continue
        if asked is None:
            connection.close()
            break
        threading.Thread(target=_answer, args=(connection, asked), daemon=True).start()


def _answer(connection: Connection, asked: Mapping[str, Any]) -> None:
    with connection, suppress(OSError):  # whoever asked is gone
        if not asked:
            connection.send_bytes(_READY)
            _prepare()
            return
        try:
            image = _own().draw(**asked)
        except Exception as error:
            connection.send_bytes(_FAILED + f"{type(error).__name__}: {error}".encode())
        else:
            connection.send_bytes(_IMAGE + image)


def _ask(question: Mapping[str, Any] | None) -> bytes:
    key, port = os.environ[_SHARED].split()
    with Client(("127.0.0.1", int(port)), authkey=bytes.fromhex(key)) as connection:
        connection.send_bytes(json.dumps(question).encode())
        return b"" if question is None else connection.recv_bytes()


class _Browser:
    """One kaleido on an event loop in a thread of its own: a notebook's loop is always busy."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="asi_lens drawing", daemon=True).start()
        self._kaleido: Any = None
        self._chrome = ""
        self._one = threading.Lock()
        self._idle: asyncio.TimerHandle | None = None

    def draw(self, figure: Mapping[str, Any], chrome: str, options: Mapping[str, Any]) -> bytes:
        unwanted = threading.Event()
        with self._one:
            future = self._begin(self._draw(figure, chrome, dict(options), unwanted))
            try:
                return future.result()
            except KeyboardInterrupt:
                unwanted.set()
                future.cancel()
                raise

    def open(self, chrome: str) -> None:
        with self._one:
            self._begin(self._prepare(chrome)).result()

    def close(self) -> None:
        with self._one:
            self._begin(self._close()).result(_CLOSE_SECONDS)

    def _begin(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _draw(
        self, figure: Mapping[str, Any], chrome: str, options: dict[str, Any], unwanted: threading.Event
    ) -> bytes:
        stayed = self._kaleido is not None and chrome == self._chrome
        try:
            await self._open(chrome)
            image: bytes = await self._kaleido.calc_fig(figure, opts=options)
        except BaseException as error:
            await self._close()
            if unwanted.is_set():  # nobody is there to be told in kaleido's words
                raise asyncio.CancelledError from None
            if stayed:  # it may have died while nobody looked
                return await self._draw(figure, chrome, options, unwanted)
            if isinstance(error, asyncio.CancelledError):  # by kaleido: the browser is gone
                raise RuntimeError("the browser closed") from error
            raise
        self._close_later()
        return image

    async def _prepare(self, chrome: str) -> None:
        try:
            await self._open(chrome)
        except BaseException:
            await self._close()
            raise
        self._close_later()

    async def _open(self, chrome: str) -> None:
        if self._idle is not None:
            self._idle.cancel()
        if chrome != self._chrome:
            await self._close()
        if self._kaleido is None:
            import kaleido

            self._kaleido, self._chrome = kaleido.Kaleido(**kaleido_options(chrome)), chrome
            await self._kaleido.open()

    def _close_later(self) -> None:
        self._idle = self._loop.call_later(IDLE_SECONDS, lambda: self._loop.create_task(self._close()))

    async def _close(self) -> None:
        kaleido, self._kaleido, self._chrome = self._kaleido, None, ""
        if kaleido is not None:
            # It may be dead, and nothing of it is needed.
            with suppress(Exception, asyncio.CancelledError):
                await kaleido.close()


_browser: _Browser | None = None
_starting = threading.Lock()


def _own() -> _Browser:
    global _browser
    with _starting:
        if _browser is None:
            _browser = _Browser()
        return _browser


@atexit.register
def close() -> None:
    """Close the browser of this process, if there is one."""
    if _browser is not None:
        _browser.close()


def _forget() -> None:
    """A forked process has its parent's browser in memory, but not the thread that serves it."""
    global _browser, _starting
    _browser, _starting = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
