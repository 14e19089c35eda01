"""Answers on the last steps before death, and on death by learning rate, on made-up tables."""

from __future__ import annotations

import math

import pandas as pd
from made_up_beyond import lives, steps

from asi_lens.results.last_step_verdicts import death_by_rate, last_steps


def told(table: pd.DataFrame) -> list[str]:
    """Bias, norm, angle."""
    return [one.answer for one in last_steps(table)]


def test_what_falls_before_death_falls_more_than_in_live_features() -> None:
    falls = steps(lambda group, *_: -0.2 if group == "died" else -0.1)
    # The cosine begins at -0.5 and moves to -0.3: it turns away from the mean, too.
    assert told(falls) == ["yes", "yes", "yes"]
    assert last_steps(falls)[0].numbers == "change -0.2, of live features -0.1; 8 of 8 cases"
    assert told(steps(lambda group, *_: -0.1)) == ["no"] * 3, "as in live features"
    assert told(steps(lambda group, *_: 0.2 if group == "died" else 0.1)) == ["no"] * 3
    once = steps(
        lambda group, optimizer, lr, seed: -0.2 if group == "died" and (lr, seed) != (2e-3, 1) else -0.1
    )
    assert told(once) == ["no"] * 3
    assert last_steps(once)[0].numbers.endswith("6 of 8 cases")


def test_cases_without_deaths_say_nothing() -> None:
    falls = steps(
        lambda group, *_: -0.2 if group == "died" else -0.1, lambda optimizer, *_: 9 * (optimizer == "adam")
    )
    assert last_steps(falls)[0].numbers.endswith("4 of 4 cases")
    assert told(steps(lambda *_: 0.1, lambda *_: 0)) == ["not testable here"] * 3
    assert told(falls.assign(norm=math.nan)) == ["yes", "not testable here", "yes"]


def test_death_by_learning_rate() -> None:
    table = lives(lambda *_: 0.1, lambda *_: 0.1)
    table = table[table.init == "random"]
    two = pd.concat([table, table.assign(lr=2e-3, dead=2 * table.dead)])
    found = death_by_rate(two)
    assert [one.answer for one in found] == ["yes", "yes"]
    assert found[0].numbers == "20.00 % at 0.001, 40.00 % at 0.002; 2 of 2 seeds"
    fewer = two.assign(
        dead=two.dead.where((two.lr < 2e-3) | (two.optimizer == "adam") | (two.seed == 0), 0.01)
    )
    assert [one.answer for one in death_by_rate(fewer)] == ["yes", "no"]
    assert [one.answer for one in death_by_rate(table)] == ["not testable here"] * 2, "one rate"
    assert [one.answer for one in death_by_rate(two.assign(dead=0.0))] == ["not testable here"] * 2
