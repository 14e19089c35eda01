"""How time and memory of training grow with the size of the dictionary, k, width and tokens.

    python benchmarks/growth.py [--largest 1048576] [--steps 4] [--plot docs/growth.png]

One quantity is varied at a time, every point in a process of its own: median seconds of `Trainer.step`
(row-sparse Adam), and peak resident memory above what was resident before the dictionary was made, when the
rows, which are mapped from disk, had been read once. The exponent is that of a power law through the
points (least squares on logarithms): 1 is linear, 0 is flat.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_step import forget_peak, peak_mib, rows
from ways import seconds

from asi_lens.activations.store import ActivationStore
from asi_lens.inputs.models import resolve_device
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.train import Trainer
from asi_lens.training.config import TrainConfig

BASE = {"d_sae": 16_384, "k": 32, "d_in": 576, "tokens": 16_384, "batch": 1024}
VARIED: dict[str, list[int]] = {
    "d_sae": [2**power for power in range(12, 21)],
    "k": [8, 16, 32, 64, 128],
    "d_in": [144, 288, 576, 1152, 2304],
    "tokens": [2**power for power in range(14, 19)],
}


def measure(
    d_sae: int, k: int, d_in: int, tokens: int, batch: int, *, steps: int, device: torch.device
) -> dict[str, float]:
    """Seconds of a step and MiB, at one point."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.npy")
        np.save(path, rows(tokens, d_in).numpy())
        store = ActivationStore.from_tensor(path)
        spectrum, sample = store.spectrum, store.sample(batch)
        forget_peak(device)
        before = peak_mib(device)
        sae = SparseAutoencoder(SAEConfig(d_in, d_sae, k), draw=False).to(device)
        initialize(sae, "random", spectrum, None, sample)
        config = TrainConfig(batch_size=batch, n_tokens=batch * (steps + 1), optimizer="sparse_adam")
        trainer = Trainer(sae, config)
        took = []
        for rows_of_step in store.batches(batch, n_tokens=config.n_tokens):
            start = seconds(device)
            trainer.step(rows_of_step)
            took.append(seconds(device) - start)
    return {"seconds": statistics.median(took[1:]), "peak_mib": peak_mib(device) - before}


def exponent(x: list[float], y: list[float]) -> float:
    """Of the power law through the points."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory against each quantity, on logarithmic axes."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from asi_lens.figures.style import COLORS
    from asi_lens.results.figure_files import save

    names = {"d_sae": "features (d_sae)", "k": "k", "d_in": "width (d_in)", "tokens": "tokens of the store"}
    figure = make_subplots(2, len(names), shared_xaxes=True, shared_yaxes=True, vertical_spacing=0.06)
    for column, (varied, name) in enumerate(names.items(), start=1):
        own = [point for point in points if point["varied"] == varied]
        x = [point[varied] for point in own]
        for row, key in enumerate(("seconds", "peak_mib"), start=1):
            y = [point[key] for point in own]
            line = go.Scatter(
                x=x, y=y, mode="lines+markers", marker_color=COLORS["mlp_out"], showlegend=False
            )
            figure.add_trace(line, row, column)
            ticks = x[:: 1 + len(x) // 6]
            shown = [f"{tick >> 10}k" if tick >= 4096 else f"{tick}" for tick in ticks]
            figure.update_xaxes(type="log", tickvals=ticks, ticktext=shown, tickangle=0, row=row, col=column)
            figure.update_yaxes(type="log", dtick=1, row=row, col=column)
        figure.update_xaxes(title=name, row=2, col=column)
    figure.update_yaxes(title="seconds of a step", row=1, col=1)
    figure.update_yaxes(title="peak memory, MiB", row=2, col=1)
    figure.update_layout(title="How a training step grows", template="plotly_white", height=640)
    base = ", ".join(f"{key} {value:,}" for key, value in BASE.items())
    with tempfile.TemporaryDirectory() as folder:  # it leaves a page beside the picture
        saved = save(
            figure,
            Path(folder, "growth"),
            caption=f"Around {base}; row-sparse Adam, exact search. On the axes 1k is 1,024.",
        )
        if saved.png is None:
            raise SystemExit(saved.reason)
        shutil.copyfile(saved.png, path)


def main() -> None:
    """Print one JSON object."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--largest", type=int, default=2**20, help="features")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", type=resolve_device, default="cpu")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(**json.loads(args.point), steps=args.steps, device=args.device)))
        return
    points: list[dict[str, Any]] = []
    for varied, values in VARIED.items():
        for value in values:
            if varied == "d_sae" and value > args.largest:
                continue
            point = {**BASE, varied: value}
            options = [f"--steps={args.steps}", f"--device={args.device}"]
            command = [sys.executable, __file__, *options, "--point", json.dumps(point)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            points.append({"varied": varied, **point, **json.loads(done.stdout.splitlines()[-1])})
            print(json.dumps(points[-1]), file=sys.stderr, flush=True)
    growth = {
        varied: {
            key: round(exponent([p[varied] for p in own], [p[key] for p in own]), 2)
            for key in ("seconds", "peak_mib")
        }
        for varied in VARIED
        if (own := [point for point in points if point["varied"] == varied])
    }
    if args.plot:
        plot(points, args.plot)
    assert all(math.isfinite(value) for one in growth.values() for value in one.values())
    print(json.dumps({"exponents": growth, "points": points, "threads": torch.get_num_threads()}, indent=1))


if __name__ == "__main__":
    main()
