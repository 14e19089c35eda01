"""Curves of FVU and dead features that grow in a notebook's output while `fit` runs: `live`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import plotly.graph_objects as go

from asi_lens.base.doors import checked
from asi_lens.base.errors import OptionError, require
from asi_lens.base.facts import facts_html
from asi_lens.figures.panels import FVU
from asi_lens.figures.parts import panels
from asi_lens.figures.style import PLOTLY
from asi_lens.training.learner import StepOutput

MOST_POINTS = 1_000
"""Largest number of drawn points of a curve, besides its last point."""
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

Publish = Callable[[dict[str, Any]], None]
"""Shows a bundle (MIME type to content) in the place of the bundle before."""


class Live:
    """Curves of trainers' logged rows; call an instance with a trainer and the output of its step.

    `every_s`: seconds between two drawings. A trainer's last row is always drawn; after an interruption,
    `draw` draws the rows so far.
    """

    def __init__(self, every_s: float, publish: Publish):
        self.every_s, self._publish = every_s, publish
        self._curves: list[list[tuple[int, float, float]]] = []
        # A curve stays when its trainer is gone.
        self._of: WeakKeyDictionary[Any, list[tuple[int, float, float]]] = WeakKeyDictionary()
        self._window = 0
        self._drawn_at = -math.inf

    def __call__(self, trainer: Any, output: Any) -> None:
        """Add a row, and draw if the last drawing is `every_s` seconds ago or the training is over.

        Raises OptionError unless called with a trainer and a `StepOutput`.
        """
        if not isinstance(output, StepOutput) or not hasattr(trainer, "config"):
            raise OptionError(
                "al.live() is called with a trainer and the output of its step: fit(on_log=...)"
            )
        rows = self._of.get(trainer)
        if rows is None:
            self._curves.append(rows := [])
            self._of[trainer] = rows
        # A trainer that is fitted again from an earlier state (`load_state`) draws over its later rows.
        while rows and rows[-1][0] >= output.tokens:
            rows.pop()
        rows.append((output.tokens, output.fvu, 100 * output.dead_fraction))
        self._window = trainer.config.dead_window
        over = output.tokens >= trainer.config.n_tokens
        if over or time.monotonic() - self._drawn_at >= self.every_s:
            self.draw()

    def draw(self) -> None:
        """Draw the rows so far in the place of the last drawing."""
        last = [rows[-1] for rows in self._curves]
        names = [f"dictionary {i}" if len(last) > 1 else "now" for i in range(1, len(last) + 1)]
        facts = {
            name: f"{tokens:,} tokens: FVU {fvu:.3f}, dead {dead:.1f} %"
            for name, (tokens, fvu, dead) in [*zip(names, last, strict=True)][:12]
        }
        self._publish(
            {
                PLOTLY: json.loads(self.figure().to_json()),
                # For front ends that draw no plotly figures.
                "text/html": facts_html("Training", facts),
                "text/plain": "; ".join(f"{name}: {text}" for name, text in facts.items()),
            }
        )
        self._drawn_at = time.monotonic()

    def figure(self) -> go.Figure:
        """Return the rows so far as a figure: FVU, and dead features, against training tokens."""
        many = len(self._curves) > 1
        titles = ["FVU, training batches", "dead features"]
        figure = panels("Training", "", [titles], shared_y=False, legend=many, plot=260)
        for i, rows in enumerate(self._curves):
            step = -(-len(rows) // MOST_POINTS)
            shown = rows[::step] + rows[-1:] * ((len(rows) - 1) % step > 0)
            for col in (1, 2):
                figure.add_scatter(
                    x=[row[0] for row in shown],
                    y=[row[col] for row in shown],
                    mode="lines+markers",
                    line={"color": _COLORS[i % len(_COLORS)], "width": 2},
                    marker={"size": 4},  # a single row is a point, not a line
                    name=f"dictionary {i + 1}",
                    legendgroup=str(i),
                    showlegend=many and col == 1,
                    hovertemplate="%{x:,} tokens: %{y:.4g}<extra></extra>",
                    row=1,
                    col=col,
                )
        figure.update_xaxes(title_text="training tokens", tickformat="~s", rangemode="tozero")
        figure.update_yaxes(title_text=FVU, type="log", row=1, col=1)
        y = f"features without a firing in<br>the last {self._window:,} tokens (%)"
        figure.update_yaxes(title_text=y, rangemode="tozero", row=1, col=2)
        return figure


@checked
def live(every_s: float = 1.0) -> Live:
    """Return a function for `fit(on_log=...)` that draws FVU and dead features while a training runs.

    The curves are one output of the cell, which is drawn anew at most every `every_s` seconds, for rows that
    `fit` logs (`log_every`). With `train_together`, every dictionary has its own line. Raises OptionError for
    `every_s` below 1, and outside a notebook, where there is no output to draw in (`metrics.csv` and
    `fit`'s result have the rows).
    """
    require(1 <= every_s < math.inf, "every_s", every_s, "at least 1 (second), and finite")
    return Live(every_s, _output())


def _output() -> Publish:
    """Return a function that shows a bundle as one output of the cell that runs."""
    from IPython import get_ipython
    from IPython.display import display

    # IPython in a terminal has a shell but not a kernel, and would print a line per drawing.
    if getattr(get_ipython(), "kernel", None) is None:
        raise OptionError(
            "al.live() draws in a notebook (JupyterLab, VS Code); here is none: leave on_log out"
        )
    handle: Any = None

    def publish(bundle: dict[str, Any]) -> None:
        nonlocal handle
        if handle is None:
            handle = display(bundle, raw=True, display_id=True)
        else:
            # JupyterLab reuses the renderer of an output whose MIME type stays, and plotly's renderer draws
            # its first figure only. So another type comes between two figures, as high as they are.
            height = bundle[PLOTLY]["layout"]["height"]
            handle.update({"text/html": f'<div style="height:{height}px"></div>'}, raw=True)
            handle.update(bundle, raw=True)

    return publish
