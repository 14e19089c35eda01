"""A tiny model, its text and its stores, dictionaries and pages: objects for every public door."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import runs
import torch
from small_trainings import D_IN, K

import asi_lens as al

PAGE = """dtype = "float32"
context = 16
main_corpus = "text.txt"
n_tokens = 64
n_tokens_held_out = 32
store_budget_gb = 1.0
batch_size = 32
n_tokens_train = 64
dead_window = 64
lr = 8e-4
d_sae = 32
k = 4
log_every = 1
"""
N_OV, CONTEXT = 24, 16


@dataclass
class World:
    """A tiny model and a project folder, and what is made of them."""

    model: Any
    folder: Path
    """Of the model."""
    root: Path
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        runs.project(self.root)
        path = self.root / "notebooks" / "03_page.ipynb"
        runs.notebook(path, parameters=runs.PARAMETERS + PAGE)
        (self.root / "text.txt").write_text("abcdefgh " * 60)

    @cached_property
    def tokens(self) -> Any:
        ids = torch.randint(4, 90, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
        return al.Tokens(ids, "random", "tiny", CONTEXT)

    @cached_property
    def rows(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(256, D_IN, generator=generator) * 0.8 ** torch.arange(D_IN) + 1

    @cached_property
    def store(self) -> Any:
        store = al.ActivationStore.from_tensor(self.rows, {"context": 9, "drop_first": True})
        return store

    @cached_property
    def paired(self) -> Any:
        return al.PairedStores(
            self.store, al.ActivationStore.from_tensor(self.rows.flip(1), self.store.metadata)
        )

    @cached_property
    def harvested(self) -> Any:
        return al.harvest_store(self.model, self.tokens, "attn_out", 1, progress=False)

    @cached_property
    def moments(self) -> Any:
        return al.Moments.of(self.rows)

    @cached_property
    def few(self) -> Any:
        return al.Moments.of(self.rows[:20])

    @cached_property
    def spectrum(self) -> Any:
        return al.Spectrum.of(self.rows)

    @cached_property
    def spectra(self) -> Any:
        return al.collect_spectra(self.model, self.tokens, ["attn_out"], [1], progress=False)

    @cached_property
    def features(self) -> Any:
        sae = self.sae(d_in=24, metadata=self.harvested.metadata)
        return al.Features(sae, self.harvested, self.tokens, self.model, top=2, sampled=2, progress=False)

    @cached_property
    def pairs(self) -> Any:
        return al.harvest_pairs(self.model, self.tokens, 1, progress=False)

    @cached_property
    def config(self) -> Any:
        return al.SAEConfig(D_IN, 32, K)

    def sae(self, **changes: Any) -> Any:
        return al.SparseAutoencoder(al.SAEConfig(**{"d_in": D_IN, "d_sae": 32, "k": K, **changes}))

    def transcoder(self) -> Any:
        return al.Transcoder(al.SAEConfig(D_IN, 32, K, d_out=D_IN))

    @property
    def train(self) -> Any:
        return al.TrainConfig(batch_size=32, n_tokens=64, dead_window=64, compute_dtype="float32")

    def trainer(self) -> Any:
        return al.Trainer(self.sae(), self.train)

    @cached_property
    def lorsa_config(self) -> Any:
        return al.LorsaConfig.of(self.model, 1, n_ov=N_OV, k=4, context=CONTEXT)

    def lorsa(self) -> Any:
        return al.Lorsa(self.lorsa_config)

    def lorsa_trainer(self) -> Any:
        return al.LorsaTrainer(self.lorsa(), self.train)

    @cached_property
    def page(self) -> Any:
        return al.Page("03_page", self.namespace)

    @cached_property
    def namespace(self) -> dict[str, Any]:
        names: dict[str, Any] = {}
        exec(runs.PARAMETERS + PAGE, names)
        del names["__builtins__"]
        return names

    @cached_property
    def saved(self) -> Path:
        self.sae().save(self.root / "sae")
        return self.root / "sae"

    @cached_property
    def saved_lorsa(self) -> Path:
        self.lorsa().save(self.root / "lorsa.safetensors")
        return self.root / "lorsa.safetensors"
