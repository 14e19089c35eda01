"""Adam for dictionaries, dense and row-sparse, with unit decoder rows; schedule and clipping.

Three optimizers, all with one step counter for the bias correction:

- `adam`: every step moves every row. Momentum moves a feature that did not fire.
- `sparse_adam`: a step leaves rows without a pick, and their moments, unchanged, as in
  `torch.optim.SparseAdam`.
- `sparse_adam_decay`: a step leaves rows without a pick unchanged, but their moments decay as if the gradient
  were zero, as in the code of the paper's authors. The decay is applied when a row fires again, so it costs
  nothing.

Master weights and moments have the parameters' dtype (float32), independent of the compute dtype of the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from asi_lens.base.errors import DataError, require, require_known
from asi_lens.kernels.codes import marked
from asi_lens.kernels.gradients import Gradients
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.training.config import OPTIMIZERS

BETAS = (0.9, 0.999)
EPS = 1e-8


def gradient_norm(
    grads: Gradients,
    decoder: Float[Tensor, "d_sae d_out"],
    own: Mapping[str, Tensor] | None = None,
    over_features: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, ""]:
    """Return the L2 norm of the gradients of all parameters, without the decoder gradient's parallel part.

    `own` holds the gradients of the activation function's parameters. `over_features` sums over ranks that
    hold different features.
    """
    total = grads.b_enc.square().sum()
    for grad in (own or {}).values():
        total = total + grad.square().sum()
    for before, after in itertools.pairwise(grads.edges):
        for grad in grads.rows(before, after, decoder):
            total = total + grad.square().sum()
    total = total if over_features is None else over_features(total)
    # Every rank has the same b_dec.
    return (total + grads.b_dec.square().sum()).sqrt()


def _are_few(fired: Tensor | None, n: int) -> bool:
    """Return whether so few rows fired that copying those rows out and back is cheaper than restoring the
    silent rows."""
    return fired is not None and 2 * len(fired) < n


class RowAdam:
    """Adam, in a variant of `OPTIMIZERS`, on the parameters of `sae` and of its activation function.

    Gradients are summed, used and discarded chunk by chunk (`Gradients`), so a d_sae x d_in gradient never
    exists. The part along the row is removed from the decoder's gradient, and rows that moved are scaled to
    unit norm. Raises UnknownNameError for an unknown variant.
    """

    def __init__(self, sae: SparseAutoencoder, kind: str = "adam"):
        require_known([kind], OPTIMIZERS, "optimizer")
        require(sae.encoder_rows.is_contiguous(), "W_enc", "rearranged", "the transposed view it was made as")
        self.sae = sae
        self.kind = kind
        self.steps = 0
        self._moments = {
            name: (torch.zeros_like(weight), torch.zeros_like(weight))
            for name, weight in self._weights().items()
        }
        # Step of each row's last update, for the decay since then.
        self._updated = torch.zeros(
            sae.d_sae if kind == "sparse_adam_decay" else 0, dtype=torch.int64, device=sae.W_dec.device
        )

    def _weights(self) -> dict[str, Tensor]:
        sae = self.sae
        return {
            "W_enc": sae.encoder_rows,
            "b_enc": sae.b_enc.data,
            "W_dec": sae.W_dec.data,
            "b_dec": sae.b_dec.data,
            **{name: parameter.data for name, parameter in sae.activation.named_parameters()},
        }

    @torch.no_grad()
    def step(
        self,
        grads: Gradients,
        lr: float,
        scale: float = 1.0,
        own: Mapping[str, Tensor] | None = None,
        own_lr: float | int = 1.0,
        encoder_lr: float = 1.0,
    ) -> None:
        """Update all parameters with learning rate `lr`, gradients multiplied by `scale` (from clipping).

        The encoder's rows are updated with `encoder_lr` times the learning rate. `own` holds gradients of the
        activation function's parameters. Every variant updates these parameters by plain Adam, with `own_lr`
        times the learning rate.
        """
        self.steps += 1
        weights = self._weights()
        decoder = weights["W_dec"]
        dense = self.kind == "adam"
        # Both decoder and encoder gradients belong to the weights before this step: they are sums over
        # picks, and only the decoder's gradient reads a weight (its own row).
        decay = self._missed_decay(grads)
        for before, after in itertools.pairwise(grads.edges):
            (start, first, _), (stop, last, _) = before, after
            if not dense and first == last:
                continue
            fired = None if dense else grads.features[first:last]
            missed = None if decay is None else decay[:, first:last, None]
            few = _are_few(fired, stop - start)
            encoder_grad, decoder_grad = grads.rows(before, after, decoder, few=few)
            if scale != 1.0:
                encoder_grad.mul_(scale)
                decoder_grad.mul_(scale)
            self._rows("W_enc", encoder_grad, start, stop, fired, missed, lr * encoder_lr)
            self._rows("W_dec", decoder_grad, start, stop, fired, missed, lr, unit_rows=True)
        biases, fired = grads.b_enc * scale, None if dense else grads.features
        if fired is not None and _are_few(fired, len(grads)):
            biases = biases[fired]
        self._rows("b_enc", biases, 0, len(grads), fired, decay, lr)
        m, v = self._moments["b_dec"]
        self._update(weights["b_dec"], m, v, grads.b_dec * scale, lr)
        for name, grad in (own or {}).items():
            m, v = self._moments[name]
            self._update(weights[name], m, v, grad * scale, lr * own_lr)
        if decay is not None:
            self._updated[grads.features] = self.steps

    def _missed_decay(self, grads: Gradients) -> Tensor | None:
        """Return [2 n]: the factors of missed decay on both moments of the n rows that fired."""
        if self.kind != "sparse_adam_decay":
            return None
        gap = (self.steps - 1 - self._updated[grads.features]).double()
        return torch.stack([beta**gap for beta in BETAS]).to(grads.b_enc)

    def _rows(
        self,
        name: str,
        grad: Tensor,
        start: int,
        stop: int,
        fired: Tensor | None,
        missed: Tensor | None,
        lr: float,
        *,
        unit_rows: bool = False,
    ) -> None:
        """Update rows `start` to `stop` of a weight; only the rows `fired` of these, if given.

        `grad` holds the gradient of rows `start` to `stop`, or of the rows that fired if these are few.
        """
        weight, m, v = tensors = [t[start:stop] for t in (self._weights()[name], *self._moments[name])]
        if fired is None:
            self._update(weight, m, v, grad, lr, unit_rows=unit_rows)
            return
        local = fired - start
        if _are_few(fired, stop - start):
            weight, m, v = picked = [t.index_select(0, local) for t in tensors]
            if missed is not None:
                m.mul_(missed[0])
                v.mul_(missed[1])
            self._update(weight, m, v, grad, lr, unit_rows=unit_rows)
            for t, new in zip(tensors, picked, strict=True):
                t.index_copy_(0, local, new)
            return
        # Most rows fired: update all rows in place, then restore the few silent rows.
        silent = torch.ones(stop - start, dtype=torch.bool, device=grad.device)
        silent[local] = False
        rest = marked(silent, stop - start - len(fired))
        kept = [t.index_select(0, rest) for t in tensors]
        if missed is not None:
            for t, factor in zip((m, v), missed, strict=True):
                t.mul_(torch.ones_like(t[:, :1] if t.ndim > 1 else t).index_copy_(0, local, factor))
        self._update(weight, m, v, grad, lr, unit_rows=unit_rows)
        for t, old in zip(tensors, kept, strict=True):
            t.index_copy_(0, rest, old)

    def _update(
        self, weight: Tensor, m: Tensor, v: Tensor, grad: Tensor, lr: float, *, unit_rows: bool = False
    ) -> None:
        # `adam` adds 1 to the count itself. Filled on the device, since a copy of a number would wait.
        count = torch.full((), float(self.steps - 1), dtype=torch.float32, device=weight.device)
        adam(
            [weight],
            [grad],
            [m],
            [v],
            [],
            [count],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )
        if unit_rows:
            weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint stores: moments, the step, and each row's last update."""
        out = {"steps": torch.tensor(self.steps, device="cpu"), "updated": self._updated}
        for name, (m, v) in self._moments.items():
            out |= {f"{name}.m": m, f"{name}.v": v}
        return out

    def load_state(self, read: Callable[[str], Tensor] | Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state`, one at a time. Raises DataError for other shapes."""
        fetch = read if callable(read) else read.__getitem__
        self.steps = int(fetch("steps"))
        named = {"updated": self._updated}
        for name, (m, v) in self._moments.items():
            named |= {f"{name}.m": m, f"{name}.v": v}
        for name, into in named.items():
            stored = fetch(name)
            if stored.shape != into.shape:
                raise DataError(
                    f"the checkpoint's moment {name} has shape {tuple(stored.shape)}; this dictionary's has "
                    f"{tuple(into.shape)}"
                )
            into.copy_(stored)
