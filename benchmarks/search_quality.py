"""What a dictionary loses, and gains, by the search in the active subspace, on real activations.

    python benchmarks/search_quality.py [--sites attn_out mlp_out resid_post] [--seeds 3] [--d-sae 16384]

At every site of one layer of a packaged model, dictionaries with ASI are trained with the exact search and
with `search="subspace"`, of each seed on the same batches one after the other: FVU, silent features and
delta LM loss on held-out text, where the search ended (coordinates, candidates) and what it found when it was
last measured. A site where the search is not worth it shows as exact: it has given up by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

import asi_lens as al
from asi_lens.activations.store import ActivationStore
from asi_lens.inputs.models import resolve_device
from asi_lens.kernels.devices import card
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.evaluate import evaluate_together
from asi_lens.sae.initialize import initialize
from asi_lens.sae.search import SEARCHES
from asi_lens.sae.train import Trainer
from asi_lens.training.config import TrainConfig


def trained(
    store: ActivationStore, search: str, seed: int, args: argparse.Namespace
) -> tuple[Trainer, float]:
    """A trainer at the end of its run, and its tokens/s."""
    sae = SparseAutoencoder(SAEConfig(store.d, args.d_sae, args.k, seed=seed, metadata=store.metadata))
    sae.to(args.device)
    initialize(sae, "asi", store.spectrum, "auto", store.sample(8192))
    config = TrainConfig(batch_size=args.batch, n_tokens=args.passes * args.n_tokens, seed=seed)
    trainer = Trainer(sae, config, search=search)
    history = trainer.fit(store)
    return trainer, statistics.median(row["tokens_per_s"] or 0.0 for row in history)


def spread(values: list[float]) -> dict[str, float]:
    """Over seeds."""
    return {"mean": round(statistics.mean(values), 5), "least": min(values), "most": max(values)}


def main() -> None:
    """Print one line of JSON per site and search."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", type=resolve_device, default="cpu")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--corpus", default="news-en")
    parser.add_argument("--sites", nargs="+", default=["attn_out", "mlp_out", "resid_post"])
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--d-sae", type=int, default=16_384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--n-tokens", type=int, default=98_304, help="in the store")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=16_384)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    model = al.load_model(args.model, device=args.device)
    data = al.harvest_split(
        model,
        args.corpus,
        [(site, args.layer) for site in args.sites],
        n_tokens=args.n_tokens,
        n_tokens_held_out=args.held_out,
        n_tokens_loss=args.held_out // 4,
    )
    for site in args.sites:
        where = (site, args.layer)
        runs = {name: [] for name in SEARCHES}
        for seed in range(args.seeds):
            for name in SEARCHES:
                runs[name].append(trained(data.train[where], name, seed, args))
        exact_speed = statistics.median(speed for _, speed in runs["exact"])
        for name, found in runs.items():
            saes = [trainer.sae for trainer, _ in found]
            held_out = evaluate_together(saes, data.held_out[where], model=model, tokens=data.loss_tokens)
            report: dict[str, Any] = {
                "site": site,
                "search": name,
                "fvu": spread([one.fvu for one in held_out]),
                "silent": spread([one.dead_fraction for one in held_out]),
                "delta_lm_loss": spread([one.losses.cross_entropy_delta for one in held_out if one.losses]),
                "times_exact": round(statistics.median(speed for _, speed in found) / exact_speed, 2),
            }
            searches = [trainer.subspace for trainer, _ in found if trainer.subspace]
            if searches:
                report["coordinates"] = [one.r for one in searches]
                report["candidates_per_pick"] = [one.width for one in searches]
                report["share_of_mass"] = [one.mass for one in searches]
                report["share_of_picks"] = [one.picks for one in searches]
            print(json.dumps(report), flush=True)
    options = vars(args) | {"device": card(args.device)}
    print(json.dumps({"threads": torch.get_num_threads(), "options": options}))


if __name__ == "__main__":
    main()
