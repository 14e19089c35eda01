"""Training of a dictionary: the trainer, with its step, its stream of batches and its checkpoint state."""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from asi_lens.activations.pairs import Pair, PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.doors import checked
from asi_lens.base.errors import OptionError, require, require_known
from asi_lens.base.products import without_autocast
from asi_lens.kernels import devices
from asi_lens.kernels.gradients import Gradients, sum_gradients
from asi_lens.kernels.topk import Workspace
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.drift import Drift
from asi_lens.sae.finite import power, require_finite_rows, require_trainable, require_weights, total_of
from asi_lens.sae.kernel_step import KernelStep, choose_kernels
from asi_lens.sae.kinds import kinds_with
from asi_lens.sae.kinds.kind import Picked
from asi_lens.sae.optim import RowAdam, gradient_norm
from asi_lens.sae.passes import Pass, auxiliary_term
from asi_lens.sae.search import SEARCHES, SubspaceSearch, is_due
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.training.checkpoint import where_it_runs
from asi_lens.training.config import TrainConfig
from asi_lens.training.learner import DivergedError, StepOutput
from asi_lens.training.ledger import DeadnessLedger
from asi_lens.training.loop import Fits
from asi_lens.training.mesh import Mesh, Part
from asi_lens.training.metrics import Metrics
from asi_lens.training.schedule import lr_factor

__all__ = ["DivergedError", "SparsityConfig", "StepOutput", "TrainConfig", "Trainer"]

# Rows of the first weights that a checkpoint keeps, to recognize its own run.
_PROBE_ROWS = 32


@checked
class Trainer(Fits[ActivationStore | PairedStores, Tensor | Pair | Part]):
    """Trainer of one dictionary: changes it in place, on its device when the trainer is made.

    Raises OptionError for options that do not go together, and for weights of half precision or of other
    sizes than the dictionary's configuration says.

    Attributes:
        sae: the dictionary. config: options of training. optimizer: moments and step. ledger: firings.
        drift: measurement of the weights for every logged row, or None.
        mesh: split of features and tokens over ranks. With several ranks, `sae` has the features of this rank
            (`mesh.shard`). A batch is then either the same on every rank, which picks its own tokens, or a
            `Part` with only this rank's tokens.
        search: search for the top k, one of `search.SEARCHES`; "subspace" begins with `prepare`.
        kernels: steps by the GPU kernels (`TrainConfig.kernels`), or None; `why_plain` then has the reason.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        config: TrainConfig | None = None,
        sparsity: SparsityConfig | None = None,
        drift: Drift | None = None,
        mesh: Mesh | None = None,
        search: str = "exact",
    ):
        require_weights(sae)
        self.sae, self.drift, self.mesh = sae, drift, mesh or Mesh()
        self.config = config or TrainConfig()
        sparsity = sparsity or SparsityConfig()
        if self.mesh.config.size > 1 and drift is not None:
            raise OptionError("drift is not allowed over several ranks: only a single process measures it")
        if sae.is_transcoder and drift is not None:
            raise OptionError("drift is not allowed for a transcoder: its rows are of two sites, not of one")
        kind = sae.activation
        if self.mesh.config.size > 1 and (not kind.over_ranks or sparsity.prefixes):
            raise OptionError(
                f"activation={sae.config.activation!r} with prefixes={list(sparsity.prefixes)} is not "
                f"allowed over several ranks; there it is {kinds_with('over_ranks')} without prefixes"
            )
        require_known([search], SEARCHES, "search")
        if search != "exact" and (not kind.picks_k or self.mesh.config.size > 1):
            raise OptionError(
                f"search={search!r} is not allowed; it is for {kinds_with('picks_k')} on one process"
            )
        self.search = search
        self.subspace: SubspaceSearch | None = None
        self.sparsity = kind.trained_by(sae, sparsity, self.n_steps, self.mesh)
        self.aux_k = sae.d_out // 2 if self.config.aux_k == "auto" else int(self.config.aux_k)
        self.compute_dtype = _compute_dtype(self.config.compute_dtype, sae.W_dec)
        how = (sae, self.config, sparsity, self.mesh, search, self.compute_dtype)
        plan, self.why_plain = choose_kernels(*how)
        self.kernels = None if plan is None else KernelStep(sae, self.config, plan)
        self.optimizer = self.kernels.optimizer if self.kernels else RowAdam(sae, self.config.optimizer)
        self.ledger = DeadnessLedger(sae.d_sae, sae.W_dec.device)
        self._workspace = Workspace()
        self._probe: Tensor | None = None

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.sae.d_in

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.optimizer.steps

    @property
    def tokens(self) -> int:
        """Number of tokens seen, the position in the stream of data."""
        return self.ledger.n_tokens

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(self.config.n_tokens / self.config.batch_size)

    @torch.no_grad()
    @without_autocast()
    def step(self, batch: Tensor | Pair | Part) -> StepOutput:
        """Update on raw activations [batch d_in], or for a transcoder on a `Pair` of inputs and outputs.

        Raises DataError for a batch of the wrong width, without rows, or with NaN or infinity, or for weights
        with NaN or infinity, or decoder rows not of unit norm, before the first step. Raises DivergedError
        (naming the step) if the loss or a gradient is not finite. A step that raises changes nothing.

        On a GPU the host of TopK waits for numbers two times (in `sum_gradients`, and for the checks before
        the update), with AuxK three times, with the kernels once, however large the dictionary is.
        """
        sae, mesh = self.sae, self.mesh
        if self.steps == 0:
            require_trainable(sae, sae.W_dec.data)
        sae.check_batch(batch.rows if isinstance(batch, Part) else batch)
        n = len(batch)
        self._first_weights()
        first, last = mesh.tokens(n)
        given = batch.rows if isinstance(batch, Part) else batch[first:last]
        x, goal = sae.sides(given, checked=False)  # checked by `_conclude`
        return self._conclude(self._pass(x, goal, n) if self.kernels is None else self.kernels.forward(x))

    def _pass(self, x: Float[Tensor, "part d_in"], goal: Float[Tensor, "part d_out"], n: int) -> Pass:
        """Return the plain pass of `n` tokens, of which this rank has a part."""
        sae, config, mesh = self.sae, self.config, self.mesh
        picks = self._picks(x)
        # b_dec cancels: reconstruction - x_n = acts W_dec + b_dec - x_n = acts W_dec - x.
        residual, terms = self.sparsity.terms(picks, goal, n)
        penalty, own = self.sparsity.penalize(terms, picks, self.steps)
        error = power(residual)
        aux_loss = torch.zeros_like(error)
        dead = self.ledger.dead(config.dead_window) if self.aux_k else picks.code.indices[:0, 0]
        if self.aux_k and mesh.count(len(dead)):
            weight, to_b_enc = config.aux_weight, not self.sparsity.gates_apart
            options = (self.aux_k, weight, to_b_enc, self.compute_dtype, self._workspace)
            term, aux_loss = auxiliary_term(sae, mesh, x, residual, dead, *options)
            terms.append(term)
        # From here on: all tokens of the batch, and the features of this rank.
        itself = goal is x
        x = mesh.whole(x, n)
        goal = x if itself else mesh.whole(goal, n)
        decoder = sae.W_dec.data
        grads = sum_gradients(
            terms,
            x,
            sae.encoder_rows,
            decoder,
            b_dec_is_read=not sae.is_transcoder,
            over_features=mesh.over_features,
        )
        if config.clip_norm:
            check = gradient_norm(grads, decoder, own, mesh.over_features)
        else:
            check = mesh.over_features(total_of(grads, own))
        apply = partial(self._apply, grads, own, picks)
        return Pass(terms[0].code, x, goal, error, aux_loss, penalty, check, apply)

    def _apply(self, grads: Gradients, own: Any, picks: Picked, lr: float, scale: float, l0: float) -> None:
        self.optimizer.step(grads, lr, scale, own, self.sparsity.own_lr, self.config.encoder_lr)
        self.sparsity.after(picks, l0, self.steps - 1)
        if self.subspace is not None:
            self.subspace.refresh(None if self.config.optimizer == "adam" else grads.features)

    def _conclude(self, done: Pass) -> StepOutput:
        """Update the dictionary by a pass, if all of its numbers are finite. Raises as `step`."""
        sae, config, mesh, n = self.sae, self.config, self.mesh, len(done.x)
        variance = power(done.goal - done.goal.mean(0))
        # Finite rows have a finite sum, which is read with the other numbers of the step.
        sums = done.x.sum() if done.goal is done.x else done.x.sum() + done.goal.sum()
        fired = self.ledger.fired(done.code)
        counts = torch.stack([fired.sum(), self.ledger.dead_after(fired, n, config.dead_window)])
        overflow = torch.zeros_like(done.error) if done.overflow is None else done.overflow.to(done.error)
        numbers = [done.error, variance, done.aux_loss, done.penalty, done.check, sums, overflow]
        # One wait for the device instead of a wait for each number.
        everything = torch.cat([torch.stack(numbers).double(), mesh.over_features(counts).double()])
        error, spread, aux, added, size, inputs, unsure, n_fired, n_dead = devices.read(everything)
        if not math.isfinite(inputs):
            require_finite_rows(done.x, "activation")
            require_finite_rows(done.goal, "output")
        if unsure and self.kernels is not None:
            return self._conclude(self.kernels.again(done, self._picks(done.x).code))
        if not all(math.isfinite(number) for number in (error, aux, added, size)):
            raise DivergedError(
                f"step {self.steps + 1}: loss {error / n} or its gradient is not finite; "
                "no weight was updated. A smaller lr or clip_norm may help"
            )
        lr = config.lr * lr_factor(self.steps, self.n_steps, config.warmup_steps, config.decay_fraction)
        done.apply(lr, min(1.0, config.clip_norm / size) if config.clip_norm and size else 1.0, n_fired / n)
        self.ledger.update(done.code, fired)
        return StepOutput(
            step=self.steps,
            tokens=self.tokens,
            loss=error / n,
            aux_loss=aux,
            penalty=added,
            fvu=error / spread if spread else math.nan,
            l0=n_fired / n,
            dead_fraction=n_dead / (sae.d_sae * mesh.config.model),
            lr=lr,
            gradient_norm=size if config.clip_norm else None,
        )

    def _picks(self, x: Float[Tensor, "part d_in"]) -> Picked:
        """Return the picks of centered rows."""
        if self.search == "exact":
            return self.sparsity.picks(x.to(self.compute_dtype), self.steps, self._workspace)
        if self.subspace is None:
            raise OptionError('search="subspace" needs the inputs\' spectrum: call fit, or prepare(store)')
        if is_due(self.steps):
            require_finite_rows(x, "activation")
            if change := self.subspace.measure(x):
                tqdm.write(f"step {self.steps + 1}: {change}")
        return Picked(self.subspace.code(x, self._workspace))

    def prepare(self, store: ActivationStore | PairedStores) -> None:
        """Prepare for `fit`: a dictionary without input normalization takes the store's; a search starts."""
        self.sae.prepare(store, first=self.steps == 0)
        if self.kernels is not None:
            self.kernels.optimizer.refresh()
        if self.search == "subspace" and self.subspace is None:
            inputs = store.inputs if isinstance(store, PairedStores) else store
            directions = inputs.spectrum.active_subspace(self.d_in).to(self.sae.W_dec)
            self.subspace = SubspaceSearch(self.sae, directions, self.config.batch_size, self.compute_dtype)

    def measure(self) -> Metrics:
        """Return columns of a logged row in addition to those of the step: `drift` and the search."""
        found: Metrics = {} if self.drift is None else {**self.drift(self.sae)}
        if (search := self.subspace) is not None:
            found |= {"search_r": search.r, "search_mass": search.mass, "search_picks": search.picks}
        return found

    def stream(self, store: ActivationStore | PairedStores, start: int) -> Iterator[Tensor | Pair | Part]:
        """Yield batches from token `start` to `n_tokens`; with several ranks, this rank's parts of them."""
        config, device = self.config, self.sae.W_dec.device
        if isinstance(store, PairedStores) or self.mesh.config.data == 1:
            yield from super().stream(store, start)
            return
        options: dict[str, Any] = {"seed": config.seed, "start": start, "n_tokens": config.n_tokens}
        for rows in store.batches(config.batch_size, **options, share=self.mesh.tokens, device=device):
            n = min(config.batch_size, config.n_tokens - start)
            start += n
            yield Part(rows, n)

    def describe(self) -> dict[str, Any]:
        """Return the options that a checkpoint must share for this trainer to continue it (JSON values)."""
        return {
            "sae": {**asdict(self.sae.config), "d_sae": self.sae.d_sae * self.mesh.config.model},
            "train": {key: value for key, value in asdict(self.config).items() if key != "kernels"},
            "sparsity": asdict(self.sparsity.config),
            "initialization": self.sae.initialization,
            **({} if self.search == "exact" else {"search": self.search}),
            **({} if self.kernels is None else {"kernels": "triton"}),
            **where_it_runs(self.sae.W_dec.device),
        }

    def _first_weights(self) -> Tensor:
        """Return a few rows of the run's first weights; equal rows mean the same start."""
        if self._probe is None or self.steps == 0:
            sae, mesh = self.sae, self.mesh
            total = sae.d_sae * mesh.config.model
            first, last = mesh.features(total)
            chosen = torch.arange(0, total, max(1, total // _PROBE_ROWS), device=sae.W_dec.device)
            own = (chosen >= first) & (chosen < last)
            parts = [sae.b_dec.data, *self._normalization().values()]
            for weights in (sae.W_dec.data, sae.encoder_rows):
                rows = weights.new_zeros(len(chosen), weights.shape[1])
                rows[own] = weights[chosen[own] - first]
                # Each row belongs to one rank; the other ranks add zeros.
                parts.insert(0, mesh.over_features(rows))
            self._probe = torch.cat([part.flatten() for part in parts])
        return self._probe

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that the rest of the run depends on. Data order and learning rate follow from
        position and configuration, and nothing else is random."""
        sae = self.sae
        out = {"sae.encoder": sae.encoder_rows, "first_weights": self._first_weights()}
        out |= {f"sae.{name}": getattr(sae, name).data for name in ("b_enc", "W_dec", "b_dec")}
        out |= {f"sae.{name}": tensor for name, tensor in self._normalization().items()}
        out |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        out |= {f"sparsity.{name}": tensor for name, tensor in self.sparsity.state().items()}
        out |= {f"activation.{name}": tensor for name, tensor in self.sae.activation.state_dict().items()}
        if self.subspace is not None:
            out |= {f"search.{name}": tensor for name, tensor in self.subspace.state().items()}
        return out | {f"ledger.{name}": tensor for name, tensor in self.ledger.state().items()}

    def _normalization(self) -> dict[str, Tensor]:
        return dict(self.sae.named_buffers(recurse=False))

    @torch.no_grad()
    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Restore the tensors of `state`. Raises OptionError for a run that started with other weights."""
        sae, first, here = self.sae, read("first_weights").to(self.sae.W_dec), self._first_weights()
        if first.shape != here.shape or not torch.allclose(first, here, rtol=1e-3, atol=1e-5):
            raise OptionError("the checkpoint's run began with other weights or another input normalization")
        self._probe = first
        sae.encoder_rows.copy_(read("sae.encoder"))
        sae.W_dec.data.copy_(read("sae.W_dec"))
        for name in ("b_enc", "b_dec"):
            getattr(sae, name).data.copy_(read(f"sae.{name}"))
        for name, tensor in self._normalization().items():
            tensor.copy_(read(f"sae.{name}"))
        self.optimizer.load_state(lambda name: read(f"optimizer.{name}"))
        self.sparsity.load_state(lambda name: read(f"sparsity.{name}"))
        for name, tensor in self.sae.activation.state_dict().items():
            tensor.copy_(read(f"activation.{name}"))
        if self.subspace is not None:
            self.subspace.load_state(lambda name: read(f"search.{name}"))
        self.ledger.load_state({name: read(f"ledger.{name}") for name in self.ledger.state()})


def _compute_dtype(choice: str, weights: Tensor) -> torch.dtype:
    if weights.dtype == torch.float64:
        require(choice != "bfloat16", "compute_dtype", choice, "auto or float32 for a float64 dictionary")
        return torch.float64
    from asi_lens.inputs.models import resolve_dtype

    return resolve_dtype(choice, weights.device)


if __name__ == "__main__":
    runpy.run_module("asi_lens.sae", run_name="__main__")  # older name of the command
