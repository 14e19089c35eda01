"""Gated: separate gates and magnitudes (Rajamanoharan et al. 2024, "Improving Dictionary Learning with Gated
SAEs").

Penalty, with a steered coefficient c: c d_out / target mean_b sum_j ReLU(gate). A further loss trains the
gates: the squared error of the reconstruction from ReLU(gate), with the decoder held constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import relu

from asi_lens.kernels.codes import FlatCode, SparseCode, flat_code
from asi_lens.kernels.gradients import Term, add_at, decode_sum
from asi_lens.kernels.topk import Workspace
from asi_lens.sae.kinds.free import FiresFreely
from asi_lens.sae.kinds.kind import Kind, Penalized, Picked, Sizes, pre_activations
from asi_lens.sae.sparsity import SparsityConfig


@dataclass(frozen=True)
class GatedPicks(Picked):
    """Picked of a batch, the same as a list, and its open gates with their pre-activations."""

    fired: FlatCode
    gates: SparseCode


class GatedTraining(Penalized["Gated", GatedPicks]):
    """Training of Gated: the main loss trains the magnitudes, and a loss of its own trains the gates."""

    gates_apart = True

    def picks(
        self, x: Float[Tensor, "batch d_in"], step: int, workspace: Workspace | None = None
    ) -> GatedPicks:
        """See `Training.picks`."""
        bias = self.sae.b_enc.data
        blocks = (z.to(bias) for z in pre_activations(x, self.sae.encoder_rows, bias))
        gates = flat_code((z > 0, z) for z in blocks)
        values = self.kind.magnitude(gates.values, bias, gates.indices)
        fired = gates._replace(values=values).kept(values > 0)
        return GatedPicks(fired.code(len(x)), fired, gates.code(len(x)))

    def terms(
        self, picks: GatedPicks, goal: Float[Tensor, "part d_out"], n: int
    ) -> tuple[Float[Tensor, "batch d_out"], list[Term]]:
        """See `Training.terms`. The last term is the loss of the gates."""
        residual, terms = super().terms(picks, goal, n)
        gain = self.kind.r_mag.detach().exp()[picks.code.indices]
        terms = [term._replace(gain=gain, to_b_enc=False) for term in terms]
        # b_dec is held constant too.
        missed = decode_sum(picks.gates, self.sae.W_dec.data).sub_(goal).mul_(2 / len(goal))
        return residual, [*terms, Term(picks.gates, missed, holds_b_dec=False, moves_decoder=False)]

    def penalize(self, terms: list[Term], picks: GatedPicks, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Training.penalize`."""
        *main, gates = terms
        batch = len(gates.grad)
        weight = self.weight(step) / (self.target(step) * batch)
        terms[-1] = gates._replace(pull=torch.full_like(gates.code.values, weight))
        # `grad` is 2 / batch times the error of the gates' reconstruction.
        loss = weight * gates.code.values.sum() + gates.grad.square().sum() * (batch / 4)
        return loss, self._own_gradients(main, picks.fired)

    def _own_gradients(self, main: list[Term], fired: FlatCode) -> dict[str, Tensor]:
        """Return gradients of b_mag (sum of dL/d value over the picks that fired) and of r_mag (the same sum,
        each summand times exp(r_mag) (x . w))."""
        b_mag, into = self.kind.b_mag.detach(), self.into_values(main, fired)
        along = into * (fired.values - b_mag[fired.indices])
        sums = {"r_mag": along, "b_mag": into}
        return {name: add_at(torch.zeros_like(b_mag), fired.indices, each) for name, each in sums.items()}

    def after(self, picks: GatedPicks, l0: float, step: int) -> None:
        """See `Training.after`."""
        self.steer(l0, step)


class Gated(FiresFreely):
    """A feature fires where x . w + b_enc > 0, with value ReLU(exp(r_mag) (x . w) + b_mag).

    Parameters: `r_mag` and `b_mag`, each [d_sae]; b_enc is the paper's b_gate, w its W_gate.
    """

    title = "Gated"
    trained_by = GatedTraining
    default = SparsityConfig(coefficient=0.05)
    saelens = "gated"
    saelens_names: ClassVar[Mapping[str, str]] = {
        "b_gate": "b_enc",
        "r_mag": "activation.r_mag",
        "b_mag": "activation.b_mag",
    }

    def __init__(self, config: Sizes):
        super().__init__(config)
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def magnitude(
        self,
        gate: Float[Tensor, "*batch n"],
        bias: Float[Tensor, " d_sae"],
        features: Int[Tensor, " n"] | None = None,
    ) -> Float[Tensor, "*batch n"]:
        """Return values before ReLU, from the pre-activations x . w + bias of gates: those of all features in
        order (None), or of `features`."""
        own = (bias, self.r_mag.exp(), self.b_mag)
        shift, gain, b_mag = (part.to(gate) if features is None else part.to(gate)[features] for part in own)
        return (gate - shift) * gain + b_mag

    def values(self, z: Tensor, bias: Tensor) -> Tensor:
        """See `FiresFreely.values`."""
        return relu(self.magnitude(z, bias)) * (z > 0)

    def folded(self, scale: Float[Tensor, ""], shift: Tensor | None = None) -> dict[str, Tensor]:
        """See `Kind.folded`. The magnitudes do not use b_enc, so b_mag is shifted too."""
        b_mag = self.b_mag.detach() / scale
        if shift is not None:
            b_mag = b_mag - self.r_mag.detach().exp() * shift * (1 / scale)
        return {"r_mag": self.r_mag.detach().clone(), "b_mag": b_mag}

    @staticmethod
    def from_saelens(tensors: dict[str, Tensor], shift: Tensor | None) -> dict[str, Tensor]:
        """See `Kind.from_saelens`. The magnitudes are shifted too."""
        out, name = Kind.from_saelens(tensors, shift), "activation.b_mag"
        if shift is not None:
            out[name] = out[name] + shift * tensors["activation.r_mag"].double().exp()
        return out
