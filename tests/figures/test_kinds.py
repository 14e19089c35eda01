"""Figures of other kinds of dictionaries draw what their table holds."""

from __future__ import annotations

from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

from asi_lens.base.errors import DataError, UnknownNameError
from asi_lens.experiments.recipes import DICTIONARIES, dictionary_recipe
from asi_lens.figures import kinds as module
from asi_lens.results.rows import DictionaryRow, DriftRow, frame
from asi_lens.sae.drift import COLUMNS

SCHEDULES = {"random, low l0": 30.0, "random, high l0": 20.0, "ASI, low l0": 2.0, "ASI, high l0": 12.0}
SEEDS = (0, 1, 2)
END = 1000


def values(method: str, seed: int, dead: float, **changed: Any) -> dict[str, Any]:
    asi = "ASI" in method
    return {
        "model": "m",
        "corpus": "news",
        "site": "attn_out",
        "layer": 3,
        "method": method,
        "init": "asi" if asi else "random",
        "d_init": 16 if asi else None,
        "optimizer": "adam",
        "aux_k": 0,
        "d_sae": 64,
        "k": None,
        "lr": 1e-3,
        "seed": seed,
        "tokens": END,
        "split": "held_out",
        "dead_window_tokens": 4096,
        "dead_fraction": dead,
        "fvu": 0.3,
        "l0": 8.0,
        "cross_entropy_delta": 0.1,
        "cross_entropy_delta_error": 0.01,
        "kl": 0.2,
        "activation": "jumprelu",
        **changed,
    }


def schedules() -> pd.DataFrame:
    rows = []
    for method, percent in SCHEDULES.items():
        for seed in SEEDS:
            dead = (percent + seed) / 100
            about = {"initial_l0": 80.0 if "high" in method else None, "d_active": 16}
            for tokens in range(200, END + 1, 200):
                inside = (1.0 if "ASI" in method else 0.25) - tokens / 10_000 - 0.01 * seed
                about |= dict.fromkeys(COLUMNS, inside)
                for window in (100, 400):
                    train = {"tokens": tokens, "split": "train", "dead_window_tokens": window}
                    share = {"dead_fraction": dead, "cross_entropy_delta": None, "l0": 100 - tokens / 20}
                    rows.append(DriftRow(**values(method, seed, dead, **about, **train) | share))
            rows.append(DriftRow(**values(method, seed, dead, **about)))
    return frame(rows)


def kinds() -> pd.DataFrame:
    rows = []
    for i, kind in enumerate(DICTIONARIES):
        for start in ("random", "ASI"):
            for seed in SEEDS:
                dead = ((40 if start == "random" else 4) + i + seed) / 100
                rows.append(DictionaryRow(**values(f"{kind}, {start}", seed, dead), dictionary=kind))
    return frame(rows)


def dots(figure: go.Figure) -> list[Any]:
    return [trace for trace in figure.data if trace.mode == "markers" and trace.x[0] is not None]


def test_a_schedule_shows_drift_beside_dead_features() -> None:
    figure = module.jumprelu_schedule(schedules())
    titles = [note.text for note in figure.layout.annotations]
    for title in ("Dead features, training", "Features per token, training", "Decoder rows inside"):
        assert any(title in text for text in titles)
    axes = " ".join(axis.title.text or "" for axis in figure.select_yaxes())
    assert "last 400 tokens" in axes
    assert "top 16" in axes
    lines = {
        trace.name: trace for trace in figure.data if trace.xaxis == "x3" and trace.showlegend is not None
    }
    drift = [trace for trace in figure.data if trace.xaxis == "x3" and trace.mode and "lines" in trace.mode]
    ends = sorted(float(trace.y[-1]) for trace in drift if len(trace.y) == 5)
    assert ends == pytest.approx([14, 14, 89, 89])
    assert lines


def test_every_kind_has_a_pair() -> None:
    figure = module.dictionaries(kinds())
    silent = [trace for trace in dots(figure) if trace.xaxis == "x"]
    assert len(silent) == 2 * len(DICTIONARIES)
    assert [round(float(value)) for value in silent[1].y] == [4, 5, 6]
    assert sorted({trace.name for trace in silent}) == ["ASI", "random"]
    assert sum(bool(trace.showlegend) for trace in figure.data) == 2
    assert list(figure.layout.xaxis.ticktext) == list(DICTIONARIES)


def test_tables_that_cannot_be_drawn_are_refused() -> None:
    table = kinds()
    with pytest.raises(DataError, match="draws one layer"):
        module.dictionaries(pd.concat([table, table.assign(layer=4)]))
    with pytest.raises(DataError, match="not a table of DriftRow"):
        module.jumprelu_schedule(table)
    with pytest.raises(DataError, match="no measured held_out row"):
        module.dictionaries(table.assign(split="train"))


def test_kinds_of_dictionary_are_recipes() -> None:
    for kind in DICTIONARIES:
        assert dictionary_recipe(kind, 512).name == kind
    assert dictionary_recipe("Matryoshka BatchTopK", 512).sparsity.prefixes == (32, 64, 128, 256)
    with pytest.raises(UnknownNameError, match="Gated"):
        dictionary_recipe("Gaited", 512)
