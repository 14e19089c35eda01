"""One training step beside the peers, on the same batches, in one run.

    make setup-peers
    .venv-peers/bin/python benchmarks/train_step.py [--d-sae 16384] [--batch 2048] [--rounds 5]

Measured in turn, round after round: the encoder's matrix product alone (a bound for a dense encoder), our
`Trainer.step` with each optimizer, the same inside the top `--subspace` directions, a plain dense PyTorch
autoencoder, and the TopK autoencoders of sparsify and SAELens where they can be imported. Data is Gaussian
with the spectrum of a collapsed activation. Quote the ratios: tokens/s depends on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from asi_lens.activation_store import ActivationStore
from asi_lens.models import resolve_dtype
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.subspace import SubspaceStore
from asi_lens.sae.train import Trainer
from asi_lens.sae.train_config import TrainConfig

Step = Callable[[int], None]


def rows(n: int, d_in: int) -> torch.Tensor:
    """Rows whose singular values fall by a factor of 30 over the width."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d_in, generator=generator) * torch.logspace(0, -1.5, d_in)


def ours(store: ActivationStore, d_sae: int, k: int, batch: int, optimizer: str) -> Step:
    """`Trainer.step` from a random start."""
    sae = SparseAutoencoder(SAEConfig(store.d, d_sae, k))
    initialize(sae, "random", store.spectrum, None, store.sample(batch))
    trainer = Trainer(sae, TrainConfig(batch_size=batch, n_tokens=10**9, optimizer=optimizer))
    batches = [batch for batch, _ in zip(store.batches(batch), range(4), strict=False)]

    def step(i: int) -> None:
        trainer.step(batches[i % len(batches)])

    return step


def product(x: torch.Tensor, d_sae: int) -> Step:
    """x W_enc in the compute dtype, into memory that is there already."""
    dtype = resolve_dtype("auto", torch.device("cpu"))
    weight, x = torch.randn(d_sae, x.shape[1], dtype=dtype), x.to(dtype)
    out = torch.empty(len(x), d_sae, dtype=dtype)

    def step(i: int) -> None:
        torch.mm(x, weight.T, out=out)

    return step


def plain(x: torch.Tensor, d_sae: int, k: int) -> Step:
    """The formula written down, with autograd and torch.optim.Adam."""
    d_in = x.shape[1]
    decoder = torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
    w_enc, b_enc = torch.nn.Parameter(decoder.T.clone()), torch.nn.Parameter(torch.zeros(d_sae))
    w_dec, b_dec = torch.nn.Parameter(decoder), torch.nn.Parameter(torch.zeros(d_in))
    optimizer = torch.optim.Adam([w_enc, b_enc, w_dec, b_dec], lr=8e-4)

    def step(i: int) -> None:
        scores = torch.relu((x - b_dec) @ w_enc + b_enc)
        values, indices = scores.topk(k)
        dense = torch.zeros_like(scores).scatter(1, indices, values)
        loss = (dense @ w_dec + b_dec - x).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            w_dec.div_(w_dec.norm(dim=1, keepdim=True))

    return step


def sparsify(x: torch.Tensor, d_sae: int, k: int) -> Step:
    """sparsify's SparseCoder as its trainer drives it, with torch.optim.Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=d_sae, k=k))
    optimizer = torch.optim.Adam(coder.parameters(), lr=8e-4)

    def step(i: int) -> None:
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saelens(x: torch.Tensor, d_sae: int, k: int) -> Step:
    """SAELens' TopK autoencoder as its trainer drives it, with torch.optim.Adam."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=d_sae, k=k))
    optimizer = torch.optim.Adam(sae.parameters(), lr=8e-4)

    def step(i: int) -> None:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=i, is_logging_step=False
        )
        out = sae.training_forward_pass(given)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Print one JSON object."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--subspace", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    store = ActivationStore.from_tensor(rows(4 * args.batch, args.d_in))
    x = store.sample(args.batch) * store.scale
    size = (args.d_sae, args.k)
    inside = SubspaceStore(store, args.subspace)
    ways: dict[str, Callable[[], Step]] = {
        "encoder product": partial(product, x, args.d_sae),
        **{
            f"asi_lens {kind}": partial(ours, store, *size, args.batch, kind)
            for kind in ("adam", "sparse_adam")
        },
        f"asi_lens adam, inside {args.subspace} directions": partial(ours, inside, *size, args.batch, "adam"),
        "plain PyTorch": partial(plain, x, *size),
    }
    for name, module, way in (("sparsify", "sparsify", sparsify), ("SAELens", "sae_lens", saelens)):
        if importlib.util.find_spec(module):
            ways[name] = partial(way, x, *size)
        else:
            print(f"{name} is not installed here: left out")
    steps = {name: make() for name, make in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(i)
            # The first round warms up.
            if i:
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    report = {
        "tokens_per_s": {name: round(args.batch / s) for name, s in median.items()},
        "times_the_product": {name: round(median["encoder product"] / s, 2) for name, s in median.items()},
        "times_sparsify": {
            name: round(median["sparsify"] / s, 2) for name, s in median.items() if "sparsify" in median
        },
        "compute_dtype": str(resolve_dtype("auto", torch.device("cpu"))),
        "threads": torch.get_num_threads(),
        "options": vars(args),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
