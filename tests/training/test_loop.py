"""Whole runs: they learn, resume to the same bits, and share a stream."""

from __future__ import annotations

import csv
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import (
    D_IN,
    Stop,
    child,
    make,
    quick,
    rows,
    same_bits,
    small_store,
    stop_at,
    trained,
)

from asi_lens.activations.harvest_store import ActivationStore
from asi_lens.activations.pairs import Pair, PairedStores
from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.sae.train import StepOutput, Trainer
from asi_lens.training import checkpoint, loop, sharded_checkpoint
from asi_lens.training.checkpoint import CHECKPOINT_FILE
from asi_lens.training.config import OPTIMIZERS
from asi_lens.training.loop import train_together
from asi_lens.training.metrics import METRICS_FILE, read_metrics


@pytest.fixture(scope="module")
def store() -> ActivationStore:
    return small_store()


def test_fit_learns_and_logs(store: ActivationStore, tmp_path: Path) -> None:
    trainer = Trainer(make(), quick(clip_norm=10.0))
    history = trainer.fit(store, folder=tmp_path, log_every=10, windows=[128, 512], progress=False)
    assert [row["step"] for row in history] == [1, 10, 20, 30]
    assert trainer.tokens == history[-1]["tokens"] == 64 * 30
    assert history[-1]["fvu"] < history[0]["fvu"]
    assert list(history[0]) == [
        *("step", "tokens", "fvu", "l0", "loss", "aux_loss", "penalty"),
        *("dead_fraction_128", "dead_fraction_256", "dead_fraction_512"),
        *("lr", "tokens_per_s", "gradient_norm"),
    ]
    assert read_metrics(tmp_path / METRICS_FILE) == history
    with (tmp_path / METRICS_FILE).open() as file:
        assert len(list(csv.reader(file))) == 5


def test_fit_takes_the_stores_normalization_unless_there_is_one(store: ActivationStore) -> None:
    trainer = trained(store, quick(n_tokens=64))
    torch.testing.assert_close(trainer.sae.input_mean.double(), store.mean, rtol=1e-6, atol=1e-7)
    assert trainer.sae.input_scale.item() == pytest.approx(store.scale)
    sae = make()
    sae.set_normalization(torch.zeros(D_IN), 0.5)
    Trainer(sae, quick(n_tokens=64)).fit(store, progress=False)
    assert sae.input_scale.item() == 0.5


def test_the_last_batch_may_be_smaller(store: ActivationStore) -> None:
    trainer = trained(store, quick(n_tokens=200))
    assert (trainer.steps, trainer.tokens, trainer.n_steps) == (4, 200, 4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("aux_k", [0, 5])
def test_a_resumed_run_ends_in_the_same_bits(
    optimizer: str, aux_k: int, store: ActivationStore, tmp_path: Path
) -> None:
    config = quick(optimizer=optimizer, aux_k=aux_k)
    whole = trained(store, config, folder=tmp_path / "whole")
    options = {"folder": tmp_path / "parts", "checkpoint_every": 64 * 7, "log_every": 1}
    with pytest.raises(Stop):
        trained(store, config, on_log=stop_at(17), **options)
    # The last checkpoint is of step 14: three steps are done again.
    resumed = Trainer(make(), config)
    history = resumed.fit(store, progress=False, **options)
    assert [row["step"] for row in history] == list(range(1, 31))
    assert same_bits(whole, resumed)
    ends = [(tmp_path / name / CHECKPOINT_FILE).read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1]


def test_checkpoints_are_written_by_time_too(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = sharded_checkpoint.write

    def count(folder: Path, tensors: Any, about: Any, mesh: Any) -> None:
        written.append(about["step"])
        write(folder, tensors, about, mesh)

    monkeypatch.setattr(sharded_checkpoint, "write", count)
    trained(store, quick(), folder=tmp_path / "fast")
    assert written == [30]
    written.clear()
    trained(store, quick(), folder=tmp_path / "tokens", checkpoint_every=64 * 12)
    assert written == [12, 24, 30]
    written.clear()
    clock = itertools.count(0, 50.0)  # read when the run begins, after each step, and after a checkpoint
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    trained(store, quick(), folder=tmp_path / "slow")
    assert written == [6, 12, 18, 24, 30]


def test_batches_come_to_the_device_of_the_weights(store: ActivationStore) -> None:
    for data in (store, PairedStores(store, store)):
        for device in ("cpu", "meta"):
            batch = next(iter(Trainer(make().to(device), quick()).stream(data, 0)))
            assert (batch.x if isinstance(batch, Pair) else batch).device.type == device


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    step = int.from_bytes(os.urandom(2)) % 20 + 6
    done = child(tmp_path / "whole", 0, "SIGKILL")
    assert done.stdout == "finished\n", done.stderr
    killed = child(tmp_path / "parts", step, "SIGKILL")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert child(tmp_path / "parts", 0, "SIGKILL").stdout == "finished\n"
    ends = [(tmp_path / name / CHECKPOINT_FILE).read_bytes() for name in ("whole", "parts")]
    assert ends[0] == ends[1], f"killed at step {step}"
    steps = [row["step"] for row in read_metrics(tmp_path / "parts" / METRICS_FILE)]
    assert steps == list(range(1, 31))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", -signal.SIGTERM), ("SIGINT", -signal.SIGINT)])
def test_a_signal_leaves_a_checkpoint_of_the_step_under_way(name: str, code: int, tmp_path: Path) -> None:
    stopped = child(tmp_path, 14, name)
    assert stopped.returncode == code, stopped.stderr
    with checkpoint.read_checkpoint(tmp_path) as found:
        assert found is not None
        assert (found[0]["step"], found[0]["tokens"]) == (14, 14 * 64)


def test_ctrl_c_then_fit_again_in_the_same_session(store: ActivationStore) -> None:
    config = quick()
    whole = trained(store, config)
    trainer = Trainer(make(), config)

    def press(trainer: Trainer, output: StepOutput) -> None:
        if output.step == 11:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(store, progress=False, log_every=1, on_log=press)
    assert trainer.steps == 11
    assert signal.getsignal(signal.SIGINT) is before
    trainer.fit(store, progress=False)
    assert same_bits(whole, trainer)


def test_a_trainer_that_is_done_is_not_fitted_again(store: ActivationStore) -> None:
    one = trained(store, quick())
    with pytest.raises(
        OptionError, match=r"n_tokens=\d+ is not allowed; .* tokens that this trainer has seen"
    ):
        one.fit(store, progress=False)


def test_a_finished_run_is_only_read(store: ActivationStore, tmp_path: Path) -> None:
    first = trained(store, quick(), folder=tmp_path)
    written = (tmp_path / CHECKPOINT_FILE).stat().st_mtime_ns
    again = Trainer(make(), quick())
    history = again.fit(store, folder=tmp_path, progress=False)
    assert same_bits(first, again)
    assert history[-1]["step"] == 30
    assert (tmp_path / CHECKPOINT_FILE).stat().st_mtime_ns == written


def test_several_on_one_stream_end_as_each_alone(store: ActivationStore, tmp_path: Path) -> None:
    kinds = ["adam", "sparse_adam"]
    alone = [trained(store, quick(optimizer=kind)) for kind in kinds]
    folders = [tmp_path / kind for kind in kinds]

    def together(**kwargs: Any) -> list[Trainer]:
        trainers = [Trainer(make(), quick(optimizer=kind)) for kind in kinds]
        train_together(trainers, store, folders=folders, progress=False, log_every=1, **kwargs)
        return trainers

    # One dies between the checkpoints of the two; the one behind catches up.
    with pytest.raises(Stop):
        together(checkpoint_every=64 * 5, on_log=stop_at(10))
    trainers = together()
    assert all(same_bits(a, b) for a, b in zip(alone, trainers, strict=True))


def test_without_a_checkpoint_of_the_end_earlier_ones_and_those_of_signals_stay(
    store: ActivationStore, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"progress": False, "checkpoint_last": False, "log_every": 1}
    whole = trained(store, quick())
    (none, some, stopped), every = [tmp_path / name for name in ("none", "some", "stopped")], 64 * 20
    train_together([Trainer(make(), quick())], store, folders=[none], **options)
    assert not (none / CHECKPOINT_FILE).exists()
    train_together([Trainer(make(), quick())], store, folders=[some], checkpoint_every=every, **options)
    with checkpoint.read_checkpoint(some) as found:
        assert found is not None
        assert found[0]["tokens"] == every

    def interrupt(trainer: Trainer, output: Any) -> None:
        if output.step == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_together([Trainer(make(), quick())], store, folders=[stopped], on_log=interrupt, **options)
    resumed = Trainer(make(), quick())
    train_together([resumed], store, folders=[stopped], **options)
    assert same_bits(resumed, whole)


def test_trainers_of_different_streams_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    pair = [Trainer(make(), quick()), Trainer(make(), quick(seed=1))]
    with pytest.raises(OptionError, match="seed differs between the trainers"):
        train_together(pair, store)
    same = [Trainer(make(), quick()), Trainer(make(), quick())]
    with pytest.raises(OptionError, match="folders"):
        train_together(same, store, folders=[tmp_path, tmp_path])
    with pytest.raises(OptionError, match="width 15"):
        train_together(same, ActivationStore.from_tensor(rows()[:, 1:]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"log_every": 0}, "log_every=0 .* at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 .* at least 1"),
        ({"windows": [256, 0]}, r"windows=\[256, 0\] .* at least 1 token each"),
        ({"loggers": ["tensorbord"]}, "unknown logger 'tensorbord'; did you mean 'tensorboard'"),
    ],
)
def test_bad_options_are_named(store: ActivationStore, options: dict[str, Any], said: str) -> None:
    with pytest.raises((OptionError, UnknownNameError), match=said):
        Trainer(make(), quick()).fit(store, **options)
    with pytest.raises(OptionError, match=r"trainers=\[\] .* one or more"):
        train_together([], store)
