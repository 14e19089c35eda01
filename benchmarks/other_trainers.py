"""Dead features in the training loops of SAELens and sparsify, as they start and with ASI, same budget.

    make setup-peers
    .venv-peers/bin/python benchmarks/other_trainers.py [--tokens 524288] [--seeds 0,1,2] [--libraries ...]

SAELens: `SAETrainer` over a `TopKTrainingSAE` on stored attention outputs of smollm2-135m, layer 15.
sparsify: its `Trainer` over the model and token ids. All options are the libraries' own defaults except
width, k, batch and, for sparsify, Adam, 25 steps of warm-up and the exclusion of BOS. The ASI runs differ in
one line, `foreign.initialize`. Silent features and FVU are measured on held-out tokens by each library's own
encoder and decoder.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import asi_lens as al

LAYER, HOOK, K, CONTEXT = 15, "layers.15.self_attn.o_proj", 32, 256


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Yield shuffled batches of the rows, over and over."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


def saelens(data: Data, d_sae: int, tokens: int, seed: int, start: Callable[[Any], None]) -> dict[str, float]:
    """Train a `TopKTrainingSAE` by SAELens' own trainer; returns its held-out numbers."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(seed)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=data.rows.shape[1], d_sae=d_sae, k=K))
    start(sae)
    # `lr_end` is what SAELens' runner fills in, a tenth of its rate.
    config = SAETrainerConfig(total_training_samples=tokens, train_batch_size_samples=2048, lr_end=3e-5)
    SAETrainer(config, sae, batches(data.rows, 2048, seed)).fit()

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = sae.encode(x)
        return (acts > 0).any(0), sae.decode(acts)

    return measured(data.held_out, code)


def sparsify(
    data: Data, d_sae: int, tokens: int, seed: int, start: Callable[[Any], None]
) -> dict[str, float]:
    """Train a `SparseCoder` by sparsify's own trainer; returns its held-out numbers."""
    from datasets import Dataset
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    ids = data.ids[torch.randperm(len(data.ids), generator=torch.Generator().manual_seed(seed))]
    while len(ids) * CONTEXT < tokens:
        ids = torch.cat([ids, ids])
    dataset = Dataset.from_dict({"input_ids": ids[: tokens // CONTEXT]}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=d_sae, k=K),
            batch_size=8,
            hookpoints=[HOOK],
            optimizer="adam",
            lr_warmup_steps=25,
            exclude_tokens=[int(data.ids[0, 0])],
            init_seeds=[seed],
            log_to_wandb=False,
            save_dir=folder,
        )
        trainer = Trainer(config, dataset, data.plain)
        start(trainer.saes[HOOK])
        trainer.fit()
    coder = trainer.saes[HOOK]

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        acts, indices, _ = coder.encode(x)
        fired = torch.zeros(d_sae, dtype=torch.bool)
        fired[indices[acts > 0]] = True
        return fired, coder.decode(acts, indices)

    return measured(data.held_out, code)


class Data:
    """Rows to train on and held out, token ids, the plain model, and the spectrum of the training rows."""

    def __init__(self, tokens: int, held_out: int) -> None:
        model = al.load_model("smollm2-135m", dtype="float32")
        text = al.load_tokens("news-en", model, tokens, context=CONTEXT)
        rest = al.load_tokens("news-en", model, held_out, context=CONTEXT, offset=len(text))
        store, other = (al.harvest_store(model, part, "attn_out", LAYER) for part in (text, rest))
        self.rows, self.held_out = (torch.cat(list(each.in_order(8192))).float() for each in (store, other))
        self.ids, self.spectrum = text.ids, store.spectrum
        # The library trains through hooks on the plain modules, whose names the bridge changes.
        folder = model.original_model.config.name_or_path
        self.plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def measured(rows: Tensor, code: Callable[[Tensor], tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return FVU and the share of features that do not fire on the rows."""
    fired, left = torch.tensor(False), 0.0
    for block in rows.split(2048):
        fires, reconstruction = code(block)
        fired = fired | fires
        left += (block - reconstruction).square().sum().item()
    variance = (rows - rows.mean(0)).square().sum().item()
    return {"silent": 1 - fired.float().mean().item(), "fvu": left / variance}


def main() -> None:
    """Train every library, start and seed, and print the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--held-out", type=int, default=65_536)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--libraries", default="SAELens,sparsify")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = Data(args.tokens, args.held_out)
    results = []
    trainers = {"SAELens": saelens, "sparsify": sparsify}
    for library in args.libraries.split(","):
        train = trainers[library]
        for seed in (int(each) for each in args.seeds.split(",")):

            def asi(coder: Any, seed: int = seed) -> None:
                al.foreign.initialize(coder, data.spectrum, sample=data.rows[:8192], seed=seed)

            for start, begin in (("its own", lambda coder: None), ("ASI", asi)):
                found = train(data, args.d_sae, args.tokens, seed, begin)
                results.append({"library": library, "start": start, "seed": seed, **found})
                print(json.dumps(results[-1]), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
