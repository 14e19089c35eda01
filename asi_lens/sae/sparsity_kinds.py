"""How the kinds beside TopK are trained; `sparsity` says what each adds to the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from asi_lens.kernels.codes import SparseCode, keep, pick, stack_codes
from asi_lens.kernels.gradients import Term, decode_sum, picked_dots
from asi_lens.kernels.topk import Workspace
from asi_lens.sae.activations import BatchTopK, Gated, JumpReLU, pre_activations
from asi_lens.sae.sparsity import Sparsity, largest

# Largest change of a steered coefficient in one step, and of what it reacts to.
_STEERING = 0.03
# Share of the newest batch in BatchTopK's running threshold.
_NEWEST = 0.01


class _Penalized(Sparsity):
    """What the kinds with a penalty share: its weight, which may be steered."""

    def state(self) -> dict[str, Tensor]:
        """See `Sparsity.state`."""
        return {"coefficient": torch.tensor(self.coefficient, dtype=torch.float64)}

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """See `Sparsity.load_state`."""
        self.coefficient = float(read("coefficient"))

    def _weight(self, step: int) -> float:
        """The coefficient, warmed up, with the factors that all penalties share."""
        warm = min(1.0, (step + 1) / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        return self.coefficient * warm * self.sae.d_out

    def _pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Iterator[Float[Tensor, "rows d_sae"]]:
        """As `pre_activations`, in the weights' dtype."""
        bias = self.sae.b_enc.data
        return (z.to(bias) for z in pre_activations(x, self.sae.encoder_rows, bias))

    def _steer(self, l0: float, step: int) -> None:
        excess = l0 / self.target(step) - 1
        self.coefficient *= math.exp(_STEERING * max(-1.0, min(1.0, excess)))


class _BatchTopK(Sparsity):
    """The k x batch largest pre-activations of the batch fire, if they are above zero."""

    _least: Tensor | None = None

    def code(
        self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None
    ) -> SparseCode:
        """See `Sparsity.code`."""
        sae = self.sae
        found, least = largest(x, sae.encoder_rows, sae.b_enc.data, self.target(step), workspace)
        kept = (found.values >= least) & (found.values > 0)
        self._least = found.values[kept].amin() if bool(kept.any()) else None
        return keep(found, kept)

    def after(self, l0: float, step: int) -> None:
        """See `Sparsity.after`; the threshold of inference follows."""
        activation = self.sae.activation
        assert isinstance(activation, BatchTopK)
        if self._least is not None:
            # The first batch sets it, unless `set_threshold` has.
            share = _NEWEST if bool(activation.threshold > 0) else 1.0
            activation.threshold.lerp_(self._least.to(activation.threshold), share)


class _ReLU(_Penalized):
    """L1, steered towards the target."""

    def penalize(self, terms: list[Term], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Sparsity.penalize`."""
        code, batch = terms[0].code, len(terms[0].grad)
        weight = self._weight(step) / (self.target(step) * batch)
        terms[0] = terms[0]._replace(pull=torch.full_like(code.values, weight))
        return weight * code.values.sum(), {}

    def after(self, l0: float, step: int) -> None:
        """See `Sparsity.after`."""
        self._steer(l0, step)


class _Gated(_Penalized):
    """Values by the magnitudes, gates by a loss of their own."""

    gates_apart = True
    _gates: SparseCode

    def code(
        self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None
    ) -> SparseCode:
        """See `Sparsity.code`; keeps the open gates for `terms`."""
        fired, gates, bias = [], [], self.sae.b_enc.data
        for z in self._pre_activations(x):
            values = self._activation().magnitude(z, bias)
            fired.append(pick((z > 0) & (values > 0), values))
            gates.append(pick(z > 0, z))
        self._gates = stack_codes(gates)
        return stack_codes(fired)

    def terms(
        self, code: SparseCode, goal: Float[Tensor, "part d_out"], n: int
    ) -> tuple[Float[Tensor, "batch d_out"], list[Term]]:
        """See `Sparsity.terms`; the last one is the gates'."""
        residual, terms = super().terms(code, goal, n)
        gain = self._activation().r_mag.detach().exp()[code.indices]
        terms = [term._replace(gain=gain, to_b_enc=False) for term in terms]
        # b_dec, too, is constant there.
        missed = decode_sum(self._gates, self.sae.W_dec.data).sub_(goal).mul_(2 / len(goal))
        return residual, [*terms, Term(self._gates, missed, holds_b_dec=False, moves_decoder=False)]

    def penalize(self, terms: list[Term], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Sparsity.penalize`."""
        *main, gates = terms
        batch = len(gates.grad)
        weight = self._weight(step) / (self.target(step) * batch)
        terms[-1] = gates._replace(pull=torch.full_like(gates.code.values, weight))
        # `grad` is 2 / batch times what the gates' reconstruction misses.
        loss = weight * gates.code.values.sum() + gates.grad.square().sum() * (batch / 4)
        return loss, self._own_gradients(main)

    def _own_gradients(self, main: list[Term]) -> dict[str, Tensor]:
        """Sums over the picks that fired: dL/d value for b_mag, times exp(r_mag) (x . w) for r_mag."""
        activation, decoder = self._activation(), self.sae.W_dec.data
        b_mag = activation.b_mag.detach()
        out = {"r_mag": torch.zeros_like(b_mag), "b_mag": torch.zeros_like(b_mag)}
        whole, features = main[0].code.values, main[0].code.indices.flatten()
        for term in main:
            into = picked_dots(term.grad, decoder, term.code.indices) * (term.code.values > 0)
            out["b_mag"].index_add_(0, features, into.flatten())
            along = into * (whole - b_mag[term.code.indices])
            out["r_mag"].index_add_(0, features, along.flatten())
        return out

    def _activation(self) -> Gated:
        activation = self.sae.activation
        assert isinstance(activation, Gated)
        return activation

    def after(self, l0: float, step: int) -> None:
        """See `Sparsity.after`."""
        self._steer(l0, step)


class _JumpReLU(_Penalized):
    """Thresholds that learn from what lies near them."""

    _near: SparseCode
    _acts: Tensor

    def code(
        self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None
    ) -> SparseCode:
        """See `Sparsity.code`; keeps what is near a threshold for `penalize`."""
        threshold = self._threshold()
        fired, near, acts = [], [], []
        for z in self._pre_activations(x):
            on = (z > threshold) & (z > 0)
            fired.append(pick(on, z))
            close = (z - threshold).abs() < self.config.bandwidth / 2
            # Ones mark what is near; zeros fill up.
            near.append(pick(close, torch.ones_like(z)))
            acts.append(pick(close, z * on))
        self._near, self._acts = stack_codes(near), stack_codes(acts).values
        return stack_codes(fired)

    def penalize(self, terms: list[Term], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Sparsity.penalize`."""
        code, batch = terms[0].code, len(terms[0].grad)
        weight, target, width = self._weight(step), self.target(step), self.config.bandwidth
        l0 = (code.values > 0).to(code.values.dtype).sum() / batch
        by_l0 = torch.zeros_like(l0)
        if self.config.penalty == "l0":
            excess = l0 / target - 1
            loss, by_l0 = weight * excess.square(), 2 * weight * excess / target
        else:
            soft = torch.tanh(code.values)
            loss = weight / (target * batch) * soft.sum()
            terms[0] = terms[0]._replace(pull=weight / (target * batch) * (1 - soft.square()))
        return loss, {
            "threshold": self._threshold_gradient(terms, by_l0 / batch, weight / (target * batch), width)
        }

    def _threshold_gradient(self, terms: list[Term], by_count: Tensor, slope: float, width: float) -> Tensor:
        """Sum over what is near of -(threshold / width) dL/d act - (1 / width) dL/d [fired]."""
        indices, marks = self._near
        threshold = self._threshold()
        there = threshold[indices]
        into = torch.zeros_like(marks)
        for term, size in zip(terms, [len(threshold), *self.config.prefixes], strict=False):
            into += picked_dots(term.grad, self.sae.W_dec.data, indices) * (indices < size)
        if self.config.penalty == "tanh":
            into += slope * (1 - torch.tanh(self._acts).square())
        gradient = -(there * into + by_count) / width * marks
        return torch.zeros_like(threshold).index_add_(0, indices.flatten(), gradient.flatten())

    def _threshold(self) -> Tensor:
        activation = self.sae.activation
        assert isinstance(activation, JumpReLU)
        return activation.threshold.detach()

    def after(self, l0: float, step: int) -> None:
        """See `Sparsity.after`; thresholds stay above zero."""
        self._threshold().clamp_(min=0)
        if self.config.penalty == "tanh":
            self._steer(l0, step)


KINDS: dict[str, type[Sparsity]] = {
    "topk": Sparsity,
    "batchtopk": _BatchTopK,
    "jumprelu": _JumpReLU,
    "relu": _ReLU,
    "gated": _Gated,
}
"""How each of `dictionary.ACTIVATIONS` is trained."""
