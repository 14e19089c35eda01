"""Protocols of training: the output of a step, the data, and the learner that `fit` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from asi_lens.base.errors import AsiLensError
from asi_lens.training.config import TrainConfig
from asi_lens.training.mesh import Mesh
from asi_lens.training.metrics import Metrics


class DivergedError(AsiLensError, ArithmeticError):
    """A loss or gradient is not finite. The step did not update anything."""


@dataclass(frozen=True)
class StepOutput:
    """Measurements of one step, taken before its update.

    Attributes:
        step, tokens: steps and tokens so far, this step included.
        loss: mean over the batch of the squared error summed over d_in, on normalized activations.
        aux_loss: squared error of AuxK over the residual's variance; 0 if AuxK is off or no feature is dead.
        penalty: term that `sparsity` adds to the loss; 0 for TopK.
        fvu: squared error over the batch's variance (NaN for a batch without variance).
        l0: mean number of features that fired per token.
        dead_fraction: share of features that did not fire in the last `dead_window` tokens.
        lr: learning rate of the step.
        gradient_norm: norm as defined by `clip_norm`; None without clipping.
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
"""A batch of a learner's data; the length of a batch is its number of tokens."""
_Batch = TypeVar("_Batch", bound=Sized, covariant=True)


@runtime_checkable
class Data(Protocol[_Batch]):
    """Data of a learner: an `ActivationStore`, or another source with a stream of batches."""

    @property
    def n(self) -> int:
        """Number of tokens of one epoch."""
        ...

    @property
    def d(self) -> int:
        """Width of a row."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Origin of the data."""
        ...

    @property
    def fingerprint(self) -> str:
        """Text that changes with the data."""
        ...

    def batches(
        self, batch_size: int, *, seed: int, start: int, n_tokens: int, device: torch.device
    ) -> Iterator[_Batch]:
        """Yield batches from token `start` to token `n_tokens` of the stream, on a device."""
        ...


Store = TypeVar("Store", bound=Data[Any])
"""Type of a learner's data."""
_Store = TypeVar("_Store", bound=Data[Any], contravariant=True)


@runtime_checkable
class Learner(Protocol[_Store, Batch]):
    """A model in training: a `Trainer` of a dictionary, or another trainer with these methods."""

    config: TrainConfig
    mesh: Mesh

    @property
    def d_in(self) -> int:
        """Width of the data."""
        ...

    @property
    def steps(self) -> int:
        """Number of steps done."""
        ...

    @property
    def tokens(self) -> int:
        """Number of tokens seen: the position in the stream of data."""
        ...

    def prepare(self, store: _Store) -> None:
        """Prepare for `store`; called once before the first step. Raises OptionError for unsuitable data."""
        ...

    def stream(self, store: _Store, start: int) -> Iterator[Batch]:
        """Yield batches from token `start` to the last token."""
        ...

    def dead_fraction(self, window: int) -> float:
        """Return the share of features silent for the last `window` tokens or more, over all ranks."""
        ...

    def step(self, batch: Batch) -> StepOutput:
        """Do one update. If DataError or DivergedError is raised, nothing is changed."""
        ...

    def measure(self) -> Metrics:
        """Return extra columns of a logged row, beside those of a step. The columns are always the same."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return the configuration that a checkpoint must share to be continued (JSON values)."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that the rest of the run depends on."""
        ...

    def load_state(self, read: Callable[[str], Tensor]) -> None:
        """Inverse of `state`; `read` returns the tensor of a name."""
        ...
