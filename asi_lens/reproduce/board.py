"""Display of a run: the running notebooks, the progress of each, and the remaining time.

On a terminal every running notebook has its own line below the log; elsewhere only the log is printed.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping
from threading import RLock
from typing import Any

Tell = Callable[[str], None]


class Board:
    """The log of a run and, on a terminal, a line per running notebook."""

    def __init__(self, expected: Mapping[str, float | None]):
        """`expected`: seconds that each notebook may take; None if not known."""
        self._expected = dict(expected)
        self._total = len(expected)
        self._began: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._lines: dict[str, Any] = {}
        self._count = 0
        self._lock = RLock()

    def up_to_date(self, name: str) -> None:
        """Log that the notebook is up to date and does not run."""
        with self._lock:
            del self._expected[name]
            self._count += 1
            self._log(f"[{self._count}/{self._total}] {name}: up to date")

    def running(self, name: str, why: str) -> None:
        """Log that the notebook starts, and why; add its line."""
        with self._lock:
            self._began[name] = time.monotonic()
            self._log(f"{name}: running ({why})")
            if sys.stderr.isatty():
                self._lines[name] = _line(name)

    def tell(self, name: str, text: str) -> None:
        """Show the notebook's newest progress text on its line."""
        with self._lock:
            line = self._lines.get(name)
            if line is not None:  # a bar without a total is false
                line.set_description_str(f"  {name}: {text}"[: line.ncols or 100])

    def finished(self, name: str) -> float:
        """Log that the notebook is done; return its seconds."""
        with self._lock:
            seconds = time.monotonic() - self._began[name]
            self._done[name] = seconds
            self.stopped(name)
            left = self.seconds_left()
            more = f"; about {duration(left)} left" if left else ""
            self._count += 1
            self._log(f"[{self._count}/{self._total}] {name}: done in {duration(seconds)}{more}")
            return seconds

    def stopped(self, name: str) -> None:
        """Remove the line of a notebook that does not run any more."""
        with self._lock:
            line = self._lines.pop(name, None)
            if line is not None:
                line.close()

    def seconds_left(self) -> float | None:
        """Return the remaining seconds, or None if no notebook is left or no notebook is done.

        The estimate assumes that notebooks overlap as much as before. A notebook without expected seconds
        counts as the mean of the finished notebooks.
        """
        now = time.monotonic()
        todo = [name for name in self._expected if name not in self._done]
        if not todo or not self._done:
            return None
        mean = sum(self._done.values()) / len(self._done)
        known = {name: mean if (found := self._expected[name]) is None else found for name in todo}
        spent = {name: now - self._began[name] for name in todo if name in self._began}
        work = sum(max(known[name] - spent.get(name, 0.0), 0.0) for name in todo)
        elapsed = now - min(self._began.values())
        return work * elapsed / (sum(self._done.values()) + sum(spent.values()))

    def _log(self, text: str) -> None:
        if self._lines:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stdout)
        else:
            print(text, flush=True)


class Bars(io.TextIOBase):
    """A stream for progress bars that passes the newest line to the function `tell`."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self.text = ""

    def write(self, text: str) -> int:
        """Take the printed text of a bar; carriage returns begin a new line."""
        last = [part for part in text.replace("\r", "\n").split("\n") if part.strip()][-1:]
        if last:
            self.text = last[0].strip()
            self._tell(self.text)
        return len(text)


def duration(seconds: float) -> str:
    """Return a duration in words: `3 min 5 s`, `41 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _line(name: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=0, bar_format="{desc}", desc=f"  {name}", leave=False)
