"""How each activation function is trained: its picks of a batch, its penalty, its own parameters.

The main loss is the same for all: squared error, for nested prefixes of the dictionary if `prefixes` says
so (Matryoshka, Bussmann et al. 2025). A penalty on top aims at `k` features a token where the function
itself does not see to it:

- `topk`, `batchtopk`: none. BatchTopK (Bussmann et al. 2024) lets the k x batch largest fire, and keeps the
  running mean of the smallest of them as its threshold for inference.
- `jumprelu` (Rajamanoharan et al. 2024): thresholds learn through a rectangular kernel of width `bandwidth`:
  d act / d threshold = -(threshold / bandwidth) K, d [fired] / d threshold = -(1 / bandwidth) K, where K is 1
  for pre-activations within half a bandwidth of the threshold. Penalty `l0`: c d_in (l0 / target - 1)^2, or
  `tanh`: c d_in / target mean_b sum_j tanh(act), steered.
- `relu`: c d_in / target mean_b sum_j act (L1 with unit decoder rows), steered.
- `gated` (Rajamanoharan et al. 2024): the same of ReLU(gate), steered, and the squared error of what
  ReLU(gate) reconstructs with the decoder held constant: what teaches the gate.

d_in stands there since the main loss, too, is d_in times a fraction of the variance. Steered: in every step c
is multiplied by exp(0.03 (l0 / target - 1)), at most by 3 % either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import OptionError, require, require_whole, unknown_name
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.gradients import Term, decode_sum
from asi_lens.kernels.topk import Workspace, encode_topk
from asi_lens.sae.activations import Gated, ReLU, Thresholded
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.training.mesh import Mesh

PENALTIES = ("l0", "tanh")


@dataclass(frozen=True)
class SparsityConfig:
    """Options of training beyond TopK. Raises OptionError or UnknownNameError for values that cannot be.

    Attributes:
        coefficient: weight of the penalty (its first value where it is steered).
        warmup_steps: steps over which it rises linearly.
        penalty: of JumpReLU, one of `PENALTIES`.
        initial_l0: features a token that the target begins at, annealed linearly down to the dictionary's
            k; None is k from the first step.
        anneal_fraction: share of the steps that takes.
        bandwidth: of JumpReLU's kernel, in units of normalized activations.
        threshold_lr: factor on the learning rate of JumpReLU's thresholds. They are numbers around 1 in those
            units, on which Adam moves weights by the learning rate in a step: an l0 that is annealed would
            wait for them.
        prefixes: sizes of the nested dictionaries below the whole one, ascending; none is no Matryoshka.
    """

    coefficient: float | int = 1.0
    warmup_steps: int = 0
    penalty: str = "l0"
    initial_l0: float | int | None = None
    anneal_fraction: float | int = 0.5
    bandwidth: float | int = 0.1
    threshold_lr: float | int = 10.0
    prefixes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for key in ("coefficient", "bandwidth", "threshold_lr"):
            value = getattr(self, key)
            require(math.isfinite(value) and value > 0, key, value, "above 0")
        require_whole("warmup_steps", self.warmup_steps, 0)
        if self.penalty not in PENALTIES:
            raise unknown_name("penalty", self.penalty, PENALTIES)
        require(0 <= self.anneal_fraction <= 1, "anneal_fraction", self.anneal_fraction, "from 0 to 1")
        sizes = list(self.prefixes)
        ascending = sizes == sorted(set(sizes)) and all(size >= 1 for size in sizes)
        require(ascending, "prefixes", sizes, "whole numbers of at least 1, ascending")
        object.__setattr__(self, "prefixes", tuple(sizes))


class Sparsity:
    """TopK's way, which the others change.

    Attributes:
        sae: the dictionary. config: the options. n_steps: steps of the whole run.
        coefficient: weight of the penalty as it is now.
        gates_apart: whether b_enc decides what fires and has no part in the values.
        own_lr: factor on the learning rate of the activation's own parameters.
    """

    gates_apart = False

    def __init__(
        self, sae: SparseAutoencoder, config: SparsityConfig, n_steps: int, mesh: Mesh | None = None
    ):
        for size in config.prefixes:
            require(size < sae.d_sae, "prefixes", size, f"below d_sae={sae.d_sae}")
        start = sae.k if config.initial_l0 is None else config.initial_l0
        if not sae.k <= start <= sae.d_sae:
            raise OptionError(
                f"initial_l0={start} is not allowed; a schedule that is annealed down to k={sae.k} begins "
                f"from there to d_sae={sae.d_sae}"
            )
        self.sae = sae
        self.config = config
        self.n_steps = n_steps
        self.mesh = mesh or Mesh()
        self.coefficient = config.coefficient
        self.own_lr = config.threshold_lr if sae.config.activation == "jumprelu" else 1.0

    def target(self, step: int) -> float:
        """Features a token that step `step` (from 0) aims at."""
        start = self.sae.k if self.config.initial_l0 is None else self.config.initial_l0
        steps = self.config.anneal_fraction * self.n_steps
        share = min(1.0, step / steps) if steps else 1.0
        return start + share * (self.sae.k - start)

    def code(
        self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None
    ) -> SparseCode:
        """The picks of a batch of centered rows."""
        return self.sae.activation.code(x, self.sae.encoder_rows, self.sae.b_enc.data, workspace)

    def terms(
        self, code: SparseCode, goal: Float[Tensor, "part d_out"], n: int
    ) -> tuple[Float[Tensor, "batch d_out"], list[Term]]:
        """Reconstruction minus goal, both without b_dec, and the terms of the main loss: the whole
        dictionary, then its prefixes. They are of all `n` tokens of the batch, `code` and `goal` of this
        rank's."""
        decoder, scale = self.sae.W_dec.data, 2 / n
        residual = self.mesh.over_features(decode_sum(code, decoder)).sub_(goal)
        code, residual = self.mesh.whole_code(code, n), self.mesh.whole(residual, n)
        terms = [Term(code, residual * scale)]
        for size in self.config.prefixes:
            part = SparseCode(code.indices, code.values * (code.indices < size))
            terms.append(Term(part, decode_sum(part, decoder).sub_(goal).mul_(scale)))
        return residual, terms

    def penalize(self, terms: list[Term], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The penalty, and gradients of the activation's own parameters; may add a pull to the first term."""
        return terms[0].grad.new_zeros(()), {}

    def after(self, l0: float, step: int) -> None:
        """What follows a step whose batch had `l0` features a token."""

    def state(self) -> dict[str, Tensor]:
        """Tensors to store."""
        return {}

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """The inverse of `state`."""


def has_threshold(sae: SparseAutoencoder) -> bool:
    """Whether how many features fire is a matter of thresholds or biases, which `set_threshold` sets."""
    return isinstance(sae.activation, Thresholded | Gated | ReLU)


def largest(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    mean: float | int,
    workspace: Workspace | None = None,
) -> tuple[SparseCode, Float[Tensor, ""]]:
    """A code that holds the mean x batch largest pre-activations of all rows, and the least of those."""
    wanted = round(mean * len(x))
    # Few rows hold many times the mean: look further only if one may hold more than was looked for.
    width = min(len(encoder), 4 * math.ceil(mean))
    while True:
        found = encode_topk(x, encoder, bias, width, workspace=workspace)
        values = found.values.flatten()
        least = values.kthvalue(max(1, len(values) - wanted + 1)).values
        if width == len(encoder) or not bool((found.values.amin(1) > least).any()):
            return found, least
        width = min(len(encoder), 2 * width)


@torch.no_grad()
def set_threshold(sae: SparseAutoencoder, sample: Float[Tensor, "n d_in"], l0: float | int) -> float:
    """One threshold for all features, such that `l0` of them fire on a token of the sample; returns it.

    It is zero where fewer have a positive pre-activation. Gated dictionaries and ReLU have it taken off
    `b_enc` (with ReLU that shrinks values too, but half of all features firing at first is no start either).
    Raises OptionError for an activation without thresholds, or an l0 out of range.
    """
    activation: Any = sae.activation
    require(
        has_threshold(sae),
        "activation",
        sae.config.activation,
        "'batchtopk', 'jumprelu', 'gated' or 'relu' to have a threshold",
    )
    require(0 < l0 <= sae.d_sae, "l0", l0, f"above 0 and at most d_sae={sae.d_sae}")
    rows = sae.centered(sample)
    found, least = largest(rows, sae.encoder_rows, sae.b_enc.data, l0)
    below = found.values[found.values < least]
    # Halfway to the next one, so that rounding decides nothing.
    threshold = float((least + below.max()) / 2) if len(below) else 0.0
    if isinstance(activation, Gated | ReLU):
        sae.b_enc.data.sub_(threshold)
    else:
        activation.threshold.data.fill_(threshold)
    return threshold
