"""Nothing is lost when a run is stopped or goes wrong; checkpoints and metrics are plain files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import (
    D_SAE,
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
from asi_lens.base.errors import CacheError, DataError, OptionError, UnknownNameError
from asi_lens.sae.initialize import initialize
from asi_lens.sae.train import DivergedError, StepOutput, Trainer
from asi_lens.training import checkpoint
from asi_lens.training.checkpoint import (
    CHECKPOINT_FILE,
    FolderInUseError,
    OtherConfigurationError,
    held,
    require_same,
    where_it_runs,
)
from asi_lens.training.loop import train_together
from asi_lens.training.metrics import METRICS_FILE, read_metrics


@pytest.fixture(scope="module")
def store() -> ActivationStore:
    return small_store()


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(store: ActivationStore, tmp_path: Path) -> None:
    trainer = Trainer(make(), quick())

    def explode(trainer: Trainer, output: StepOutput) -> None:
        if output.step == 8:
            trainer.sae.W_dec.data[:] *= 1e30

    with pytest.raises(DivergedError, match="step 9"):
        trainer.fit(store, folder=tmp_path, progress=False, log_every=1, on_log=explode)
    with checkpoint.read_checkpoint(tmp_path) as found:
        assert found is not None
        assert found[0]["step"] == 8
    moments = trainer.optimizer.state()
    assert all(torch.isfinite(tensor).all() for tensor in moments.values())


def test_a_bad_batch_leaves_a_checkpoint_too(store: ActivationStore, tmp_path: Path) -> None:
    class Broken(ActivationStore):
        def batches(self, *args: Any, **kwargs: Any) -> Iterator[torch.Tensor]:
            for place, batch in enumerate(super().batches(*args, **kwargs)):
                yield batch * float("nan") if place == 5 else batch

    with pytest.raises(DataError, match="64 of 64"):
        trained(Broken.from_tensor(rows()), quick(), folder=tmp_path)
    with checkpoint.read_checkpoint(tmp_path) as found:
        assert found is not None
        assert found[0]["step"] == 5


def test_a_checkpoint_of_another_configuration_names_the_fields(
    store: ActivationStore, tmp_path: Path
) -> None:
    trained(store, quick(n_tokens=640), folder=tmp_path)
    with pytest.raises(OtherConfigurationError, match=r"train\.lr \(0\.003 there, 0\.1 here\)") as error:
        trained(store, quick(n_tokens=640, lr=0.1, optimizer="sparse_adam"), folder=tmp_path)
    assert "train.optimizer" in str(error.value)
    assert "train.seed" not in str(error.value)
    other_store = ActivationStore.from_tensor(rows(900), metadata={"site": "attn_out", "layer": 3})
    with pytest.raises(
        OtherConfigurationError, match=r"store\.metadata\.layer \(15 there, 3 here\), store\.n"
    ):
        trained(other_store, quick(n_tokens=640), folder=tmp_path)
    sae = make()
    initialize(sae, "orthogonal", sample=rows())
    with pytest.raises(
        OtherConfigurationError, match=r"initialization\.method \('random' there, 'orthogonal'"
    ):
        Trainer(sae, quick(n_tokens=640)).fit(store, folder=tmp_path, progress=False)
    changed = make()
    changed.W_dec.data[:] = changed.W_dec.data.flip(0)
    with pytest.raises(OtherConfigurationError, match="began with other weights"):
        Trainer(changed, quick(n_tokens=640)).fit(store, folder=tmp_path, progress=False)


def test_two_trainers_on_one_folder(store: ActivationStore, tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(FolderInUseError, match=str(tmp_path)):
        trained(store, quick(), folder=tmp_path)
    # Another process, while this one holds the folder.
    with held(tmp_path):
        other = child(tmp_path, 0, "SIGKILL")
    assert "FolderInUseError" in other.stderr
    trained(store, quick(n_tokens=64), folder=tmp_path)


def test_on_a_full_disk_the_old_checkpoint_stays(store: ActivationStore, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    trained(store, quick(n_tokens=640), folder=tmp_path / "run")
    path = tmp_path / "run" / CHECKPOINT_FILE
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # No file may grow past half of a checkpoint.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, limits[1]))
        with pytest.raises(OSError, match=CHECKPOINT_FILE):
            checkpoint.write_checkpoint(path.parent, Trainer(make(), quick()).state(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    left = {file.name for file in path.parent.iterdir()}
    assert left == {CHECKPOINT_FILE, METRICS_FILE, ".lock"}


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"cut"])
def test_a_damaged_checkpoint_is_named(content: bytes, store: ActivationStore, tmp_path: Path) -> None:
    trained(store, quick(n_tokens=64), folder=tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    path.write_bytes(path.read_bytes()[:1000] if content == b"cut" else content)
    with pytest.raises(CacheError, match=CHECKPOINT_FILE):
        trained(store, quick(n_tokens=64), folder=tmp_path)


def test_a_checkpoint_is_plain_tensors_and_json(store: ActivationStore, tmp_path: Path) -> None:
    from safetensors import safe_open

    trainer = trained(store, quick(n_tokens=64), folder=tmp_path)
    with safe_open(tmp_path / CHECKPOINT_FILE, "pt") as file:
        about = json.loads(file.metadata()["asi_lens_checkpoint"])
        assert torch.equal(file.get_tensor("sae.W_dec"), trainer.sae.W_dec)
    assert about["run"]["sae"]["d_sae"] == D_SAE
    assert about["tokens"] == 64


# --- metrics -----------------------------------------------------------------------------------------


def test_a_row_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text("step,tokens,fvu\n1,64,0.5\n2,128,0.")
    assert read_metrics(path) == [{"step": 1, "tokens": 64, "fvu": 0.5}]
    path.write_text("step,tokens\n1,many\n")
    with pytest.raises(DataError, match=METRICS_FILE):
        read_metrics(path)


def test_loggers_are_asked_for(store: ActivationStore) -> None:
    seen: list[Any] = []
    history = Trainer(make(), quick()).fit(store, progress=False, log_every=10, loggers=[seen.append])
    assert seen == history
    with pytest.raises(UnknownNameError, match="did you mean 'tensorboard'"):
        Trainer(make(), quick()).fit(store, loggers=["tensorbord"])


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_gets_the_numbers(store: ActivationStore, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trained(store, quick(n_tokens=640), folder=tmp_path, loggers=["tensorboard"])
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_every_trainer_has_a_run_of_its_own_at_wandb(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folders = [tmp_path / "a", tmp_path / "b"]
    trainers = [Trainer(make(), quick(n_tokens=320)) for _ in folders]
    train_together(trainers, store, folders=folders, loggers=["wandb"], log_every=1, progress=False)
    Trainer(make(), quick(n_tokens=320)).fit(store, folder=folders[0] / "again", loggers=["wandb"])
    files = list(tmp_path.rglob("*.wandb"))
    assert len(files) == 3
    assert len({file.parts[-4] for file in files}) == 3


def test_a_logger_that_is_not_installed_says_how_to_get_it(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OptionError, match=r"pip install 'asi_lens\[wandb\]'"):
        Trainer(make(), quick()).fit(store, loggers=["wandb"])


def test_a_run_belongs_to_its_device(tmp_path: Path) -> None:
    assert where_it_runs(torch.device("cpu")) == {}
    here = {"lr": 1.0}
    there = {**here, "device": "cuda (Some Card)"}
    require_same(tmp_path, there, there)
    require_same(tmp_path, here, {**here, "device": "cpu"})
    for stored, now, said in (
        (here, there, r"device \('cpu' there, 'cuda \(Some Card\)' here\)"),
        (there, here, r"device \('cuda \(Some Card\)' there, 'cpu' here\)"),
        (there, {**here, "device": "cuda (Other)"}, r"'cuda \(Other\)' here"),
    ):
        with pytest.raises(OtherConfigurationError, match=said):
            require_same(tmp_path, stored, now)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_refuses_what_a_cpu_began_and_resumes_in_the_same_bits(tmp_path: Path) -> None:
    store, config = small_store(), quick(aux_k=5)
    trained(store, config, folder=tmp_path / "cpu")
    with pytest.raises(OtherConfigurationError, match="device"):
        Trainer(make().to("cuda"), config).fit(store, folder=tmp_path / "cpu", progress=False)
    whole, first, second = (Trainer(make().to("cuda"), config) for _ in range(3))
    whole.fit(store, progress=False)
    options = {"folder": tmp_path / "gpu", "progress": False, "log_every": 1, "checkpoint_every": 64 * 5}
    with pytest.raises(Stop):
        first.fit(store, on_log=stop_at(12), **options)
    second.fit(store, **options)
    assert same_bits(whole, second)


@pytest.mark.parametrize(("part", "option"), [("train", "encoder_lr"), ("initialization", "overshoot")])
def test_a_run_from_before_an_option_goes_on(part: str, option: str, tmp_path: Path) -> None:
    older: dict[str, Any] = {part: {"lr": 0.1}}
    require_same(tmp_path, older, {part: {"lr": 0.1, option: 1.0}})
    with pytest.raises(OtherConfigurationError, match=rf"{part}.{option} \(1.0 there, 0.5 here\)"):
        require_same(tmp_path, older, {part: {"lr": 0.1, option: 0.5}})
