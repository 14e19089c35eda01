"""Draw the run of a million features on a card: benchmarks/gpu/headline.csv to docs/headline.png.

    PYTHONPATH=. python benchmarks/headline.py

The run itself (benchmarks/gpu/README.md) trained three dictionaries side by side on one stream of batches, by
`al.Trainer` with `kernels="triton"`, as notebook 06 does with `together` in the profile `gpu`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from asi_lens import figures
from asi_lens.reproduce.publish import copy_small
from asi_lens.results.figure_files import save
from asi_lens.results.rows import DeadFeatureRow
from asi_lens.results.tables import frame

HERE = Path(__file__).parent
METHODS = {
    "random_adam": ("random", "random", "adam"),
    "asi_adam": ("ASI", "asi", "adam"),
    "asi_sparse_adam": ("ASI + sparse Adam", "asi", "sparse_adam"),
}
WINDOW = 10_000_000  # tokens


def table(run: Mapping[str, Any]) -> pd.DataFrame:
    """Curves over training and held-out ends, as the notebooks have them."""
    parts, asked = run["parts"], run["arguments"]
    what = {key: parts["unpack"][key] for key in ("model", "corpus", "site", "layer")}
    same = {"aux_k": 0, "d_sae": asked["d_sae"], "k": asked["k"], "lr": asked["lr"], "seed": asked["seed"]}
    loss = dict.fromkeys(("cross_entropy_delta", "cross_entropy_delta_error", "kl"))
    rows = []
    for name, curve in pd.read_csv(HERE / "gpu" / "headline.csv").groupby("method"):
        method, init, optimizer = METHODS[str(name)]
        d_init = parts[f"start {name}"]["d_init"]
        about = {**what, "method": method, "init": init, "d_init": d_init, "optimizer": optimizer, **same}
        for point in curve.itertuples():
            dead = 0.0 if pd.isna(point.dead_10M) else point.dead_10M
            seen = {"tokens": point.tokens, "dead_window_tokens": WINDOW, "dead_fraction": dead}
            rows.append({**about, **seen, "split": "train", "fvu": point.fvu_batch, "l0": None, **loss})
        end = parts["final"][name]
        held = {"tokens": parts["train"]["tokens"], "dead_window_tokens": end["rows"], "split": "held_out"}
        numbers = {"dead_fraction": end["silent"], "fvu": end["fvu"], "l0": end["l0"]}
        rows.append({**about, **held, **numbers, **loss})
    return frame([DeadFeatureRow(**row) for row in rows])


def main() -> None:
    """Write the picture."""
    run = json.loads((HERE / "gpu" / "headline.json").read_text(encoding="utf-8"))
    parts, batch = run["parts"], run["arguments"]["batch"]
    tokens, epochs = parts["train"]["tokens"], parts["train"]["epochs"]
    budget = f"{tokens:,} tokens ({epochs:.0f} passes over {parts['moments']['n']:,}), batches of {batch:,}"
    caption = (
        f"{budget}, one seed, {parts['machine']['card']}, {parts['train']['seconds']:.0f} s for all three."
    )
    with tempfile.TemporaryDirectory() as folder:  # it leaves a page beside the picture
        saved = save(figures.dead_feature_curves(table(run)), Path(folder, "headline"), caption=caption)
        if saved.png is None:
            raise SystemExit(saved.reason)
        copy_small(saved.png, HERE.parent / "docs" / "headline.png")


if __name__ == "__main__":
    main()
