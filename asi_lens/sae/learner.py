"""What trains has in common: what a step says, the life of a trainer as `fit` lives it, and a whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from asi_lens.errors import AsiLensError
from asi_lens.sae.deadness import DeadnessLedger
from asi_lens.sae.mesh import Mesh
from asi_lens.sae.metrics import Logger, Row
from asi_lens.sae.train_config import TrainConfig


class DivergedError(AsiLensError, ArithmeticError):
    """A loss or gradient that is not finite; nothing was updated with it."""


@dataclass(frozen=True)
class StepOutput:
    """What one step saw, before its update.

    Attributes:
        step, tokens: steps and tokens so far, this one included.
        loss: mean over the batch of the squared error summed over d_in, on normalized activations.
        aux_loss: squared error of AuxK over the residual's variance; 0 where it is off or nothing is dead.
        penalty: what `sparsity` adds to the loss; 0 for TopK.
        fvu: squared error over the batch's variance (NaN for a batch without any).
        l0: mean number of features that fired.
        dead_fraction: share of features that did not fire in the last `dead_window` tokens.
        lr: learning rate of the step.
        gradient_norm: as `clip_norm` defines it; none without clipping.
    """

    step: int
    tokens: int
    loss: float
    aux_loss: float
    penalty: float
    fvu: float
    l0: float
    dead_fraction: float
    lr: float
    gradient_norm: float | None = None


@runtime_checkable
class Learner(Protocol):
    """What is trained: a `Trainer` of a dictionary, or one of something else with the same life."""

    config: TrainConfig
    mesh: Mesh

    @property
    def d_in(self) -> int:
        """Width of the data."""
        ...

    @property
    def steps(self) -> int:
        """Steps done."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens seen: the position in the stream of data."""
        ...

    def prepare(self, store: Any) -> None:
        """Called once before the first step. Raises OptionError for data that it cannot be trained on."""
        ...

    def stream(self, store: Any, start: int) -> Iterator[Sized]:
        """Batches from token `start` to the last; their length is their number of tokens."""
        ...

    def dead_fraction(self, window: int) -> float:
        """Share of features silent for the last `window` tokens or more, over all ranks."""
        ...

    def step_on(self, batch: Any) -> StepOutput:
        """One update. DataError and DivergedError leave everything as it was."""
        ...

    def measure(self) -> Row:
        """Columns of a logged row beside those of a step, always the same ones."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be continued (JSON values)."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the run depends on from here."""
        ...

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """The inverse of `state`."""
        ...


class Fits:
    """What trainers share: a whole run of one of them."""

    config: TrainConfig
    ledger: DeadnessLedger
    mesh = Mesh()

    def stream(self, store: Any, start: int) -> Iterator[Sized]:
        """See `Learner.stream`."""
        return self._batches(store, start)

    def _batches(self, store: Any, start: int, **more: Any) -> Iterator[Sized]:
        config = self.config
        return store.batches(
            config.batch_size, seed=config.seed, start=start, n_tokens=config.n_tokens, **more
        )

    def dead_fraction(self, window: int) -> float:
        """Share of features (or units) silent for the last `window` tokens or more, over all ranks."""
        dead, mesh = self.mesh.count(len(self.ledger.dead(window))), self.mesh
        return dead / (len(self.ledger.counts) * mesh.config.model)

    def fit(
        self,
        store: Any,
        *,
        folder: Path | str | None = None,
        checkpoint_every: int = 250_000,
        log_every: int = 50,
        windows: Sequence[int] = (),
        loggers: Iterable[str | Logger] = (),
        progress: bool = True,
        on_log: Callable[[Any, StepOutput], None] | None = None,
    ) -> list[Row]:
        """Train on shuffled batches of `store` up to `n_tokens`; returns the logged metrics.

        `store` is an `ActivationStore`, of transcoders `PairedStores`, of Lorsas `SequencePairs` (a step has
        as many whole sequences as fit into `batch_size`). See `fit.train_together`, of which this is the
        case of one.
        """
        from asi_lens.sae.fit import train_together

        assert isinstance(self, Learner)  # what has this method has the others
        (history,) = train_together(
            [self],
            store,
            folders=None if folder is None else [folder],
            checkpoint_every=checkpoint_every,
            log_every=log_every,
            windows=windows,
            loggers=loggers,
            progress=progress,
            on_log=on_log,
        )
        return history
