"""A headless Chrome for tests, by the library that draws our images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Visit:
    """What a page asked for and complained about, and what a script found on it."""

    found: Any = None
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@dataclass
class Tab:
    """A page in the browser; `seen` is what it asked for and complained about so far."""

    command: Callable[[str, dict[str, Any]], Awaitable[Any]]
    """Send a command of the Chrome DevTools protocol; returns its result."""
    seen: Visit

    async def evaluate(self, expression: str) -> Any:
        """Return the value of a script (a promise is awaited)."""
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = await self.command("Runtime.evaluate", asked)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str, what: str, seconds: float = 60) -> Any:
        """Return the value of a script as soon as it is true."""
        for _ in range(int(10 * seconds)):
            if found := await self.evaluate(expression):
                return found
            await asyncio.sleep(0.1)
        raise AssertionError(f"{what}: not within {seconds} s")

    async def drag(self, x: float, y: float, to_x: float) -> None:
        """Press the mouse at a point, move it to the side in steps, and let go."""
        button = {"button": "left", "clickCount": 1, "y": y}
        await self.command("Input.dispatchMouseEvent", {"type": "mousePressed", "x": x, **button})
        for step in range(1, 6):
            at = x + (to_x - x) * step / 5
            moved = {"type": "mouseMoved", "x": at, "y": y, "button": "left", "buttons": 1}
            await self.command("Input.dispatchMouseEvent", moved)
        await self.command("Input.dispatchMouseEvent", {"type": "mouseReleased", "x": to_x, **button})


def visit(chrome: str, url: str, script: str, *, width: int = 1280, phone: bool = False) -> Visit:
    """Open `url`, wait until it has loaded, and evaluate `script` (a promise is awaited) there."""

    async def look() -> Visit:
        async with opened(chrome, url, width=width, phone=phone) as tab:
            loaded = f"document.readyState === 'complete' && location.href === {url!r}"
            await tab.until(loaded, f"loading {url}")
            tab.seen.found = await tab.evaluate(script)
        return tab.seen

    return asyncio.run(look())


@asynccontextmanager
async def opened(
    chrome: str, url: str, *, width: int = 1280, height: int = 800, phone: bool = False
) -> AsyncIterator[Tab]:
    """Yield a tab that goes to `url`."""
    from choreographer import Browser

    out = Visit()

    def note(take: Callable[[dict], None]) -> Callable[[dict], Awaitable[None]]:
        async def callback(event: dict) -> None:
            take(event["params"])

        return callback

    takers = {
        "Network.requestWillBeSent": lambda p: out.requests.append(p["request"]["url"]),
        "Runtime.exceptionThrown": lambda p: out.complaints.append(str(p["exceptionDetails"])),
        "Log.entryAdded": lambda p: out.complaints.append(str(p["entry"])),
        # Whatever it is, ours is a quiet page.
        "Runtime.consoleAPICalled": lambda p: out.complaints.append(str(p["args"])),
    }
    async with Browser(path=chrome, enable_sandbox=False) as browser:
        tab = await browser.create_tab("about:blank")

        async def command(name: str, asked: dict[str, Any]) -> Any:
            return (await tab.send_command(name, asked)).get("result")

        for event, take in takers.items():
            tab.subscribe(event, note(take))
        for domain in ("Network", "Runtime", "Log", "Page"):
            await command(f"{domain}.enable", {})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        await command("Emulation.setDeviceMetricsOverride", metrics)
        await command("Page.navigate", {"url": url})
        yield Tab(command, out)
