"""A small store and trainings on it, for the tests of trainer, fit and checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from asi_lens.activations.harvest_store import ActivationStore
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.train import StepOutput, TrainConfig, Trainer
from asi_lens.training.learner import Learner

D_IN, D_SAE, K = 16, 128, 4


def rows(n: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(n, D_IN, generator=generator) * 0.8 ** torch.arange(D_IN) + 1


def small_store() -> ActivationStore:
    return ActivationStore.from_tensor(rows(), metadata={"site": "attn_out", "layer": 15})


def make(seed: int = 0, dtype: torch.dtype = torch.float32, activation: str = "topk") -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, activation, seed), dtype=dtype)


def quick(**changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "batch_size": 64,
        "n_tokens": 64 * 30,
        "warmup_steps": 3,
        "dead_window": 256,
        "lr": 3e-3,
    }
    # Not what is fast here: in bfloat16 many pre-activations are equal, and any of them may be picked.
    defaults["compute_dtype"] = "float32"
    return TrainConfig(**{**defaults, **changes})


def trained(store: ActivationStore, config: TrainConfig, **kwargs: Any) -> Trainer:
    trainer = Trainer(make(), config)
    trainer.fit(store, progress=False, **kwargs)
    return trainer


def same_bits(a: Learner[Any, Any], b: Learner[Any, Any]) -> bool:
    first, second = a.state(), b.state()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def same_gradients(
    trainer: Trainer, x: torch.Tensor, loss: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[StepOutput, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One step on `x`, its gradients held against those of `loss`, a definition of the same loss.

    Returns what the step says, the gradients of the activation's own parameters, and autograd's of all.
    """
    sae = trainer.sae
    loss.backward()
    expected = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    unit = sae.W_dec.detach().clone()
    found: list[Any] = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda *args: found.append(args))
    output = trainer.step(x)
    ((grads, _, _, own, _, _),) = found
    encoder_grad, decoder_grad = grads.rows(grads.edges[0], grads.edges[-1], unit)
    close(encoder_grad, expected["W_enc"].T)
    close(grads.b_enc, expected["b_enc"])
    close(grads.b_dec, expected["b_dec"])
    decoder = expected["W_dec"]
    close(decoder_grad, decoder - (decoder * unit).sum(1, keepdim=True) * unit)
    return output, own, expected


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


class Stop(Exception):  # noqa: N818
    pass


def stop_at(step: int) -> Any:
    def on_log(trainer: object, output: StepOutput) -> None:
        if output.step == step:
            raise Stop

    return on_log


CHILD = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import small_trainings as t

    def kill(trainer, output):
        if output.step == {step}:
            os.kill(os.getpid(), signal.{signal})

    store = t.small_store()
    trainer = t.Trainer(t.make(), t.quick(optimizer="sparse_adam_decay"))
    trainer.fit(store, folder={folder!r}, checkpoint_every=64 * 4, log_every=1, progress=False, on_log=kill)
    print("finished")
"""


def child(folder: Path, step: int, name: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(CHILD).format(
        tests=str(Path(__file__).parent), step=step, folder=str(folder), signal=name
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )
