"""Harvest against the plain Hugging Face forward, in one run; and peak memory against the number of tokens.

    python benchmarks/harvest.py speed  [--model smollm2-135m] [--sequences 16] [--rounds 5]
    python benchmarks/harvest.py memory [--model smollm2-135m] [--layers 1]
    python benchmarks/harvest.py counterfactuals [--model smollm2-135m]

`speed` alternates, on the same tokens: the model's own Hugging Face forward without its unembedding, a pass
that hands one site of every layer to a consumer that drops it, one that accumulates its second moments, and
one that writes a store of the last layer's (of a layer further down it would not run those above). Quote the
ratios: tokens/s depends on the machine. `memory` measures the peak resident memory of a fresh process at 16k
and at 256k tokens. `counterfactuals` times the ranks of attention outputs under every counterfactual W_O, at
all layers, from moments of z that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from train_step import peak_mib
from ways import seconds

import asi_lens as al
from asi_lens.activations.harvest import batch_tokens_for, harvest, places
from asi_lens.collapse.output_projection import counterfactual_ranks
from asi_lens.collapse.spectra import MomentsConsumer
from asi_lens.inputs import gguf
from asi_lens.inputs.models import resolve_device
from asi_lens.inputs.sources import SOURCES, fetch
from asi_lens.kernels.devices import card


class Drop:
    """A consumer that looks at nothing: what remains is the cost of the pass itself."""

    def __init__(self, wants: list[tuple[str, int]]) -> None:
        self.wants = wants

    def consume(self, where: tuple[str, int], rows: torch.Tensor) -> None:
        """Drop the rows."""


def plain_folder(model_name: str) -> str:
    """Where Hugging Face finds a model: the dequantised folder of a packaged one, else the name itself."""
    if model_name not in SOURCES:
        return model_name
    folder, _ = gguf.dequantized(fetch(model_name) / str(SOURCES[model_name].main))
    return str(folder)


def speed(model_name: str, sequences: int, rounds: int, site: str, device: torch.device) -> dict[str, object]:
    """Tokens per second (median over rounds) of each way, and its ratio to the plain forward of its round."""
    from transformers import AutoModelForCausalLM

    model = al.load_model(model_name, device=device)
    plain = AutoModelForCausalLM.from_pretrained(
        plain_folder(model_name), dtype=next(model.parameters()).dtype
    )
    plain = plain.to(device).eval()
    body = getattr(plain, plain.base_model_prefix)
    tokens = al.load_tokens("news-en", model, n_tokens=sequences * 256)
    wants = places(model, [site], None)

    def run_plain() -> None:
        with torch.inference_mode():
            for ids in tokens.batches(max(1, batch_tokens_for(model) // tokens.context)):
                body(ids.to(device), use_cache=False)

    def run_store() -> None:
        with tempfile.TemporaryDirectory() as folder:
            al.harvest_store(model, tokens, *wants[-1], folder=Path(folder, "store"), progress=False)

    ways = {
        "plain": run_plain,
        "harvest": lambda: harvest(model, tokens, [Drop(wants)], progress=False),
        "moments": lambda: harvest(model, tokens, [MomentsConsumer(wants)], progress=False),
        "store": run_store,
    }
    for way in ways.values():
        way()
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = seconds(device)
            way()
            took[name].append(seconds(device) - start)
    rate = {name: tokens.n_tokens / statistics.median(s) for name, s in took.items()}
    ratio = {
        name: statistics.median(p / s for p, s in zip(took["plain"], times, strict=True))
        for name, times in took.items()
    }
    return {
        "tokens_per_s": {name: round(value) for name, value in rate.items()},
        "ratio_to_plain": {name: round(value, 3) for name, value in ratio.items()},
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "device": card(device),
    }


def peak(model_name: str, n_tokens: int, layers: int, device: torch.device) -> float:
    """Peak memory in MiB of a pass over `n_tokens`, in this process (on a GPU, of its tensors there)."""
    model = al.load_model(model_name, device=device)
    tokens = al.load_tokens("news-en", model, n_tokens=n_tokens)
    wants = places(model, al.models.SITES, range(layers))
    harvest(model, tokens, [MomentsConsumer(wants)], progress=False)
    return peak_mib(device)


def counterfactuals(model_name: str, sequences: int, device: torch.device) -> dict[str, object]:
    """Seconds for the ranks under every counterfactual W_O, at all layers, once each."""
    model = al.load_model(model_name, device=device)
    tokens = al.load_tokens("news-en", model, n_tokens=sequences * 256)
    spectra = al.collect_spectra(model, tokens, ["z"], progress=False)
    start = seconds(device)
    for (_, layer), z in spectra.items():
        counterfactual_ranks(al.models.output_projection(model, layer), z.covariance)
    return {"layers": len(spectra), "seconds": round(seconds(device) - start, 1)}


def main() -> None:
    """Print one JSON object."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "what", nargs="?", default="speed", choices=["speed", "memory", "peak", "counterfactuals"]
    )
    parser.add_argument("--device", type=resolve_device, default="cpu")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--site", default="attn_out")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=16_384)
    args = parser.parse_args()
    if args.what == "speed":
        print(json.dumps(speed(args.model, args.sequences, args.rounds, args.site, args.device), indent=1))
    elif args.what == "counterfactuals":
        print(json.dumps(counterfactuals(args.model, args.sequences, args.device)))
    elif args.what == "peak":
        mib = peak(args.model, args.tokens, args.layers, args.device)
        print(json.dumps({"tokens": args.tokens, "peak_mib": round(mib, 1)}))
    else:
        for n_tokens in (16_384, 262_144):
            command = [sys.executable, __file__, "peak", "--model", args.model, "--tokens", str(n_tokens)]
            command += ["--layers", str(args.layers), "--device", str(args.device)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
