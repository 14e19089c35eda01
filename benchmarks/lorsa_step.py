"""One training step of a Lorsa beside the peer's, from one start on the same sequences, in one run.

    make setup-peers
    .venv-peers/bin/python benchmarks/lorsa_step.py [--units-per-head 1024] [--sequences 4] [--rounds 10]

All take turns, round after round: our `LorsaTrainer.step`, the same layer written down in PyTorch (arrays of
all units at all positions, autograd, torch.optim.Adam), and the Lorsa of llamascopium, the library of the
paper's authors, if it can be imported: its loss with torch.optim.Adam as its trainer has them, in float32 and
(where the processor has bfloat16) under the bfloat16 autocast that is its default. All begin as ASI starts
ours, at one learning rate. FVU is that of the last step's batch. Quote the ratios: positions/s depends on the
machine.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import asi_lens as al
from asi_lens.inputs.models import resolve_dtype
from asi_lens.lorsa.data import PairBatch
from asi_lens.lorsa.train import LorsaTrainer

LR, LAYER, CONTEXT, MODEL = 8e-4, 15, 256, "smollm2-135m"
_WARM_UP = 2


def ours(lorsa: al.Lorsa, batches: list[PairBatch]) -> Callable[[int], float]:
    """`LorsaTrainer.step`."""
    size = batches[0].x.shape[0] * (CONTEXT - 1)
    config = al.TrainConfig(batch_size=size, n_tokens=10**9, lr=LR, warmup_steps=0, decay_fraction=0)
    trainer = LorsaTrainer(lorsa, config)
    return lambda i: trainer.step(batches[i % len(batches)]).fvu


def plain(lorsa: al.Lorsa, batches: list[PairBatch]) -> Callable[[int], float]:
    """The formula, with values of all units at all positions."""
    optimizer = torch.optim.Adam(lorsa.parameters(), lr=LR)

    def step(i: int) -> float:
        batch = batches[i % len(batches)]
        z = lorsa.units(batch.x).relu()
        best = z.topk(lorsa.k, sorted=False)
        sparse = torch.zeros_like(z).scatter(-1, best.indices, best.values)
        target = lorsa.normalize_output(batch.y)[:, 1:]
        missed = (sparse @ lorsa.W_O + lorsa.b_O)[:, 1:] - target
        loss = missed.square().sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            lorsa.W_O.div_(lorsa.W_O.norm(dim=1, keepdim=True))
        return float(loss.detach()) / spread(target)

    return step


def llamascopium(lorsa: al.Lorsa, batches: list[PairBatch], dtype: torch.dtype) -> Callable[[int], float]:
    """`LowRankSparseAttention.compute_loss`, as the library's trainer calls it."""
    theirs = as_llamascopium(lorsa)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=LR, foreach=True)

    def step(i: int) -> float:
        batch = batches[i % len(batches)]
        x, y = lorsa.normalize(batch.x), lorsa.normalize_output(batch.y)
        mask = torch.ones(x.shape[:2])
        mask[:, 0] = 0
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = theirs.compute_loss({"in": x, "out": y, "mask": mask})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach()) / spread(y[:, 1:])

    return step


def as_llamascopium(lorsa: al.Lorsa, dtype: torch.dtype = torch.float32) -> Any:
    """The peer's Lorsa with the same weights, for normalized inputs and outputs."""
    from llamascopium.models import lorsa as peer

    config, rotary = lorsa.config, lorsa.config.pattern.rotary_dim
    theirs = peer.LowRankSparseAttention(
        peer.LorsaConfig(
            hook_point_in="in",
            hook_point_out="out",
            d_model=config.d_in,
            expansion_factor=config.n_ov / config.d_in,
            act_fn="topk",
            top_k=config.k,
            n_qk_heads=config.n_qk_heads,
            d_qk_head=config.d_qk,
            n_ctx=config.pattern.context,
            rotary_dim=rotary,
            positional_embedding_type="rotary" if rotary else "none",
            attn_scale=1 / config.pattern.scale,
            device="cpu",
            dtype=dtype,
        )
    )
    with torch.no_grad():
        for name in ("W_Q", "W_K", "b_Q", "b_K"):
            getattr(theirs, name).copy_(getattr(lorsa.heads, name))
        for name, tensor in (("W_V", lorsa.W_V), ("W_O", lorsa.W_O), ("b_V", lorsa.b_V), ("b_D", lorsa.b_O)):
            getattr(theirs, name).copy_(tensor)
    if rotary:
        theirs.cfg.rotary_adjacent_pairs = False  # halves are rotated into each other, as in Llama
        theirs.rotary_cos, theirs.rotary_sin = lorsa.heads.cos.to(dtype), lorsa.heads.sin.to(dtype)
    return theirs


def spread(target: torch.Tensor) -> float:
    """Mean squared distance of the targets from their mean."""
    rows = target.flatten(0, 1)
    return float((rows - rows.mean(0)).square().sum(1).mean())


WAYS: dict[str, Callable[[al.Lorsa, list[PairBatch]], Callable[[int], float]]] = {
    "asi_lens": ours,
    "plain PyTorch": plain,
    "llamascopium, float32": lambda lorsa, batches: llamascopium(lorsa, batches, torch.float32),
    "llamascopium, bfloat16": lambda lorsa, batches: llamascopium(lorsa, batches, torch.bfloat16),
}


def main() -> None:
    """Print one JSON object."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--units-per-head", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--n-batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    left_out = (
        set() if importlib.util.find_spec("llamascopium") else {name for name in WAYS if "llama" in name}
    )
    if resolve_dtype("auto", torch.device("cpu")) == torch.float32:
        left_out.add("llamascopium, bfloat16")
    names = [name for name in WAYS if name not in left_out]
    for name in sorted(left_out):
        print(f"{name} is left out here", file=sys.stderr)
    model = al.load_model(MODEL)
    n = args.n_batches * args.sequences * CONTEXT
    pairs = al.harvest_pairs(model, al.load_tokens("news-en", model, n, context=CONTEXT), LAYER)
    n_ov = model.cfg.n_heads * args.units_per_head
    begun = al.Lorsa(al.LorsaConfig.of(model, LAYER, n_ov=n_ov, k=args.k, context=CONTEXT))
    al.initialize_lorsa(begun, model, LAYER, pairs, "asi", d_init=32)
    batches = list(pairs.blocks(args.sequences))
    steps = {name: WAYS[name](copy.deepcopy(begun), batches) for name in names}
    took_each: dict[str, list[float]] = {name: [] for name in names}
    fvu: dict[str, float] = {}
    for i in range(_WARM_UP + args.rounds):
        for name, step in steps.items():
            before = time.perf_counter()
            fvu[name] = step(i)
            took_each[name].append(time.perf_counter() - before)
    median = {name: statistics.median(times[_WARM_UP:]) for name, times in took_each.items()}
    size = args.sequences * (CONTEXT - 1)
    ways = {
        name: {
            "positions_per_s": round(size / seconds),
            "times_plain": round(median["plain PyTorch"] / seconds, 2),
            "fvu": round(fvu[name], 4),
        }
        for name, seconds in median.items()
    }
    print(json.dumps({"ways": ways, "threads": torch.get_num_threads(), "options": vars(args)}, indent=1))


if __name__ == "__main__":
    main()
