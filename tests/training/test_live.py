"""The live curves hold every logged row, are drawn at most once a second, and need a notebook."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from small_trainings import make, quick, small_store

import asi_lens as al
from asi_lens.base.errors import OptionError
from asi_lens.sae.train import Trainer
from asi_lens.training import live as module
from asi_lens.training.learner import StepOutput
from asi_lens.training.live import MOST_POINTS, PLOTLY, Live
from asi_lens.training.loop import train_together


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


class SomeTrainer:
    config = SimpleNamespace(dead_window=4096, n_tokens=10**6)


def row(tokens: int, fvu: float = 0.5, dead: float = 0.1) -> StepOutput:
    return StepOutput(1, tokens, 1.0, 0.0, 0.0, fvu, 8.0, dead, 1e-3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_rows_become_curves_of_fvu_and_percent_dead() -> None:
    shown: list[dict[str, Any]] = []
    live, trainer = Live(1.0, shown.append), SomeTrainer()
    live(trainer, row(64, 0.9, 0.5))
    live(trainer, row(128, 0.4, 0.25))
    fvu, dead = live.figure().data
    assert (list(fvu.x), list(fvu.y)) == ([64, 128], [0.9, 0.4])
    assert (list(dead.x), list(dead.y)) == ([64, 128], [50, 25])
    assert "the last 4,096 tokens (%)" in live.figure().layout.yaxis2.title.text


def test_a_training_draws_the_rows_that_it_logs() -> None:
    shown: list[dict[str, Any]] = []
    trainer = Trainer(make(), quick())
    history = trainer.fit(small_store(), log_every=10, progress=False, on_log=Live(1.0, shown.append))
    fvu, dead = shown[-1][PLOTLY]["data"]
    assert fvu["x"] == [one["tokens"] for one in history]
    assert fvu["y"] == pytest.approx([one["fvu"] for one in history])
    assert dead["y"] == pytest.approx([100 * one["dead_fraction_256"] for one in history])
    assert f"{64 * 30:,} tokens" in shown[-1]["text/html"]


def test_trainers_side_by_side_have_a_curve_each() -> None:
    shown: list[dict[str, Any]] = []
    trainers = [Trainer(make(), quick()), Trainer(make(), quick(lr=1e-4))]
    live = Live(1.0, shown.append)
    histories = train_together(trainers, small_store(), log_every=10, progress=False, on_log=live)
    curves = [trace for trace in live.figure().data if trace.showlegend]
    assert [trace.name for trace in curves] == ["dictionary 1", "dictionary 2"]
    for trace, history in zip(curves, histories, strict=True):
        assert list(trace.y) == pytest.approx([one["fvu"] for one in history])
    del trainers
    assert len(live.figure().data) == 4, "a curve stays when its trainer is gone"


def test_drawings_wait_for_a_second_and_the_last_row_does_not(clock: Clock) -> None:
    shown: list[dict[str, Any]] = []
    live, trainer = Live(1.0, shown.append), SomeTrainer()
    drawn = []
    for tokens, now in ((1, 0.0), (2, 0.5), (3, 0.99), (4, 1.0), (5, 1.9), (6, 2.0)):
        clock.now = now
        live(trainer, row(tokens))
        drawn.append(len(shown))
    assert drawn == [1, 1, 1, 2, 2, 3]
    live(trainer, row(10**6))
    assert shown[-1][PLOTLY]["data"][0]["x"] == [1, 2, 3, 4, 5, 6, 10**6]
    clock.now = 2.5
    live(SomeTrainer(), row(7))
    live.draw()
    assert len(shown) == 5, "asked for, it draws at once"


def test_long_trainings_are_drawn_with_fewer_points_up_to_the_last(clock: Clock) -> None:
    live, trainer = Live(1e6, lambda bundle: None), SomeTrainer()
    for tokens in range(1, 3 * MOST_POINTS + 3):
        live(trainer, row(tokens))
    drawn = list(live.figure().data[0].x)
    assert len(drawn) <= MOST_POINTS + 1
    assert (drawn[0], drawn[-1]) == (1, 3 * MOST_POINTS + 2)


def test_a_state_from_before_is_drawn_over_later_rows() -> None:
    live, trainer = Live(1.0, lambda bundle: None), SomeTrainer()
    for tokens in (10, 20, 30, 20, 25):
        live(trainer, row(tokens))
    assert list(live.figure().data[0].x) == [10, 20, 25]


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    shown: list[dict[str, Any]] = []
    Live(1.0, shown.append)(SomeTrainer(), row(1, fvu=math.nan))
    assert shown[-1][PLOTLY]["data"][0]["y"] == [None]


@pytest.mark.parametrize("every_s", [0, 0.5, math.inf, -1, "1", None])
def test_a_wait_below_a_second_is_refused(every_s: Any) -> None:
    with pytest.raises(OptionError, match="every_s"):
        al.live(every_s)


def test_outside_a_notebook_it_is_refused() -> None:
    with pytest.raises(OptionError, match="draws in a notebook"):
        al.live()


@pytest.mark.parametrize("wrong", [{"fvu": 0.5}, None, (64, 0.5)])
def test_a_row_of_another_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(OptionError, match="on_log"):
        Live(1.0, lambda bundle: None)(SomeTrainer(), wrong)
    with pytest.raises(OptionError, match="on_log"):
        Live(1.0, lambda bundle: None)({"step": 1}, row(1))


def test_in_a_notebook_one_output_is_drawn_anew() -> None:
    code = (
        "import torch, asi_lens as al\n"
        "rows = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))\n"
        "store = al.ActivationStore.from_tensor(rows)\n"
        "sae = al.SparseAutoencoder(al.SAEConfig(8, 16, 2))\n"
        "al.initialize(sae, 'random', sample=store.sample(64))\n"
        "trainer = al.Trainer(sae, al.TrainConfig(n_tokens=512, batch_size=64))\n"
        "history = trainer.fit(store, log_every=1, progress=False, on_log=al.live())\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    bundles = []

    class Watching(NotebookClient):
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            if msg["msg_type"] in ("display_data", "update_display_data"):
                bundles.append((msg["msg_type"], PLOTLY in msg["content"]["data"]))
            return super().process_message(msg, cell, cell_index)

    Watching(notebook, timeout=120, kernel_name="python3").execute()
    assert bundles[0] == ("display_data", True)
    # Between two figures comes something else, without which JupyterLab would draw the first figure only.
    assert bundles[1:3] == [("update_display_data", False), ("update_display_data", True)]
    [output] = notebook.cells[0].outputs
    assert output.data[PLOTLY]["data"][0]["x"] == list(range(64, 513, 64))
    assert "512 tokens" in output.data["text/html"]
