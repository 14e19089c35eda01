"""Training of one small transformer from nothing, and what is measured of it on the way.

`Training` is a step in plain PyTorch: next-token loss, AdamW, on request Muon for W_V and W_O, and a penalty
on heads that write to the same directions. `fit` goes from the start, or a checkpoint, to the end. On one CPU
with one number of threads, a resumed run ends with the same bits as a run that was never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from asi_lens.activations.massive import massive_rows
from asi_lens.activations.moments import Moments
from asi_lens.activations.precision import exact_products
from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_whole
from asi_lens.base.threads import short_steps
from asi_lens.collapse.output_projection import head_overlap
from asi_lens.experiments.small_transformer import (
    Attention,
    SmallTransformer,
    TransformerConfig,
    head_overlap_penalty,
)
from asi_lens.inputs.corpora import Tokens
from asi_lens.training.checkpoint import read_checkpoint, require_same, where_it_runs, write_checkpoint
from asi_lens.training.learner import DivergedError
from asi_lens.training.loop import CHECKPOINT_SECONDS, Stop
from asi_lens.training.metrics import Metrics, MetricsLog
from asi_lens.training.schedule import lr_factor

_BETAS = (0.9, 0.95)
_CLIP = 1.0
# Shares of the steps in which the learning rate rises and falls.
_WARMUP, _DECAY = 0.1, 0.3
LAYERED = ("rank", "z_rank", "overlap", "left_out")
"""Measurements with a number for each layer: columns `rank_0`, `rank_1`, ... of a run's metrics."""


@checked
@dataclass(frozen=True)
class Variant:
    """A change to the model or to its training. Raises OptionError for a value out of range.

    Attributes:
        name: name in tables and figures.
        gate: a sigmoid gate on the heads' outputs (arXiv 2505.06708); the MLP is narrower in return.
        weight_decay: decoupled weight decay of all matrices (not of norms and biases).
        muon: Muon (`torch.optim.Muon`) instead of AdamW for W_V and W_O.
        orthogonality: weight of `head_overlap_penalty`, averaged over layers, in the loss.
        frozen: W_O is a random orthogonal matrix that is never updated.
    """

    name: str
    gate: bool = False
    weight_decay: float = 0.1
    muon: bool = False
    orthogonality: float = 0.0
    frozen: bool = False

    def __post_init__(self) -> None:
        for key in ("weight_decay", "orthogonality"):
            value = getattr(self, key)
            require(math.isfinite(value) and value >= 0, key, value, "finite and at least 0")
        fits = not (self.frozen and self.orthogonality)
        require(fits, "orthogonality", self.orthogonality, "0 where W_O is frozen")


@checked
@dataclass(frozen=True)
class TrainingConfig:
    """Options that all variants share. Raises OptionError for a value out of range.

    Attributes:
        n_tokens: tokens to train on; a text with fewer is read again in another order.
        batch_size: tokens of a step, in whole sequences.
        lr: largest learning rate; it rises over a tenth of the steps and falls over the last three tenths.
        n_points: measurements after the first one, evenly over the steps.
        compute_dtype: "float32", or "bfloat16" for the products of training; measurements are in float32.
    """

    n_tokens: int
    batch_size: int
    lr: float
    n_points: int
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        for key in ("n_tokens", "batch_size", "n_points"):
            require_whole(key, getattr(self, key), 1)
        require(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "above 0")
        known = self.compute_dtype in ("float32", "bfloat16")
        require(known, "compute_dtype", self.compute_dtype, "float32 or bfloat16")

    def n_steps(self, context: int) -> int:
        """Return the number of steps. Raises OptionError for less than a sequence or a step."""
        require(self.batch_size >= context, "batch_size", self.batch_size, f"at least context={context}")
        batch = self.batch_size // context * context
        require(self.n_tokens >= batch, "n_tokens", self.n_tokens, f"at least batch_size={batch}")
        require(self.n_points <= self.n_tokens // batch, "n_points", self.n_points, "at most the steps")
        return self.n_tokens // batch


def sized(config: TransformerConfig, variant: Variant) -> TransformerConfig:
    """Return the sizes of a variant that has as many parameters as `config`.

    A gate has d (d + 1) parameters in a block and a hidden unit of SwiGLU 3 d, so the MLP is (d + 1) / 3
    units narrower. The counts are equal if d + 1 is a multiple of 3 (128, 512), else they differ by at most
    d in a block. Raises OptionError for an MLP that has no more units than that.
    """
    if not variant.gate:
        return config
    paid = round((config.d_model + 1) / 3)
    require(config.d_mlp > paid, "d_mlp", config.d_mlp, f"above {paid}, which the gate is paid with")
    return replace(config, gate=True, d_mlp=config.d_mlp - paid)


class Training:
    """A model, its optimizers, and the number of steps that were done."""

    def __init__(
        self,
        config: TransformerConfig,
        variant: Variant,
        options: TrainingConfig,
        *,
        n_steps: int,
        seed: int,
        device: torch.device,
    ):
        self.variant, self.options, self.n_steps, self.device = variant, options, n_steps, device
        self.seed, self.steps = seed, 0
        self.model = SmallTransformer(sized(config, variant), seed).to(device)
        if variant.frozen:
            for layer, attention in enumerate(self.model.attentions()):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
                drawn = torch.empty(config.d_model, config.d_model)
                attention.W_O.weight.data.copy_(nn.init.orthogonal_(drawn, generator=generator))
                attention.W_O.weight.requires_grad_(False)
        self.optimizers = list(_optimizers(self.model, variant, options.lr))

    def step(self, ids: Int[Tensor, "batch position"]) -> Metrics:
        """Train on one batch. Returns loss (without penalty), penalty, gradient norm and learning rate.

        Raises DivergedError, before anything is updated, if a number is not finite.
        """
        lr = self.options.lr * lr_factor(self.steps, self.n_steps, round(_WARMUP * self.n_steps), _DECAY)
        ids = ids.to(self.device)
        half = self.options.compute_dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            loss = next_token_loss(self.model, ids)
        penalty = self._penalty() if self.variant.orthogonality else torch.zeros_like(loss)
        (loss + self.variant.orthogonality * penalty).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        told = {"train_loss": loss.item(), "penalty": penalty.item(), "gradient_norm": norm.item(), "lr": lr}
        if not all(map(math.isfinite, told.values())):
            raise DivergedError(f"{self.variant.name}: not finite in step {self.steps + 1} ({told})")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1
        return {**told}

    def _penalty(self) -> Float[Tensor, ""]:
        each = [head_overlap_penalty(a.W_O.weight, a.n_heads) for a in self.model.attentions()]
        return torch.stack(each).mean()

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next step depends on."""
        out = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for number, values in optimizer.state_dict()["state"].items():
                out |= {f"optimizer.{i}.{number}.{key}": tensor for key, tensor in values.items()}
        return out

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from a `state` after `steps` steps."""
        self.model.load_state_dict(_below(state, "model."))
        for i, optimizer in enumerate(self.optimizers):
            found: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _below(state, f"optimizer.{i}.").items():
                number, key = name.split(".")
                found.setdefault(int(number), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": found})
        self.steps = steps


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _optimizers(model: SmallTransformer, variant: Variant, lr: float) -> Iterator[torch.optim.Optimizer]:
    """Yield AdamW, and Muon for the matrices that it gets. Raises OptionError for a PyTorch without Muon."""
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    by_muon: list[Tensor] = []
    if variant.muon:
        require(hasattr(torch.optim, "Muon"), "PyTorch", torch.__version__, "2.9 or later, which has Muon")
        both = [W for a in model.attentions() for W in (a.W_V.weight, a.W_O.weight)]
        by_muon = [weight for weight in both if weight.requires_grad]
    taken = {id(weight) for weight in by_muon}
    matrices = [weight for weight in learned if weight.ndim == 2 and id(weight) not in taken]
    vectors = [weight for weight in learned if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": variant.weight_decay}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    yield torch.optim.AdamW(groups, lr=lr, betas=_BETAS)
    if by_muon:
        # Its updates have the size of AdamW's, so that one learning rate serves both.
        decay = variant.weight_decay
        yield torch.optim.Muon(by_muon, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")


def next_token_loss(model: nn.Module, ids: Int[Tensor, "batch position"]) -> Float[Tensor, ""]:
    """Return the mean loss (nats) of every token but the first of its sequence."""
    logits = model(ids[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


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
    layered = [f"{name}_{layer}" for layer in range(config.n_layers) for name in LAYERED]
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
