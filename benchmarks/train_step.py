"""One training step beside the peers, from one start on the same batches, in one run.

    make setup-peers
    .venv/bin/python benchmarks/train_step.py --harvest rows.npy
    .venv-peers/bin/python benchmarks/train_step.py --rows rows.npy [--d-sae 16384] [--batch 2048]

All take turns, round after round: the encoder's matrix product alone (a bound for a dense encoder), our
`Trainer.step` with each optimizer and inside the top directions, dense PyTorch, and the TopK autoencoders of
sparsify, SAELens and dictionary_learning where they can be imported. Peak memory is that of a process of its
own. FVU is on held-out rows after the same steps. All start as ASI starts. What takes longer than half a
minute a step takes part in three rounds, with one to warm up instead of nine. Rows are attention outputs of a
packaged model, or without `--rows` Gaussian. Quote the ratios: tokens/s depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ways import PEERS, WAYS, Task, seconds

import asi_lens as al
from asi_lens.activations.store import ActivationStore
from asi_lens.inputs.models import resolve_device, resolve_dtype
from asi_lens.kernels.devices import card
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize

_MEMORY_STEPS = 3
# A search is measured after 1, 2, 4 and 8 steps, and hardly ever after that.
_WARM_UP = 9
_SLOW_SECONDS, _SLOW_ROUNDS = 30, 3


def rows(n: int, d_in: int) -> torch.Tensor:
    """Rows whose singular values fall by a factor of 30 over the width."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d_in, generator=generator) * torch.logspace(0, -1.5, d_in)


def harvest(path: str, n: int) -> None:
    """Write attention outputs of the packaged model's layer 15 to `path`."""
    model = al.load_model("smollm2-135m")
    tokens = al.load_tokens("news-en", model, n + n // 16, context=256)
    (store,) = al.harvest_stores(model, tokens, [("attn_out", 15)]).values()
    np.save(path, store.sample(n).numpy())


def peak_mib(device: torch.device) -> float:
    """Largest resident memory of this process so far; on a GPU, of its tensors there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # elsewhere the peak of a child process begins with what its parent had
        peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak:
            return int(peak[1]) / 1024
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def forget_peak(device: torch.device) -> None:
    """Let the peak begin with what is resident now, where the system can (Linux, GPUs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def task_of(args: argparse.Namespace) -> tuple[Task, torch.Tensor]:
    """The task, and held-out rows: centered, with a mean square norm of their width."""
    n = (args.n_batches + 1) * args.batch
    x = torch.from_numpy(np.load(args.rows)[:n]) if args.rows else rows(n, args.d_in)
    x = x.to(args.device)
    x = x - x.mean(0)
    x = x * (x.shape[1] / x.square().sum(1).mean()).sqrt()
    *batches, held_out = x.split(args.batch)
    sae = SparseAutoencoder(SAEConfig(x.shape[1], args.d_sae, args.k), draw=False).to(args.device)
    store = ActivationStore.from_tensor(torch.cat(batches))
    initialize(sae, "asi", store.spectrum, "auto", store.sample(args.batch))
    return Task(batches, sae.W_dec.detach().clone(), sae.encoder_rows.clone(), args.k), held_out


def memory_of(name: str, args: argparse.Namespace) -> float:
    """Peak MiB of a few steps above that of the process with the task alone."""
    task, _ = task_of(args)
    forget_peak(args.device)
    before = peak_mib(args.device)
    way = WAYS[name](task)
    for i in range(_MEMORY_STEPS):
        way.step(i)
    return peak_mib(args.device) - before


def main() -> None:
    """Print one JSON object."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", help="a `.npy` file of activations")
    parser.add_argument("--harvest", metavar="FILE", help="write that file, and stop")
    parser.add_argument("--device", type=resolve_device, default="cpu")
    parser.add_argument("--d-in", type=int, default=576, help="without rows")
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--n-batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.harvest:
        harvest(args.harvest, (args.n_batches + 1) * args.batch)
        return
    if args.memory_of:
        print(json.dumps(memory_of(args.memory_of, args)))
        return
    names = [name for name in WAYS if name not in PEERS or importlib.util.find_spec(PEERS[name])]
    for name in WAYS.keys() - set(names):
        print(f"{name} is not installed here: left out", file=sys.stderr)
    task, held_out = task_of(args)
    ways = {name: WAYS[name](task) for name in names}
    took_each: dict[str, list[float]] = {name: [] for name in names}
    slow = set()
    for i in range(_WARM_UP + args.rounds):
        for name, way in ways.items():
            if name in slow and i > _SLOW_ROUNDS:
                continue
            start = seconds(args.device)
            way.step(i)
            took = seconds(args.device) - start
            if took > _SLOW_SECONDS:
                slow.add(name)
            took_each[name].append(took)
    took_each = {name: times[1 if name in slow else _WARM_UP :] for name, times in took_each.items()}
    median = {name: statistics.median(times) for name, times in took_each.items()}
    spread = (held_out - held_out.mean(0)).square().sum()
    found: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        error = None
        if way.reconstruct is not None and name not in slow:
            error = float((way.reconstruct(held_out) - held_out).square().sum() / spread)
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = {
            "tokens_per_s": round(args.batch / median[name]),
            "steps": len(took_each[name]),
            "of_the_product": round(median["encoder product"] / median[name], 2),
            "times_sparsify": (round(median["sparsify"] / median[name], 2) if "sparsify" in median else None),
            "peak_mib": round(json.loads(done.stdout.splitlines()[-1])),
            "fvu": None if error is None else round(error, 4),
        }
    report = {
        "ways": found,
        "compute_dtype": str(resolve_dtype("auto", args.device)),
        "threads": torch.get_num_threads(),
        "rows": "attention outputs" if args.rows else "Gaussian",
        "options": {
            key: value
            for key, value in (vars(args) | {"device": card(args.device)}).items()
            if key not in {"memory_of", "harvest", "rows"}
        },
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
