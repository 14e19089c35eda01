"""A headless Chrome for tests, by the library that draws our images."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Visit:
    """What a page asked for and complained about, and what a script found on it."""

    found: Any = None
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def visit(chrome: str, url: str, script: str, *, width: int = 1280, phone: bool = False) -> Visit:
    """Open `url`, wait until it has loaded, and evaluate `script` (a promise is awaited) there."""
    return asyncio.run(_visit(chrome, url, script, width, phone))


async def _visit(chrome: str, url: str, script: str, width: int, phone: bool) -> Visit:
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

        async def evaluate(expression: str) -> Any:
            asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
            answer = (await tab.send_command("Runtime.evaluate", asked))["result"]
            assert "exceptionDetails" not in answer, answer
            return answer["result"].get("value")

        for event, take in takers.items():
            tab.subscribe(event, note(take))
        for domain in ("Network", "Runtime", "Log", "Page"):
            await tab.send_command(f"{domain}.enable")
        metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": phone}
        await tab.send_command("Emulation.setDeviceMetricsOverride", metrics)
        await tab.send_command("Page.navigate", {"url": url})
        for _ in range(600):
            if await evaluate("document.readyState === 'complete' && location.href") == url:
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError(f"{url} did not load in a minute")
        out.found = await evaluate(script)
    return out
