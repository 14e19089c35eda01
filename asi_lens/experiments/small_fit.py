"""A whole run of one small transformer: from the start, or a checkpoint, to the end, measured on the way.

On one CPU with one number of threads, a resumed run ends with the same bits as a run that was never stopped.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from asi_lens.activations.massive import massive_rows
from asi_lens.activations.moments import Moments
from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.products import exact_products
from asi_lens.base.threads import short_steps
from asi_lens.collapse.output_projection import head_overlap
from asi_lens.experiments.small_training import Training, next_token_loss
from asi_lens.experiments.small_transformer import Attention, SmallTransformer
from asi_lens.inputs.corpora import Tokens
from asi_lens.training.checkpoint import read_checkpoint, require_same, where_it_runs, write_checkpoint
from asi_lens.training.loop import CHECKPOINT_SECONDS, Stop
from asi_lens.training.metrics import Metrics, MetricsLog

# Measurements with a number for each layer: columns `rank_0`, `rank_1`, ... of a run's metrics.
_LAYERED = ("rank", "z_rank", "overlap", "left_out")


@torch.no_grad()
@exact_products()
def measured(model: SmallTransformer, held_out: Tokens, sequences: int) -> Metrics:
    """Return the loss on held-out text, and per layer the ranks of attention, in float32.

    Columns: `validation_loss` (nats per token), and for every layer L `rank_L` and `z_rank_L` (effective rank
    over the width of what attention writes, and of the heads' outputs before W_O), `overlap_L` (mean cosine
    of the principal angles between heads' output subspaces) and `left_out_L` (rows of massive activations,
    which are not counted). Position 0 is not counted.
    """
    attentions, device = model.attentions(), model.embedding.weight.device
    d = model.config.d_model
    moments = [(Moments.zeros(d, device), Moments.zeros(d, device)) for _ in attentions]
    left_out = [0] * len(attentions)

    def count(layer: int, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        for i, rows in enumerate((inputs[0][:, 1:], output[:, 1:])):
            massive, _ = massive_rows(rows)
            moments[layer][i].update(rows[~massive])
            left_out[layer] += int(massive.sum()) * i

    hooks = [
        attention.W_O.register_forward_hook(lambda _, inputs, out, layer=layer: count(layer, inputs, out))
        for layer, attention in enumerate(attentions)
    ]
    try:
        losses = [
            (len(ids), next_token_loss(model, ids.to(device)).item()) for ids in held_out.batches(sequences)
        ]
    finally:
        for hook in hooks:
            hook.remove()
    out: Metrics = {"validation_loss": sum(n * loss for n, loss in losses) / len(held_out)}
    for layer, (attention, (of_z, of_out)) in enumerate(zip(attentions, moments, strict=True)):
        z = Spectrum.from_moments(of_z, name=f"z {layer}")
        written = Spectrum.from_moments(of_out, name=f"attn_out {layer}")
        out |= {f"rank_{layer}": written.effective_rank_fraction, f"left_out_{layer}": left_out[layer]}
        out |= {f"z_rank_{layer}": z.effective_rank_fraction, f"overlap_{layer}": _overlap(attention, z)}
    return out


def _overlap(attention: Attention, z: Spectrum) -> float:
    n, d = attention.n_heads, z.d
    if n == 1:
        return 0.0
    heads = attention.W_O.weight.T.reshape(n, d // n, d)
    cosines = head_overlap(heads.cpu(), z.covariance.cpu()).mean_cosine
    return ((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1))).item()


def order_of(n_sequences: int, n_steps: int, sequences: int, seed: int) -> Int[Tensor, "step sequence"]:
    """Return which sequences each step reads: all of them in random order, then again in another one."""
    generator = torch.Generator().manual_seed(seed)
    needed = n_steps * sequences
    passes = [torch.randperm(n_sequences, generator=generator) for _ in range(-(-needed // n_sequences))]
    return torch.cat(passes)[:needed].reshape(n_steps, sequences)


def fit(training: Training, train: Tokens, held_out: Tokens, folder: Path, bar: tqdm[Any]) -> None:
    """Train to the last step, from the folder's checkpoint if there is one; the log is `metrics.csv`.

    On Ctrl-C or SIGTERM a checkpoint is written after the current step. `bar` counts tokens. Raises
    OtherConfigurationError for the checkpoint of another run, DivergedError.
    """
    config, n_steps = training.model.config, training.n_steps
    sequences = training.options.batch_size // train.context
    about = {
        **{"model": asdict(config), "variant": asdict(training.variant), "seed": training.seed},
        **{"training": asdict(training.options), **where_it_runs(training.device)},
        **{"train": train.fingerprint, "held_out": held_out.fingerprint},
    }
    layered = [f"{name}_{layer}" for layer in range(config.n_layers) for name in _LAYERED]
    numbers = ["train_loss", "penalty", "gradient_norm", "lr", "tokens_per_s"]
    log = MetricsLog(["step", "tokens", "validation_loss", *numbers, *layered], folder)
    with read_checkpoint(folder) as found:
        if found is not None:
            told, read = found
            require_same(folder, told["run"], about)
            training.load_state({name: read(name) for name in told["tensors"]}, told["step"])
    log.resume(training.steps)
    order = order_of(len(train), n_steps, sequences, training.seed)
    due = {round(i * n_steps / training.options.n_points) for i in range(training.options.n_points + 1)}
    tokens, per_step = training.steps * sequences * train.context, sequences * train.context
    bar.update(tokens)
    saved, began, since = time.monotonic(), time.monotonic(), training.steps

    def save() -> None:
        state = training.state()
        told = {"run": json.loads(json.dumps(about)), "step": training.steps, "tensors": list(state)}
        write_checkpoint(folder, state, told)

    def point(step: Metrics) -> None:
        busy = max(time.monotonic() - began, 1e-9)
        speed = round((training.steps - since) * per_step / busy, 1)
        found = measured(training.model, held_out, sequences)
        log.add({"step": training.steps, "tokens": tokens, "tokens_per_s": speed, **step, **found})

    with short_steps(), Stop() as stop:
        if training.steps == 0 and not log.history:
            point(dict.fromkeys(numbers[:-1]))
        while training.steps < n_steps and stop.received is None:
            step = training.step(train.ids[order[training.steps]])
            tokens += per_step
            bar.update(per_step)
            if training.steps in due:
                bar.set_postfix_str(f"{training.variant.name}, loss {step['train_loss']:.3f}", refresh=False)
                point(step)
                began, since = time.monotonic(), training.steps
            if stop.received is not None or time.monotonic() - saved > CHECKPOINT_SECONDS:
                save()
                saved = time.monotonic()
