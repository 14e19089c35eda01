"""Training of one small transformer from nothing: the changes to compare, and a step in plain PyTorch.

A step is next-token loss, AdamW, on request Muon for W_V and W_O, and a penalty on heads that write to the
same directions. `small_fit` makes a whole run of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from asi_lens.activations.precision import few_threads
from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_whole
from asi_lens.experiments.small_transformer import (
    SmallTransformer,
    TransformerConfig,
    head_overlap_penalty,
)
from asi_lens.training.learner import DivergedError
from asi_lens.training.metrics import Metrics
from asi_lens.training.schedule import lr_factor

_BETAS = (0.9, 0.95)
_CLIP = 1.0
# Shares of the steps in which the learning rate rises and falls.
_WARMUP, _DECAY = 0.1, 0.3


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
                with few_threads(config.d_model):  # shared by threads, the decomposition has other last bits
                    nn.init.orthogonal_(drawn, generator=generator)
                attention.W_O.weight.data.copy_(drawn)
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
