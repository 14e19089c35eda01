"""Time and memory of a training step of every kind of dictionary, against TopK.

    python benchmarks/dictionaries.py [--d-sae 2048] [--batch 256] [--steps 40] [--store FOLDER]

Every kind runs in a process of its own, one after the other: median seconds of a step after `--settle` steps,
in which thresholds and penalties find their l0, and peak resident memory above that of the process before
the dictionary was made. Data is Gaussian with the spectrum of a collapsed activation, or a store's; the
transcoder reads and writes the same rows. Quote the ratios: times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from typing import Any

import torch
from train_step import forget_peak, peak_mib, rows
from ways import seconds

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.experiments.recipes import DICTIONARIES, dictionary_recipe
from asi_lens.inputs.models import resolve_device
from asi_lens.kernels.devices import card
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.train import Trainer
from asi_lens.sae.transcoder import Transcoder
from asi_lens.sae.transcoder_init import initialize_transcoder
from asi_lens.training.config import TrainConfig

TRANSCODER = "TopK transcoder"


def measure(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, MiB, and the l0 of the last step."""
    if args.store:
        store = ActivationStore.open(args.store)
    else:
        store = ActivationStore.from_tensor(rows(16 * args.batch, args.d_in))
    _ = store.spectrum
    device = args.device
    forget_peak(device)
    before = peak_mib(device)
    config = TrainConfig(batch_size=args.batch, n_tokens=args.batch * (args.settle + args.steps))
    if kind == TRANSCODER:
        pairs = PairedStores(store, store)
        coder = Transcoder(SAEConfig(store.d, args.d_sae, args.k, d_out=store.d)).to(device)
        initialize_transcoder(coder, pairs, "random", "regression")
        trainer, stream = Trainer(coder, config), pairs.batches(args.batch)
    else:
        recipe = dictionary_recipe(kind, args.d_sae)
        sae = SparseAutoencoder(SAEConfig(store.d, args.d_sae, args.k, recipe.activation)).to(device)
        first = args.initial_l0 if kind == "JumpReLU" else None
        initialize(sae, "random", store.spectrum, None, store.sample(args.batch), initial_l0=first)
        sparsity = replace(recipe.sparsity, initial_l0=first) if first else recipe.sparsity
        trainer, stream = Trainer(sae, config, sparsity), store.batches(args.batch)
    took = []
    for _, batch in zip(range(args.settle + args.steps), stream, strict=False):
        start = seconds(device)
        output = trainer.step(batch)
        took.append(seconds(device) - start)
    return {
        "seconds": statistics.median(took[args.settle :]),
        "peak_mib": peak_mib(device) - before,
        "l0": output.l0,
    }


def main() -> None:
    """Print one JSON object."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", type=resolve_device, default="cpu")
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=2048)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--settle", type=int, default=150)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--store", help="folder of a store of activations, instead of Gaussian rows")
    parser.add_argument("--initial-l0", type=float, help="of JumpReLU, from which it is annealed to k")
    parser.add_argument("--only", choices=[*DICTIONARIES, TRANSCODER])
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args)))
        return
    found: dict[str, Any] = {}
    for kind in (*DICTIONARIES, TRANSCODER):
        command = [sys.executable, __file__, *sys.argv[1:], "--only", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    first = found["TopK"]
    report = {
        kind: {
            "times_topk": round(one["seconds"] / first["seconds"], 2),
            "peak_mib": round(one["peak_mib"]),
            "l0": round(one["l0"], 1),
        }
        for kind, one in found.items()
    }
    options = vars(args) | {"device": card(args.device)}
    print(
        json.dumps(
            {
                "kinds": report,
                "threads": torch.get_num_threads(),
                "options": options,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
