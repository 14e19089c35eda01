"""What a person sees of a run: how far it is, and how long the rest takes."""

from __future__ import annotations

import io

import pytest

from asi_lens.reproduce import board as module
from asi_lens.reproduce.board import Bars, Board, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_the_rest_takes_what_it_took_before(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    board = Board({"a": None, "b": 60.0, "c": 30.0, "d": None})
    assert board.seconds_left() is None, "nothing is known yet"
    board.up_to_date("d")
    board.running("a", "not run yet")
    clock[0] += 10
    assert board.finished("a") == 10
    assert board.seconds_left() == pytest.approx(90)
    board.running("b", "asked for")
    clock[0] += 20
    assert board.seconds_left() == pytest.approx(70)
    told = capsys.readouterr().out
    assert "[1/4] d: up to date" in told
    assert "[2/4] a: done in 10 s; about 1 min 30 s left" in told
    board.finished("b")
    board.running("c", "asked for")
    board.finished("c")
    assert board.seconds_left() is None


def test_two_at_a_time_take_half(clock: list[float]) -> None:
    board = Board({"a": None, "b": None, "c": 40.0})
    board.running("a", "x")
    board.running("b", "x")
    clock[0] += 20
    board.finished("a")
    board.finished("b")
    assert board.seconds_left() == pytest.approx(20), "40 s of work, at two seconds of work a second"


def test_one_that_takes_longer_than_before_does_not_count_backwards(clock: list[float]) -> None:
    board = Board({"a": 5.0, "b": 5.0})
    board.running("a", "x")
    clock[0] += 5
    board.finished("a")
    board.running("b", "x")
    clock[0] += 500
    assert board.seconds_left() == 0


def test_a_terminal_has_a_line_for_each_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Line(io.StringIO):
        ncols = 40
        text, closed_by_board = "", False

        def __bool__(self) -> bool:
            return False  # as tqdm's without a total

        def set_description_str(self, text: str) -> None:
            self.text = text

        def close(self) -> None:
            self.closed_by_board = True

    lines: dict[str, Line] = {}
    monkeypatch.setattr(module, "_line", lambda name: lines.setdefault(name, Line()))
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True)
    board = Board({"a": None, "b": None})
    board.running("a", "x")
    board.running("b", "x")
    board.tell("a", "cell 3 of 9 " + "." * 100)
    board.tell("b", "training 45 %")
    assert lines["a"].text.startswith("  a: cell 3 of 9")
    assert len(lines["a"].text) == 40, "a line is cut where the terminal ends"
    assert lines["b"].text == "  b: training 45 %"
    board.finished("a")
    assert lines["a"].closed_by_board
    board.tell("a", "too late")
    board.stopped("b")
    assert lines["b"].closed_by_board


def test_bars_tell_their_newest_line() -> None:
    told: list[str] = []
    bars = Bars(told.append)
    for text in ("\r 10 %", "\r 20 %\n", "\n", "\r 30 %\r 40 %"):
        assert bars.write(text) == len(text)
    assert told == ["10 %", "20 %", "40 %"]
    assert bars.text == "40 %"


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (185.0, "3 min 5 s")])
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told
