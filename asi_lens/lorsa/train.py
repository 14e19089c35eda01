"""Training of a Lorsa on sequences: plain autograd, fused Adam, rows w_o of unit norm, a ledger of firings.

The loss is the mean over positions (all but the first) of the sum over d_in of (reconstruction - y_n)^2, in
normalized units, as for a dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, require
from asi_lens.base.products import without_autocast
from asi_lens.kernels import devices
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.draws import unit_rows_
from asi_lens.lorsa.data import PairBatch, SequencePairs
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.sae.finite import require_master
from asi_lens.training.checkpoint import where_it_runs
from asi_lens.training.config import TrainConfig
from asi_lens.training.learner import DivergedError, StepOutput
from asi_lens.training.ledger import DeadnessLedger
from asi_lens.training.loop import Fits
from asi_lens.training.metrics import Metrics
from asi_lens.training.schedule import lr_factor


@checked
class LorsaTrainer(Fits[SequencePairs, PairBatch]):
    """Trainer of one Lorsa: changes the Lorsa in place, on the device of the Lorsa when the trainer is made.

    `batch_size` and `n_tokens` of `TrainConfig` count positions in the loss (context - 1 of each sequence).
    `encoder_lr` is a factor on the learning rate of the rows that read, W_V.
    Raises OptionError for options that a Lorsa does not have (`optimizer` other than "adam", AuxK, bfloat16
    compute), for a Lorsa that was not initialized (heads of zeros have no gradient), and for one that was
    cast to half precision.

    Attributes:
        lorsa: the Lorsa. config: options of training. optimizer: torch's Adam. ledger: firings of units.
    """

    def __init__(self, lorsa: Lorsa, config: TrainConfig | None = None):
        self.lorsa = lorsa
        self.config = config = config or TrainConfig()
        require(config.optimizer == "adam", "optimizer", config.optimizer, "'adam' for a Lorsa")
        require(config.aux_k == 0, "aux_k", config.aux_k, "0 for a Lorsa")
        dtypes = ("auto", "float32")
        require(config.compute_dtype in dtypes, "compute_dtype", config.compute_dtype, " or ".join(dtypes))
        require(config.kernels != "triton", "kernels", config.kernels, "'auto' or 'plain' for a Lorsa")
        if not lorsa.initialization:
            raise OptionError("the heads of this Lorsa have no weights; call `initialize_lorsa` first")
        require_master(lorsa.W_O.dtype)
        others = [one for one in lorsa.parameters() if one is not lorsa.W_V]
        groups = [{"params": [lorsa.W_V], "factor": config.encoder_lr}, {"params": others, "factor": 1.0}]
        self.optimizer = torch.optim.Adam(groups, lr=config.lr, fused=True)
        self.ledger = DeadnessLedger(lorsa.n_ov, lorsa.W_O.device)
        self._steps = 0

    @property
    def d_in(self) -> int:
        """Width of inputs and outputs."""
        return self.lorsa.d_in

    @property
    def steps(self) -> int:
        """Steps done."""
        return self._steps

    @property
    def tokens(self) -> int:
        """Positions in the loss, over all steps so far."""
        return self.ledger.n_tokens

    def measure(self) -> Metrics:
        """Return no further columns: a Lorsa logs only the results of its steps."""
        return {}

    @without_autocast()
    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(self, batch: PairBatch) -> StepOutput:
        """Update the Lorsa on raw inputs and outputs of the layer, both [batch position d_in].

        The schedule of the learning rate takes `n_tokens` / (positions of this batch) as the number of steps.
        Raises DataError for shapes that do not fit, NaN or infinity, and DivergedError (naming the step) if
        the loss or a gradient is not finite. A step that raises changes nothing.

        On a GPU the host waits for numbers once, before the update.
        """
        x, y = batch.x, batch.y
        if x.shape != y.shape or x.ndim != 3 or x.shape[1] < 2:
            raise DataError(
                f"inputs have shape {tuple(x.shape)} and outputs {tuple(y.shape)}; both must be "
                f"[batch position {self.lorsa.d_in}] with at least 2 positions"
            )
        lorsa, config = self.lorsa, self.config
        # Finite batches have a finite sum, which is read with the other numbers of the step.
        target = lorsa.normalize_output(y, checked=False)[:, 1:]
        code = SparseCode(*(part[:, 1:] for part in lorsa.encode(x, checked=False)))
        n = target.shape[0] * target.shape[1]
        loss = (lorsa.decode_normalized(code) - target).square().sum() / n
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        norm = self._finish_gradients()
        sizes = SparseCode(code.indices.flatten(0, 1), code.values.detach().abs().flatten(0, 1))
        fired = self.ledger.fired(sizes)
        sums = x.sum(dtype=torch.float32) + y.sum(dtype=torch.float32)
        numbers = self._numbers(norm, loss * n, target, sums, fired)
        size, missed, spread, inputs, n_fired, n_dead = devices.read(numbers)
        if not (math.isfinite(missed) and math.isfinite(size) and math.isfinite(inputs)):
            self.optimizer.zero_grad()
            lorsa.normalize(x)
            lorsa.normalize_output(y)
            raise DivergedError(
                f"step {self.steps + 1}: loss {missed / n} or its gradient is not finite; "
                "no weight was updated. A smaller lr or clip_norm may help"
            )
        if config.clip_norm is not None:
            clip_grads_with_norm_(lorsa.parameters(), config.clip_norm, norm)
        n_steps = math.ceil(config.n_tokens / n)
        lr = config.lr * lr_factor(self.steps, n_steps, config.warmup_steps, config.decay_fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        unit_rows_(lorsa.W_O.data)
        self.ledger.update(sizes, fired)
        self._steps += 1
        return StepOutput(
            step=self.steps,
            tokens=self.tokens,
            loss=missed / n,
            aux_loss=0.0,
            penalty=0.0,
            fvu=missed / spread if spread else math.nan,
            l0=n_fired / n,
            dead_fraction=n_dead / lorsa.n_ov,
            lr=lr,
            gradient_norm=None if config.clip_norm is None else size,
        )

    @torch.no_grad()
    def _finish_gradients(self) -> Float[Tensor, ""]:
        """Remove from W_O's gradient its part along the rows, whose norm is reset to 1 anyway. Returns the
        norm of all gradients."""
        W_O, grad = self.lorsa.W_O, self.lorsa.W_O.grad
        assert grad is not None  # every parameter is in the loss
        grad.addcmul_(torch.linalg.vecdot(grad, W_O)[:, None], W_O, value=-1)
        return get_total_norm([p.grad for p in self.lorsa.parameters() if p.grad is not None])

    def _numbers(
        self, norm: Tensor, missed: Tensor, target: Tensor, sums: Tensor, fired: Tensor
    ) -> Float[Tensor, " 6"]:
        """Return gradient norm, squared error, variance, sum of the batch, firings and dead units after the
        step, for one wait."""
        rows = target.flatten(0, 1)
        spread = (rows - rows.mean(0)).square().sum()
        n_dead = self.ledger.dead_after(fired, len(rows), self.config.dead_window)
        numbers = torch.stack([norm, missed.detach(), spread, sums]).double()
        return torch.cat([numbers, torch.stack([fired.sum(), n_dead]).double()])

    def prepare(self, store: SequencePairs) -> None:
        """Check that `store` can be trained on. `fit` calls it first.

        Raises OptionError for a longer context than the Lorsa's, or a sequence longer than the batch.
        """
        longest, each = self.lorsa.config.pattern.context, store.context - 1
        require(
            store.context <= longest, "store", f"of context {store.context}", f"of context {longest} at most"
        )
        size = self.config.batch_size
        require(size >= each, "batch_size", size, f"at least {each}, the positions of a sequence that count")

    def describe(self) -> dict[str, Any]:
        """Return the options that a checkpoint must share for this trainer to continue it (JSON values)."""
        lorsa = self.lorsa
        return {
            "lorsa": asdict(lorsa.config),
            "train": self.config.as_dict(),
            "initialization": lorsa.initialization,
            **where_it_runs(lorsa.W_O.device),
        }

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that the rest of the run depends on: weights, moments, ledger."""
        out = {f"lorsa.{name}": tensor for name, tensor in self.lorsa.state_dict().items()}
        out |= {f"ledger.{name}": tensor for name, tensor in self.ledger.state().items()}
        for name, parameter in self.lorsa.named_parameters():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                out[f"optimizer.{name}.{key}"] = tensor
        return out | {"steps": torch.tensor(self.steps, device="cpu")}

    @torch.no_grad()
    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Restore the tensors of `state`; `read` returns the tensor of a name."""
        self.lorsa.load_state_dict({name: read(f"lorsa.{name}") for name in self.lorsa.state_dict()})
        self.ledger.load_state({name: read(f"ledger.{name}") for name in self.ledger.state()})
        self._steps = int(read("steps"))
        for name, parameter in self.lorsa.named_parameters():
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[parameter] = {
                key: read(f"optimizer.{name}.{key}").to(parameter.device) for key in keys
            }
