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
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from threading import Thread
from typing import Any

from asi_lens.results.chrome import chrome_or_reason, kaleido_options

IDLE_SECONDS = 60.0
"""A browser that has drawn nothing for so long is closed; the next image starts another."""
_CLOSE_SECONDS, _ANSWER_SECONDS = 10.0, 300.0
_SHARED = "ASI_LENS_DRAWING"


def draw(figure: Mapping[str, Any], chrome: str, options: Mapping[str, Any]) -> bytes:
    """A figure as an image, drawn by `chrome`.

    Args:
        figure: as plotly's JSON has it. options: kaleido's (format, width, height, scale).

    Raises what kaleido raises, RuntimeError from a shared browser. After a failure, an interrupt too, the
    next image has a new browser; one that died since the last image is replaced at once.
    """
    if _SHARED in os.environ:
        with suppress(OSError, HTTPException):  # the process that shared it is gone: so is its browser
            return _ask({"figure": figure, "chrome": chrome, "options": options})
    return _own().draw(figure, chrome, options)


def prepare() -> None:
    """Start a browser in the background, if there is one, for an image that will be asked for soon."""
    if _SHARED in os.environ:
        with suppress(OSError, HTTPException):
            _ask({})
    else:
        Thread(target=_prepare, name="asi_lens drawing, start", daemon=True).start()


def _prepare() -> None:
    chrome, _ = chrome_or_reason()
    if chrome is not None:
        with suppress(Exception):  # `draw` tries again, and tells
            _own().open(chrome)


@contextmanager
def shared() -> Iterator[None]:
    """Processes that are started inside have their images drawn by this one's browser."""
    with _Server(("127.0.0.1", 0), _Answer) as server:
        Thread(target=server.serve_forever, name="asi_lens drawing, shared", daemon=True).start()
        os.environ[_SHARED] = f"{server.server_address[1]} {server.key}"
        try:
            yield
        finally:
            del os.environ[_SHARED]
            server.shutdown()


class _Server(ThreadingTCPServer):
    """Not HTTPServer, which asks the name service for its own name."""

    daemon_threads = True
    key = secrets.token_hex(16)


class _Answer(BaseHTTPRequestHandler):
    """The image of a figure, or why there is none; an empty question asks to get ready."""

    timeout = 60  # seconds, for somebody who connects and says nothing

    def do_POST(self) -> None:
        """Answer one question."""
        if not secrets.compare_digest(self.headers.get("Authorization", ""), _Server.key):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not asked:
            self._send(HTTPStatus.OK, b"")
            _prepare()
            return
        try:
            image = _own().draw(**asked)
        except Exception as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}".encode())
        else:
            self._send(HTTPStatus.OK, image)

    def _send(self, status: HTTPStatus, body: bytes) -> None:
        with suppress(OSError):  # whoever asked is gone
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing to tell."""


def _ask(question: Mapping[str, Any]) -> bytes:
    port, key = os.environ[_SHARED].split()
    # Not urllib, which would ask a proxy for it.
    with closing(HTTPConnection("127.0.0.1", int(port), timeout=_ANSWER_SECONDS)) as connection:
        connection.request("POST", "/", json.dumps(question), {"Authorization": key})
        answer = connection.getresponse()
        body = answer.read()
    if answer.status != HTTPStatus.OK:
        raise RuntimeError(body.decode(errors="replace"))
    return body


class _Browser:
    """One kaleido on an event loop in a thread of its own: a notebook's loop is always busy."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="asi_lens drawing", daemon=True).start()
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
