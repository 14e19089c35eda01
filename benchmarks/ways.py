"""Ways of training one TopK autoencoder, ours and the peers', from one start on one list of batches.

Each way has `step(i)`, one update on batch i as its library's own trainer does it, and `reconstruct(x)`. All
begin with the same unit decoder rows, the same encoder and biases of zero, at one learning rate, on the
device of the rows; rows come centered and scaled. Peers are imported where they are asked for.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asi_lens.activations.store import ActivationStore
from asi_lens.inputs.models import resolve_dtype
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.subspace import SubspaceStore
from asi_lens.sae.train import Trainer
from asi_lens.training.config import TrainConfig

LR = 8e-4


def seconds(device: torch.device) -> float:
    """The clock, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


SUBSPACE = 256


@dataclass
class Way:
    """One way, ready to go."""

    step: Callable[[int], Any]
    reconstruct: Callable[[Tensor], Tensor] | None
    """None for what trains nothing."""


@dataclass
class Task:
    """What all of them are given."""

    batches: list[Tensor]
    decoder: Tensor
    """Unit rows [d_sae d_in] to begin with."""
    encoder: Tensor
    """Rows [d_sae d_in] to begin with."""
    k: int

    @property
    def d_in(self) -> int:
        """Width."""
        return self.decoder.shape[1]

    @property
    def d_sae(self) -> int:
        """Features."""
        return self.decoder.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the batches and the start are."""
        return self.decoder.device

    def autocast(self, dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[None]:
        """Products in `dtype`, if it is not float32."""
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def on_gpu(self) -> AbstractContextManager[None]:
        """Products in bfloat16 on a GPU, as the peers' trainers have them there; as given on a CPU."""
        return self.autocast(torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def batch(self, i: int) -> Tensor:
        """Batch i, over and over."""
        return self.batches[i % len(self.batches)]


def ours(task: Task, optimizer: str, search: str = "exact", kernels: str = "auto") -> Way:
    """`Trainer.step`."""
    sae = _empty(task, task.d_in)
    return _trained(sae, task.decoder, task.encoder, task, optimizer, lambda rows: rows, search, kernels)


def _empty(task: Task, d_in: int) -> SparseAutoencoder:
    with task.device:
        return SparseAutoencoder(SAEConfig(d_in, task.d_sae, task.k), draw=False)


def inside(task: Task, optimizer: str) -> Way:
    """The same on coordinates in the top directions; the rest is reconstructed by the mean."""
    store = SubspaceStore(ActivationStore.from_tensor(torch.cat(task.batches)), SUBSPACE)
    basis, center = store.basis.float(), store.center.float()
    sae = _empty(task, SUBSPACE)
    decoder = torch.nn.functional.normalize(task.decoder @ basis, dim=1)
    way = _trained(sae, decoder, task.encoder @ basis, task, optimizer, lambda rows: (rows - center) @ basis)
    return Way(way.step, lambda x: sae((x - center) @ basis).detach() @ basis.T + center)


def _trained(
    sae: SparseAutoencoder,
    decoder: Tensor,
    encoder: Tensor,
    task: Task,
    optimizer: str,
    read: Callable[[Tensor], Tensor],
    search: str = "exact",
    kernels: str = "auto",
) -> Way:
    sae.W_dec.data.copy_(decoder)
    sae.encoder_rows.copy_(encoder)
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    constant = {"lr": LR, "warmup_steps": 0, "decay_fraction": 0}
    sizes = {"batch_size": len(task.batches[0]), "n_tokens": 10**9}
    config = TrainConfig(**sizes, optimizer=optimizer, kernels=kernels, **constant)
    trainer = Trainer(sae, config, search=search)
    if search != "exact":
        trainer.prepare(ActivationStore.from_tensor(torch.cat(task.batches)))
        # The rows are normalized already.
        sae.set_normalization(torch.zeros(task.d_in), 1.0)
    return Way(lambda i: trainer.step(read(task.batch(i))), lambda x: sae(x).detach())


def product(task: Task) -> Way:
    """The encoder's matrix product alone, in our compute dtype, into memory that is there already."""
    dtype = resolve_dtype("auto", task.device)
    weight, x = task.encoder.to(dtype), task.batches[0].to(dtype)
    out = torch.empty(len(x), task.d_sae, dtype=dtype, device=task.device)
    return Way(lambda i: torch.mm(x, weight.T, out=out), None)


def plain(task: Task, dtype: torch.dtype) -> Way:
    """The formula written down, dense, with autograd and torch.optim.Adam."""
    start = (
        task.encoder.T,
        task.decoder.new_zeros(task.d_sae),
        task.decoder,
        task.decoder.new_zeros(task.d_in),
    )
    w_enc, b_enc, w_dec, b_dec = parameters = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    optimizer = torch.optim.Adam(parameters, lr=LR)

    def forward(x: Tensor) -> Tensor:
        with task.autocast(dtype):
            scores = torch.relu((x - b_dec) @ w_enc + b_enc)
            values, indices = scores.topk(task.k)
            return torch.zeros_like(scores).scatter(1, indices, values) @ w_dec + b_dec

    def step(i: int) -> None:
        x = task.batch(i)
        loss = (forward(x) - x).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            w_dec.div_(w_dec.norm(dim=1, keepdim=True))

    return Way(step, lambda x: forward(x).detach().float())


def sparsify(task: Task) -> Way:
    """sparsify's SparseCoder as its trainer drives it, with torch.optim.Adam."""
    _without_unused()
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(task.d_in, SparseCoderConfig(num_latents=task.d_sae, k=task.k), device=task.device)
    coder.encoder.weight.data.copy_(task.encoder)
    coder.W_dec.data.copy_(task.decoder)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LR)

    def step(i: int) -> None:
        with task.on_gpu():
            coder.set_decoder_norm_to_unit_norm()
            loss = coder(task.batch(i)).fvu
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()

    return Way(step, lambda x: coder(x).sae_out.detach())


def saelens(task: Task) -> Way:
    """SAELens' TopK autoencoder as its trainer drives it, with torch.optim.Adam."""
    _without_unused()
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    sizes = {"d_in": task.d_in, "d_sae": task.d_sae, "k": task.k}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, device=str(task.device)))
    sae.W_dec.data.copy_(task.decoder)
    sae.W_enc.data.copy_(task.encoder.T)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LR)

    def step(i: int) -> None:
        given = TrainStepInput(
            sae_in=task.batch(i),
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=i,
            is_logging_step=False,
        )
        with task.on_gpu():
            loss = sae.training_forward_pass(given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Way(step, lambda x: sae(x).detach())


def dictionary_learning(task: Task) -> Way:
    """dictionary_learning's TopKTrainer."""
    _without_unused()
    from dictionary_learning.trainers.top_k import TopKTrainer

    sizes = {"activation_dim": task.d_in, "dict_size": task.d_sae, "k": task.k}
    trainer = TopKTrainer(
        steps=10**9, **sizes, layer=0, lm_name="none", lr=LR, warmup_steps=1, device=str(task.device), seed=0
    )
    trainer.ae.decoder.weight.data.copy_(task.decoder.T)
    trainer.ae.encoder.weight.data.copy_(task.encoder)
    # Step 0 would set the decoder bias from the data.
    return Way(lambda i: trainer.update(i + 1, task.batch(i)), lambda x: trainer.ae(x).detach())


WAYS: dict[str, Callable[[Task], Way]] = {
    "encoder product": product,
    "asi_lens adam": lambda task: ours(task, "adam"),
    "asi_lens sparse_adam": lambda task: ours(task, "sparse_adam"),
    "asi_lens adam, subspace search": lambda task: ours(task, "adam", "subspace"),
    "asi_lens sparse_adam, subspace search": lambda task: ours(task, "sparse_adam", "subspace"),
    f"asi_lens adam, inside {SUBSPACE} directions": lambda task: inside(task, "adam"),
    "plain PyTorch, float32": lambda task: plain(task, torch.float32),
    "plain PyTorch, bfloat16": lambda task: plain(task, torch.bfloat16),
    "sparsify": sparsify,
    "SAELens": saelens,
    "dictionary_learning": dictionary_learning,
}
"""By name."""
ON_GPU: dict[str, Callable[[Task], Way]] = {
    f"asi_lens {optimizer}, {kernels}": lambda task, o=optimizer, k=kernels: ours(task, o, kernels=k)  # type: ignore[misc]
    for kernels in ("triton", "plain")
    for optimizer in ("adam", "sparse_adam")
}
"""Ours on a GPU, by name: the kernels, and PyTorch alone."""
PEERS = {"sparsify": "sparsify", "SAELens": "sae_lens", "dictionary_learning": "dictionary_learning"}
"""Modules that some of them need."""


# What peers import and a training step does not use: models, plots, logs.
_UNUSED = (
    "nnsight",
    "wandb",
    "plotly",
    "plotly_express",
    "nltk",
    "babe",
    "dotenv",
    "transformers_stream_generator",
)


class _Anything(types.ModuleType):
    """A module, class or function that nobody calls in earnest."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what is unused, after everything that is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        unused = name.split(".")[0] in _UNUSED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if unused else None

    def create_module(self, spec: Any) -> Any:
        return _Anything(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__path__ = []


def _without_unused() -> None:
    if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        sys.meta_path.append(_StandIns())
