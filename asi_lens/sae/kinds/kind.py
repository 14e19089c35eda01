"""Interface of a kind of dictionary: `Kind`, the activation function, and `Training`, its training.

Each file beside this one implements both for one kind. The rest of the package reads attributes of the kind
and never compares names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from asi_lens.base.errors import require
from asi_lens.kernels import devices
from asi_lens.kernels.codes import FlatCode, SparseCode, flat_code, join_flat
from asi_lens.kernels.gradients import Term, decode_sum, dots_at
from asi_lens.kernels.topk import Workspace, encode_topk
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.training.mesh import Mesh

# Rate of a steered coefficient: at most 3 % up or down in a step.
_STEERING = 0.03
# Rows whose pre-activations are computed at a time on a CPU.
_CPU_ROWS = 256


@runtime_checkable
class Sizes(Protocol):
    """The part of `SAEConfig` that a kind reads."""

    @property
    def d_in(self) -> int:
        """Width of the activations."""

    @property
    def d_sae(self) -> int:
        """Number of features."""

    @property
    def k(self) -> int:
        """Features that fire on one token, or the target for that number."""

    @property
    def d_out(self) -> int | None:
        """Width of a transcoder's outputs; None for an autoencoder."""


class Weights(nn.Module):
    """The part of a dictionary that the training of a kind reads; `SparseAutoencoder` adds the rest."""

    config: Sizes
    activation: Kind
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.config.d_out or self.config.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.config.d_sae

    @property
    def k(self) -> int:
        """Features that may fire on one token."""
        return self.config.k

    @property
    def encoder_rows(self) -> Float[Tensor, "d_sae d_in"]:
        """W_enc^T without gradient, contiguous, one feature per row. It shares memory with W_enc."""
        return self.W_enc.data.T


@dataclass(frozen=True)
class Picked:
    """The features that a training step picked; kinds add what later methods of the step need.

    Attributes:
        code: features and values that enter the reconstruction.
    """

    code: SparseCode


K = TypeVar("K", bound="Kind")
P = TypeVar("P", bound=Picked)


class Training(Generic[K, P]):
    """Training of a kind. This base class has no penalty and uses the picks of inference (TopK).

    Attributes:
        sae: the dictionary. kind: its activation. config: the options. n_steps: steps of the whole run.
        coefficient: current weight of the penalty.
        gates_apart: whether b_enc decides only which features fire, and does not enter their values.
    """

    gates_apart = False

    def __init__(self, sae: Weights, config: SparsityConfig, n_steps: int, mesh: Mesh | None = None):
        for size in config.prefixes:
            require(size < sae.d_sae, "prefixes", size, f"below d_sae={sae.d_sae}")
        free = sae.activation.picks_k or sae.k < sae.d_sae
        wanted = f"below d_sae={sae.d_sae}: it is the target for the features that fire on a token"
        require(free, "k", sae.k, wanted)
        start = sae.k if config.initial_l0 is None else config.initial_l0
        allowed = f"from k={sae.k}, to which it is annealed, to d_sae={sae.d_sae}"
        require(sae.k <= start <= sae.d_sae, "initial_l0", start, allowed)
        self.sae = sae
        self.kind = cast(K, sae.activation)
        self.config = config
        self.n_steps = n_steps
        self.mesh = mesh or Mesh()
        self.coefficient = config.coefficient

    @property
    def own_lr(self) -> float | int:
        """Factor on the learning rate of the activation's own parameters."""
        return self.config.threshold_lr if self.kind.threshold_learns else 1.0

    def target(self, step: int) -> float:
        """Return the target of step `step` (from 0), in features per token."""
        start = self.sae.k if self.config.initial_l0 is None else self.config.initial_l0
        steps = self.config.anneal_fraction * self.n_steps
        share = min(1.0, step / steps) if steps else 1.0
        return start + share * (self.sae.k - start)

    def picks(self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None) -> P:
        """Return the picks of a batch of centered rows; over ranks, those of this rank's features."""
        code = self.kind.code(x, self.sae.encoder_rows, self.sae.b_enc.data, workspace)
        return cast(P, Picked(self.mesh.pick(code, self.sae.k)))

    def terms(
        self, picks: P, goal: Float[Tensor, "part d_out"], n: int
    ) -> tuple[Float[Tensor, "batch d_out"], list[Term]]:
        """Return reconstruction minus goal (both without b_dec), and the terms of the main loss: the whole
        dictionary, then its prefixes. `picks` and `goal` are of this rank's tokens, the results of all `n`
        tokens of the batch."""
        decoder, scale = self.sae.W_dec.data, 2 / n
        residual = self.mesh.over_features(decode_sum(picks.code, decoder)).sub_(goal)
        code, residual = self.mesh.whole_code(picks.code, n), self.mesh.whole(residual, n)
        terms = [Term(code, residual * scale)]
        for size in self.config.prefixes:
            part = SparseCode(code.indices, code.values * (code.indices < size))
            terms.append(Term(part, decode_sum(part, decoder).sub_(goal).mul_(scale)))
        return residual, terms

    def penalize(self, terms: list[Term], picks: P, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the penalty and the gradients of the activation's own parameters. May set the `pull` of
        `terms[0]`, the penalty's gradient on the values."""
        return terms[0].grad.new_zeros(()), {}

    def after(self, picks: P, l0: float, step: int) -> None:
        """Update the training's state after a step with these picks, `l0` features per token."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint stores."""
        return {}

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Restore the tensors of `state`; `read` returns the tensor of a name."""


class Penalized(Training[K, P]):
    """Training with a penalty. Its coefficient may be steered: every step multiplies the coefficient by
    exp(0.03 (l0 / target - 1)), with the change limited to about 3 % up or down."""

    def state(self) -> dict[str, Tensor]:
        """See `Training.state`."""
        return {"coefficient": torch.tensor(self.coefficient, dtype=torch.float64, device="cpu")}

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """See `Training.load_state`."""
        self.coefficient = float(read("coefficient"))

    def weight(self, step: int) -> float:
        """Return the coefficient, warmed up, times d_out: the main loss, too, is d_out times a share of the
        variance."""
        warm = min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        return self.coefficient * warm * self.sae.d_out

    def into_values(self, terms: list[Term], at: FlatCode) -> Float[Tensor, " n"]:
        """Return the derivative in values of the main loss: of the whole dictionary and of its prefixes."""
        into = torch.zeros_like(at.values)
        for term, size in zip(terms, [self.sae.d_sae, *self.config.prefixes], strict=True):
            into += dots_at(term.grad, self.sae.W_dec.data, at.rows, at.indices) * (at.indices < size)
        return into

    def steer(self, l0: float, step: int) -> None:
        """Change the coefficient after a step whose batch had `l0` features per token."""
        excess = l0 / self.target(step) - 1
        self.coefficient *= math.exp(_STEERING * max(-1.0, min(1.0, excess)))


class Kind(nn.Module):
    """An activation function, from centered inputs to the features that fire, with the facts of its kind.

    Attributes:
        title: name in notebooks. trained_by: class of its training. default: options that train it well.
        also_nested: whether notebooks also train it with nested prefixes (Matryoshka).
        picks_k: whether each token gets exactly `k` features, the largest.
        over_ranks: whether its features may be split over several ranks.
        has_threshold: whether thresholds or biases decide how many features fire (`set_threshold`).
        threshold_learns: whether `SparsityConfig.threshold_lr` applies to its own parameters.
        saelens, saelens_transcoder: SAELens' architectures for the kind; None if SAELens has none.
        saelens_reads: whether a folder of that architecture is read as this kind.
        saelens_names: SAELens' names of tensors -> our names in `state_dict`, if they differ.
        sparsify: whether sparsify reads the kind.
        may_be_infinite: names of its own parameters that may hold infinity.
    """

    title: ClassVar[str]
    trained_by: ClassVar[type[Training]] = Training
    default: ClassVar[SparsityConfig] = SparsityConfig()
    also_nested: ClassVar[bool] = False
    picks_k: ClassVar[bool] = False
    over_ranks: ClassVar[bool] = False
    has_threshold: ClassVar[bool] = False
    threshold_learns: ClassVar[bool] = False
    saelens: ClassVar[str | None] = None
    saelens_transcoder: ClassVar[str | None] = None
    saelens_reads: ClassVar[bool] = True
    saelens_names: ClassVar[Mapping[str, str]] = {}
    sparsify: ClassVar[bool] = False
    may_be_infinite: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Sizes):
        super().__init__()

    def code(
        self,
        x: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        workspace: Workspace | None = None,
    ) -> SparseCode:
        """Return features and values of each row. Encoder and bias have one row per feature."""
        raise NotImplementedError

    def set_threshold(self, b_enc: Float[Tensor, " d_sae"], threshold: float) -> None:
        """Let only features with a pre-activation above `threshold` fire. May change `b_enc` in place."""
        raise NotImplementedError

    def reset(self) -> None:
        """Set own parameters and thresholds to zero, as a new dictionary has them."""
        for own in self.state_dict().values():
            own.zero_()

    def rescale(self, factor: float) -> None:
        """Adapt own parameters after encoder rows and b_enc were multiplied by `factor`, so that values are
        multiplied by `factor` too.

        The closed-form norm of `initialize` assumes this. A kind whose values are not proportional to its
        pre-activations starts at a norm that is not the best.
        """

    def folded(self, scale: Float[Tensor, ""], shift: Tensor | None = None) -> dict[str, Tensor]:
        """Return own parameters for values divided by `scale`, for `SparseAutoencoder.folded`.

        `shift [d_sae]` is subtracted from the pre-activations by folding; None if the encoder's input stays.
        """
        return {}

    def to_saelens(self, folded: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
        """Return folded tensors with the values that SAELens stores, under our names.

        Raises OptionError, naming the folder, for tensors that SAELens' format cannot represent.
        """
        return folded

    @staticmethod
    def from_saelens(tensors: dict[str, Tensor], shift: Tensor | None) -> dict[str, Tensor]:
        """Return SAELens' tensors under the names of `state_dict`, for an encoder input of x - b_dec.

        `shift [d_sae]` is the amount by which subtracting b_dec lowers the pre-activations; None if SAELens
        subtracts b_dec too.
        """
        return tensors if shift is None else {**tensors, "b_enc": tensors["b_enc"] + shift}


def pre_activations(
    x: Float[Tensor, "batch d_in"], encoder: Float[Tensor, "d_sae d_in"], bias: Float[Tensor, " d_sae"]
) -> Iterator[Float[Tensor, "rows d_sae"]]:
    """Yield x W + b in the dtype of `x`, for as many rows at a time as fit into scratch memory (on a CPU at
    most 256, which stay in the cache while they are compared)."""
    fit = max(1, devices.scratch_bytes(x.device) // (4 * len(encoder)))
    weight, shift = encoder.to(x), bias.to(x)
    for block in x.split(min(fit, _CPU_ROWS) if devices.is_host(x.device) else fit):
        yield linear(block, weight, shift)


def largest(
    x: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    bias: Float[Tensor, " d_sae"],
    mean: float | int,
    workspace: Workspace | None = None,
) -> tuple[FlatCode, Float[Tensor, ""]]:
    """Return picks that contain the mean x batch largest pre-activations of all rows, and the smallest of
    these."""
    wanted, width = round(mean * len(x)), min(len(encoder), 4 * math.ceil(mean))
    code = encode_topk(x, encoder, bias, width, workspace=workspace)
    rows = torch.arange(len(x), device=x.device).repeat_interleave(width)
    found = FlatCode(rows, code.indices.flatten(), code.values.flatten())
    least = _at_rank(found.values, wanted)
    # Few rows hold many times the mean. These may hold more than `width`, and are looked at whole.
    crowded = code.values.amin(1) > least
    if width == len(encoder) or not len(whole := crowded.nonzero().flatten()):
        return found, least
    blocks = (z.relu().to(encoder) for z in pre_activations(x[whole], encoder, bias))
    # All that is asked for is above `least`; half of it leaves the next value below, for `set_threshold`.
    more = flat_code((values > least / 2, values) for values in blocks)
    others = found._replace(values=found.values.masked_fill(crowded[rows], 0))
    found = join_flat([others, more._replace(rows=whole[more.rows])])
    return found.at(found.rows.argsort(stable=True)), _at_rank(found.values, wanted)


def _at_rank(values: Float[Tensor, " n"], rank: int) -> Float[Tensor, ""]:
    """Return the value with this rank from the largest (1), or the smallest value if there are fewer."""
    place = max(0, len(values) - rank)
    if devices.is_host(values.device):
        return values.kthvalue(place + 1).values
    # With `torch.use_deterministic_algorithms` a GPU refuses kthvalue, because of its indices.
    return values.sort().values[place]
