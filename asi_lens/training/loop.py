"""Whole training runs: the stream of batches, progress, metrics, checkpoints, signals, resumption."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Generic, cast

from tqdm.auto import tqdm

from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, require
from asi_lens.base.threads import short_steps
from asi_lens.training import sharded_checkpoint
from asi_lens.training.checkpoint import OtherConfigurationError, held, require_same
from asi_lens.training.config import TrainConfig
from asi_lens.training.learner import Batch, DivergedError, Learner, StepOutput, Store
from asi_lens.training.ledger import DeadnessLedger
from asi_lens.training.mesh import Mesh
from asi_lens.training.metrics import Logger, Metrics, MetricsLog

CHECKPOINT_SECONDS = 300
"""Seconds after which a checkpoint is written, whatever `checkpoint_every` says."""


def train_together(
    trainers: Sequence[Learner[Store, Batch]],
    store: Store,
    *,
    folders: Sequence[Path | str] | None = None,
    checkpoint_every: int | None = None,
    checkpoint_last: bool = True,
    log_every: int = 50,
    windows: Sequence[int] = (),
    loggers: Iterable[str | Logger] = (),
    progress: bool = True,
    on_log: Callable[[Any, StepOutput], None] | None = None,
) -> list[list[Metrics]]:
    """Train dictionaries (or Lorsas) side by side on one stream of batches; returns each trainer's metrics.

    Every trainer gets the same batches as in a run alone, so it ends with the same weights. A dictionary
    without input normalization takes the store's mean and scale.

    Args:
        folders: one folder per trainer for `checkpoint.safetensors` and `metrics.csv`. A run that was
            stopped or killed continues from its folder, bit for bit. None keeps everything in memory.
        checkpoint_every: tokens between checkpoints, beside those written every 5 minutes; None for the
            latter alone. A checkpoint is also written on Ctrl-C or SIGTERM after the current step (a second
            Ctrl-C stops at once, without a checkpoint).
        checkpoint_last: write one at the end, too; False if the caller saves what was learnt.
        log_every: steps between rows of metrics (step, tokens, fvu, l0, loss, aux_loss, penalty,
            dead_fraction_<window>, lr, tokens_per_s of time spent in steps, gradient_norm, and the columns
            of the trainer's `drift`).
        windows: windows (tokens) of the dead fractions to log besides `dead_window`.
        loggers: "tensorboard", "wandb", or functions that take a row.
        on_log: called with trainer and output whenever a row is logged.

    Raises OptionError for trainers whose `batch_size`, `n_tokens` or `seed` differ, or a store of another
    width; FolderInUseError; OtherConfigurationError for a checkpoint of another run (naming the fields
    that differ); DivergedError, after a checkpoint of the last good state.
    """
    require(len(trainers) > 0, "trainers", [], "one or more")
    tokens = checkpoint_every is None or checkpoint_every >= 1
    require(tokens, "checkpoint_every", checkpoint_every, "None or at least 1")
    require(log_every >= 1, "log_every", log_every, "at least 1")
    require(all(w >= 1 for w in windows), "windows", list(windows), "of at least 1 token each")
    for key in ("batch_size", "n_tokens", "seed"):
        values = {getattr(trainer.config, key) for trainer in trainers}
        if len(values) > 1:
            raise OptionError(
                f"{key} differs between the trainers ({sorted(values)}); on one stream it must be the same"
            )
    for trainer in trainers:
        require(store.d == trainer.d_in, "store", f"of width {store.d}", f"{trainer.d_in} wide")
    paths: list[Path | None] = [None] * len(trainers)
    if folders is not None:
        paths = [Path(folder) for folder in folders]
        distinct = len({path.resolve() for path in paths if path}) == len(trainers)
        require(distinct, "folders", [str(path) for path in paths], "a different folder for each trainer")

    mesh = trainers[0].mesh
    one = mesh.config.size == 1 or all(trainer.mesh is mesh for trainer in trainers)
    require(one, "mesh", "different for some trainers", "the same for all trainers")
    loggers = list(loggers) if mesh.leads else []
    with ExitStack() as stack:

        def hold() -> None:
            for path in paths:
                if path is not None and mesh.leads:
                    stack.enter_context(held(path))

        mesh.ranks.together("the output folder", hold)
        runs = [
            _Run(trainer, store, path, windows, loggers, log_every, checkpoint_every, on_log)
            for trainer, path in zip(trainers, paths, strict=True)
        ]
        for run in runs:
            stack.callback(run.log.close)
        _loop(runs, store, progress, checkpoint_last)
    return [run.log.history for run in runs]


def _loop(runs: Sequence[_Run[Store, Batch]], store: Store, progress: bool, checkpoint_last: bool) -> None:
    config, mesh = runs[0].trainer.config, runs[0].trainer.mesh
    position = min(run.trainer.tokens for run in runs)
    with (
        short_steps(),
        Stop() as stop,
        tqdm(
            total=config.n_tokens,
            initial=position,
            unit="tok",
            unit_scale=True,
            desc="train",
            disable=not (progress and mesh.leads),
        ) as bar,
    ):
        if position < config.n_tokens:
            for batch in runs[0].trainer.stream(store, position):
                position += len(batch)
                # After a kill a trainer may be behind the others, which wait for it.
                try:
                    outputs = [run.step(batch) for run in runs if run.trainer.tokens < position]
                except (DataError, DivergedError) as error:
                    # The failed step changed nothing, so the states are the last good ones. A DataError may
                    # occur on one rank only, and a checkpoint would then wait for the other ranks.
                    if mesh.config.size == 1 or isinstance(error, DivergedError):
                        for run in runs:
                            run.checkpoint()
                    raise
                bar.update(len(batch))
                if outputs:
                    bar.set_postfix_str(_summary(outputs), refresh=False)
                # All ranks stop after the same step, also if only some received a signal.
                if mesh.any(stop.received is not None):
                    stop.received = stop.received or signal.SIGTERM
                    break
        if checkpoint_last or stop.received is not None:
            for run in runs:
                run.checkpoint()


def _summary(outputs: Sequence[StepOutput]) -> str:
    fvu = "/".join(f"{output.fvu:.3f}" for output in outputs)
    dead = "/".join(f"{100 * output.dead_fraction:.1f}" for output in outputs)
    return f"fvu {fvu}, dead {dead} %"


class _Run(Generic[Store, Batch]):
    """One trainer with its folder and its log."""

    def __init__(
        self,
        trainer: Learner[Store, Batch],
        store: Store,
        folder: Path | None,
        windows: Sequence[int],
        loggers: Sequence[str | Logger],
        log_every: int,
        checkpoint_every: int | None,
        on_log: Callable[[Any, StepOutput], None] | None,
    ):
        self.trainer = trainer
        self.folder = folder
        self.windows = sorted({trainer.config.dead_window, *windows})
        self.log_every, self.checkpoint_every, self.on_log = log_every, checkpoint_every, on_log
        self.about: dict[str, Any] = {
            **trainer.describe(),
            "store": {
                "n": store.n,
                "d": store.d,
                "fingerprint": store.fingerprint,
                "metadata": _plain(store.metadata),
            },
        }
        trainer.prepare(store)
        self.saved_at: int | None = None
        self.saved_time = time.monotonic()
        self.busy, self.busy_tokens = 0.0, 0
        columns = ["step", "tokens", "fvu", "l0", "loss", "aux_loss", "penalty"]
        columns += [f"dead_fraction_{window}" for window in self.windows]
        columns += ["lr", "tokens_per_s", "gradient_norm", *trainer.measure()]
        self.log = MetricsLog(columns, folder if trainer.mesh.leads else None, loggers)
        self._resume()

    def _resume(self) -> None:
        if self.folder is None:
            return
        with sharded_checkpoint.read(self.folder, self.trainer.mesh) as found:
            if found is not None:
                about, read = found
                require_same(self.folder, about["run"], self.about)
                # A trainer that is ahead of its checkpoint continues from its own state.
                if about["tokens"] > self.trainer.tokens:
                    try:
                        self.trainer.load_state(read)
                    except OptionError as error:
                        raise OtherConfigurationError(f"{self.folder}: {error}") from error
                if about["tokens"] == self.trainer.tokens:
                    self.saved_at = self.trainer.tokens
        self.log.resume(self.trainer.steps)

    def step(self, batch: Batch) -> StepOutput:
        """Train on one batch; log a row and write a checkpoint if due. Returns the step's output."""
        trainer = self.trainer
        before = trainer.tokens
        started = time.perf_counter()
        output = trainer.step(batch)
        self.busy += time.perf_counter() - started
        self.busy_tokens += len(batch)
        last = trainer.tokens >= trainer.config.n_tokens
        if output.step == 1 or output.step % self.log_every == 0 or last:
            self._add_row(output)
        if self._is_due(before):
            self.checkpoint()
        return output

    def _is_due(self, before: int) -> bool:
        """Return whether a checkpoint is due after a step that began at token `before`."""
        every, tokens = self.checkpoint_every, self.trainer.tokens
        if self.folder is None or (every is not None and tokens // every > before // every):
            return self.folder is not None
        # Ranks have their own clocks, but write together.
        return self.trainer.mesh.any(time.monotonic() - self.saved_time >= CHECKPOINT_SECONDS)

    def _add_row(self, output: StepOutput) -> None:
        dead = {f"dead_fraction_{w}": self.trainer.dead_fraction(w) for w in self.windows}
        speed = round(self.busy_tokens / self.busy, 1)
        found = {**vars(output), **dead, "tokens_per_s": speed, **self.trainer.measure()}
        self.log.add({column: found[column] for column in self.log.columns})
        self.busy, self.busy_tokens = 0.0, 0
        if self.on_log is not None:
            self.on_log(self.trainer, output)

    def checkpoint(self) -> None:
        """Write a checkpoint, unless this state is already written or there is no folder."""
        if self.folder is None or self.saved_at == (trainer := self.trainer).tokens:
            return
        about = {"run": self.about, "step": trainer.steps, "tokens": trainer.tokens}
        sharded_checkpoint.write(self.folder, trainer.state(), about, trainer.mesh)
        self.saved_at, self.saved_time = trainer.tokens, time.monotonic()


def _plain(metadata: Mapping[str, Any]) -> Any:
    """Return metadata as read back from JSON. Values that JSON lacks become their text."""
    return json.loads(json.dumps(dict(metadata), default=str))


class Stop:
    """Context that delays Ctrl-C and SIGTERM to the end of a step, so that no state is half updated.

    On leaving, the signal is passed on: KeyboardInterrupt, or the previous handler of SIGTERM. A second
    signal interrupts at once. Only the main thread can set handlers; in other threads nothing is changed.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        """Signal to end with, None without a signal; also set if another rank received the signal."""
        self._signals = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self._SIGNALS}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # None: a handler that was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.received is None or error is not None:
            return
        if self.received == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt


@checked
class Fits(Generic[Store, Batch]):
    """Shared methods of trainers: a whole run of one trainer."""

    config: TrainConfig
    ledger: DeadnessLedger
    mesh = Mesh()

    def stream(self, store: Store, start: int) -> Iterator[Batch]:
        """Yield batches from token `start` to `n_tokens`, copied ahead to the device of the weights."""
        run, device = self.config, self.ledger.counts.device
        return store.batches(run.batch_size, seed=run.seed, start=start, n_tokens=run.n_tokens, device=device)

    def dead_fraction(self, window: int) -> float:
        """Return the share of features (units) silent for the last `window` tokens or more, on all ranks."""
        dead, mesh = self.mesh.count(len(self.ledger.dead(window))), self.mesh
        return dead / (len(self.ledger.counts) * mesh.config.model)

    def fit(
        self,
        store: Store,
        *,
        folder: Path | str | None = None,
        checkpoint_every: int | None = None,
        log_every: int = 50,
        windows: Sequence[int] = (),
        loggers: Iterable[str | Logger] = (),
        progress: bool = True,
        on_log: Callable[[Any, StepOutput], None] | None = None,
    ) -> list[Metrics]:
        """Train on shuffled batches of `store` up to `n_tokens`; returns the logged metrics.

        `store` is an `ActivationStore`, for transcoders `PairedStores`, for Lorsas `SequencePairs` (a step
        has as many whole sequences as fit into `batch_size`). For options and errors see `train_together`,
        which `fit` calls with one trainer. Without a folder, a trainer that has seen its `n_tokens` is an
        OptionError: nothing would be trained.
        """
        learner = cast("Learner[Store, Batch]", self)  # a class with `fit` is a whole Learner
        if folder is None:
            told = (
                f"above {learner.tokens:,}, the tokens that this trainer has seen; a new trainer begins anew"
            )
            require(learner.tokens < self.config.n_tokens, "n_tokens", self.config.n_tokens, told)
        (history,) = train_together(
            [learner],
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
