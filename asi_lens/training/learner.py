"""What everything that trains has in common: what a step says, its data, and its life as `fit` lives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from asi_lens.base.errors import AsiLensError
from asi_lens.training.config import TrainConfig
from asi_lens.training.mesh import Mesh
from asi_lens.training.metrics import Metrics


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


Batch = TypeVar("Batch", bound=Sized)
"""A batch of what a learner trains on; its length is its number of tokens."""
_Batch = TypeVar("_Batch", bound=Sized, covariant=True)


@runtime_checkable
class Data(Protocol[_Batch]):
    """What it is trained on: an `ActivationStore`, or something else with a stream of batches."""

    @property
    def n(self) -> int:
        """Tokens of one epoch."""
        ...

    @property
    def d(self) -> int:
        """Width."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Where the data come from."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with the data."""
        ...

    def batches(self, batch_size: int, *, seed: int, start: int, n_tokens: int) -> Iterator[_Batch]:
        """Batches from token `start` to `n_tokens` of the stream; their length is their number of tokens."""
        ...


Store = TypeVar("Store", bound=Data[Any])
"""What a learner trains on."""
_Store = TypeVar("_Store", bound=Data[Any], contravariant=True)


@runtime_checkable
class Learner(Protocol[_Store, Batch]):
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

    def prepare(self, store: _Store) -> None:
        """Called once before the first step. Raises OptionError for data that it cannot be trained on."""
        ...

    def stream(self, store: _Store, start: int) -> Iterator[Batch]:
        """Batches from token `start` to the last; their length is their number of tokens."""
        ...

    def dead_fraction(self, window: int) -> float:
        """Share of features silent for the last `window` tokens or more, over all ranks."""
        ...

    def step(self, batch: Batch) -> StepOutput:
        """One update. DataError and DivergedError leave everything as it was."""
        ...

    def measure(self) -> Metrics:
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
