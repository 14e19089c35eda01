"""What a person sees of a run: which notebooks run, how far each is, and how long the rest takes.

On a terminal every running notebook has a line of its own below the log; elsewhere only the log is printed.
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
        """`expected`: seconds that each notebook may take, None where nothing is known of it."""
        self._expected = dict(expected)
        self._total = len(expected)
        self._began: dict[str, float] = {}
        self._done: dict[str, float] = {}
        self._lines: dict[str, Any] = {}
        self._count = 0
        self._lock = RLock()

    def up_to_date(self, name: str) -> None:
        """The notebook does not have to run."""
        with self._lock:
            del self._expected[name]
            self._count += 1
            self._log(f"[{self._count}/{self._total}] {name}: up to date")

    def running(self, name: str, why: str) -> None:
        """The notebook begins."""
        with self._lock:
            self._began[name] = time.monotonic()
            self._log(f"{name}: running ({why})")
            if sys.stderr.isatty():
                self._lines[name] = _line(name)

    def tell(self, name: str, text: str) -> None:
        """The newest of what the notebook says of its progress."""
        with self._lock:
            line = self._lines.get(name)
            if line is not None:  # a bar of nothing counts as false
                line.set_description_str(f"  {name}: {text}"[: line.ncols or 100])

    def finished(self, name: str) -> float:
        """The notebook is done; returns its seconds."""
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
        """The notebook runs no more; its line goes."""
        with self._lock:
            line = self._lines.pop(name, None)
            if line is not None:
                line.close()

    def seconds_left(self) -> float | None:
        """Seconds that the rest takes if nothing overlaps more than so far; None if nothing is left or known.

        A notebook that nothing is known of counts as the mean of those that are done.
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
    """A stream for progress bars that tells the newest line to whoever shows it."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self.text = ""

    def write(self, text: str) -> int:
        """Take what a bar prints; carriage returns begin a new line."""
        last = [part for part in text.replace("\r", "\n").split("\n") if part.strip()][-1:]
        if last:
            self.text = last[0].strip()
            self._tell(self.text)
        return len(text)


def duration(seconds: float) -> str:
    """`3 min 5 s`, `41 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _line(name: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=0, bar_format="{desc}", desc=f"  {name}", leave=False)
