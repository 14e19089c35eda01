"""Small transformers on a made-up text, and the variants that tests train."""

from __future__ import annotations

from pathlib import Path

import torch
from tqdm.auto import tqdm

from asi_lens.experiments.small_fit import fit
from asi_lens.experiments.small_training import Training, TrainingConfig, Variant
from asi_lens.experiments.small_transformer import TransformerConfig
from asi_lens.inputs.corpora import Tokens

CONFIG = TransformerConfig(vocab=30, d_model=32, n_layers=2, n_heads=4, d_mlp=40)
OPTIONS = TrainingConfig(n_tokens=1_280, batch_size=64, lr=5e-3, n_points=4)  # 20 steps of 4 sequences
BASE = Variant("baseline")
CPU = torch.device("cpu")
ALL = [
    BASE,
    Variant("gate", gate=True),
    Variant("muon", muon=True),
    Variant("orthogonal", orthogonality=1.0),
    Variant("frozen", frozen=True, weight_decay=1.0),
]


def text(sequences: int, seed: int = 0) -> Tokens:
    """Sequences of 16 tokens in which each token says the next one, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, (sequences, 16), generator=generator)
    for position in range(1, 16):
        follows = torch.rand(sequences, generator=generator) < 0.8
        ids[:, position] = torch.where(follows, (ids[:, position - 1] * 7 + 1) % 30, ids[:, position])
    return Tokens(ids, "made", "made:1", 16)


TRAIN, HELD_OUT = text(50), text(40, seed=9)


def training(variant: Variant = BASE, options: TrainingConfig = OPTIONS, seed: int = 0) -> Training:
    return Training(CONFIG, variant, options, n_steps=options.n_steps(16), seed=seed, device=CPU)


def trained(folder: Path, variant: Variant = BASE, options: TrainingConfig = OPTIONS) -> Training:
    folder.mkdir(parents=True, exist_ok=True)
    one = training(variant, options)
    with tqdm(disable=True) as bar:
        fit(one, TRAIN, HELD_OUT, folder, bar)
    return one
