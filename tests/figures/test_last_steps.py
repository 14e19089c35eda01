"""The figure of the last steps draws what its table holds."""

from __future__ import annotations

import pytest
from drawn import names_its_setting_and_refuses_other_tables
from made_up_beyond import steps

from asi_lens.figures.last_steps import last_steps


def test_it_names_its_setting_and_refuses_other_tables() -> None:
    names_its_setting_and_refuses_other_tables(last_steps, lambda: steps(lambda *_: 0.1))


def test_a_line_per_optimizer_and_rate_and_a_dashed_one_for_live_features() -> None:
    figure = last_steps(steps(lambda group, optimizer, lr, seed: -0.2 * (group == "died") + 0.1 * seed))
    lines = [t for t in figure.data if t.mode == "lines" and t.hoverinfo != "skip" and t.x[0] is not None]
    names = {"adam, lr 0.001", "adam, lr 0.002", "sparse_adam, lr 0.001", "sparse_adam, lr 0.002"}
    assert {t.name for t in lines} == names
    bias = {t.line.dash: t for t in lines if t.xaxis == "x" and t.name == "adam, lr 0.001"}
    assert list(bias["solid"].x) == [-200, -100, 0, 100]
    assert list(bias["solid"].y) == pytest.approx([0, -0.075, -0.15, -0.225])
    assert list(bias["dash"].y) == pytest.approx([0, 0.025, 0.05, 0.075])
    assert {t.xaxis for t in lines} == {"x", "x2", "x3"}
