"""Steps against autograd, whole runs, and that nothing is lost when one is stopped, killed or goes wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from asi_lens.errors import CacheError, DataError, OptionError, UnknownNameError
from asi_lens.sae import checkpoints
from asi_lens.sae.checkpoints import CHECKPOINT_FILE, FolderInUseError, OtherConfigurationError, held
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.fit import train_together
from asi_lens.sae.initialize import initialize
from asi_lens.sae.metrics import METRICS_FILE, read_metrics
from asi_lens.sae.optim import KINDS
from asi_lens.sae.sparse_ops import sum_gradients
from asi_lens.sae.train import DivergedError, StepOutput, TrainConfig, Trainer
from asi_lens.store import ActivationStore

D_IN, D_SAE, K = 16, 128, 4


def rows(n: int = 1000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(n, D_IN, generator=generator) * 0.8 ** torch.arange(D_IN) + 1


@pytest.fixture(scope="module")
def store() -> ActivationStore:
    return ActivationStore.from_tensor(rows(), metadata={"site": "attn_out", "layer": 15})


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> SparseAutoencoder:
    return SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, seed=seed), dtype=dtype)


def quick(**changes: Any) -> TrainConfig:
    defaults = {"batch_size": 64, "n_tokens": 64 * 30, "warmup_steps": 3, "dead_window": 256, "lr": 3e-3}
    return TrainConfig(**{**defaults, **changes})


def trained(store: ActivationStore, config: TrainConfig, **kwargs: Any) -> Trainer:
    trainer = Trainer(make(), config)
    trainer.fit(store, progress=False, **kwargs)
    return trainer


def same_bits(a: Trainer, b: Trainer) -> bool:
    first, second = a.state(), b.state()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


class Stop(Exception):  # noqa: N818
    pass


def stop_at(step: int) -> Any:
    def on_log(trainer: Trainer, output: StepOutput) -> None:
        if output.step == step:
            raise Stop

    return on_log


# --- the step ---------------------------------------------------------------------------------------


def dense_step_loss(
    sae: SparseAutoencoder, x: torch.Tensor, dead: torch.Tensor | None, aux_k: int
) -> torch.Tensor:
    """The whole loss by its definition, with autograd."""
    x_n = (x - sae.input_mean) * sae.input_scale
    pre = ((x_n - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    chosen = pre.topk(K, dim=1).indices
    acts = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))
    reconstruction = acts @ sae.W_dec + sae.b_dec
    loss = (reconstruction - x_n).square().sum(1).mean()
    if dead is None:
        return loss
    residual = (x_n - reconstruction).detach()
    values, places = pre[:, dead].topk(aux_k, dim=1)
    aux = torch.zeros_like(pre).scatter(1, dead[places], values) @ sae.W_dec
    normalized = (aux - residual).square().sum() / (residual - residual.mean(0)).square().sum()
    return loss + D_IN / 32 * normalized


def caught(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    def catch(*args: Any) -> Any:
        found.append(sum_gradients(*args))
        return found[-1]

    monkeypatch.setattr("asi_lens.sae.train.sum_gradients", catch)
    return found


@pytest.mark.parametrize("aux_k", [0, 7])
def test_step_gradients_equal_autograd(aux_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = make(dtype=torch.float64)
    sae.b_enc.data -= 0.5
    sae.b_dec.data += 0.1
    sae.set_normalization(torch.ones(D_IN), 0.4)
    trainer = Trainer(sae, quick(aux_k=aux_k, dead_window=1))
    trainer.ledger.n_tokens = 10
    trainer.ledger.last_fired[:100] = 10
    dead = torch.arange(100, D_SAE) if aux_k else None
    x = rows(64).double()
    dense_step_loss(sae, x, dead, aux_k).backward()
    expected = {name: p.grad.clone() for name, p in sae.named_parameters()}
    unit = sae.W_dec.detach().clone()
    found = caught(monkeypatch)
    output = trainer.step(x)
    (grads,) = found

    def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)

    same(grads.encoder(0, D_SAE), expected["W_enc"].T)
    same(grads.b_enc, expected["b_enc"])
    same(grads.b_dec, expected["b_dec"])
    decoder = expected["W_dec"]
    same(grads.decoder(0, D_SAE, unit), decoder - (decoder * unit).sum(1, keepdim=True) * unit)
    if aux_k:
        # The auxiliary loss reaches the encoder of dead features, not only their decoder rows.
        assert expected["W_enc"][:, 100:].any()
        assert output.aux_loss > 0


def test_auxiliary_firings_do_not_count_as_firings() -> None:
    sae = make()
    sae.b_enc.data[100:] = -0.3
    trainer = Trainer(sae, quick(aux_k="auto", dead_window=1))
    assert trainer.aux_k == D_IN // 2
    outputs = [trainer.step(rows(64)) for _ in range(3)]
    assert outputs[0].aux_loss == 0.0
    assert outputs[-1].aux_loss > 0
    assert trainer.ledger.dead_fraction(1) > 0


def test_what_a_step_reports() -> None:
    sae = make(dtype=torch.float64)
    initialize(sae, "random", sample=rows().double())
    x = rows(64).double()
    error = (sae(x) - x).square().sum().item()
    l0 = (sae.encode(x).values > 0).double().sum(1).mean().item()
    trainer = Trainer(sae, quick())
    output = trainer.step(x)
    assert output.fvu == pytest.approx(error / (x - x.mean(0)).square().sum().item())
    assert output.loss == pytest.approx(error / 64 * sae.input_scale.item() ** 2)
    assert (output.step, output.tokens, output.l0) == (1, 64, l0)
    assert output.lr == pytest.approx(3e-3 / 3)
    assert output.gradient_norm is None
    assert trainer.step(x).loss < output.loss


@pytest.mark.parametrize("optimizer", KINDS)
def test_all_negative_pre_activations_move_nothing_but_b_dec(optimizer: str) -> None:
    sae = make()
    sae.b_enc.data.fill_(-1e4)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    trainer = Trainer(sae, quick(optimizer=optimizer))
    output = trainer.step(rows(64))
    assert output.l0 == 0
    assert trainer.ledger.counts.sum() == 0
    changed = [name for name, p in sae.named_parameters() if not torch.allclose(p, before[name], atol=1e-7)]
    assert changed == ["b_dec"]


def test_clipping_scales_to_the_stated_norm() -> None:
    free, clipped = Trainer(make(), quick()), Trainer(make(), quick(clip_norm=1e-3))
    # Adam is blind to the scale of all gradients together, its moments are not.
    norm = clipped.step(rows(64)).gradient_norm
    free.step(rows(64))
    assert norm is not None
    assert norm > 1e-3
    ours, theirs = (t.optimizer.state()["W_enc.m"] for t in (clipped, free))
    torch.testing.assert_close(ours, theirs * (1e-3 / norm), rtol=1e-4, atol=1e-12)


def test_bfloat16_compute_keeps_float32_weights_and_learns() -> None:
    trainer = Trainer(make(), quick(compute_dtype="bfloat16"))
    fvu = [trainer.step(batch).fvu for batch in rows(1280).split(64)]
    assert fvu[-1] < fvu[0]
    assert {t.dtype for t in trainer.state().values() if t.is_floating_point()} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("optimizer", KINDS)
def test_a_gpu_does_what_the_cpu_does(optimizer: str) -> None:
    config = quick(optimizer=optimizer, aux_k=5, dead_window=128, clip_norm=1.0)
    here = Trainer(make(dtype=torch.float64), config)
    there = Trainer(make(dtype=torch.float64).to("cuda"), config)
    for batch in rows(640).split(64):
        ours, theirs = here.step(batch), there.step(batch)
        assert ours.loss == pytest.approx(theirs.loss)
    assert (ours.l0, ours.dead_fraction) == (theirs.l0, theirs.dead_fraction)
    for name, tensor in here.state().items():
        torch.testing.assert_close(there.state()[name].cpu(), tensor)


def test_batches_that_cannot_be_are_refused_and_change_nothing() -> None:
    trainer = Trainer(make(), quick())
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    broken = rows(64)
    broken[3, 3] = float("nan")
    for batch, message in [
        (torch.zeros(64, D_IN + 1), f"d_in={D_IN}"),
        (torch.zeros(0, D_IN), "at least 1"),
        (broken, "1 of 64 activation rows hold NaN"),
    ]:
        with pytest.raises(DataError, match=message):
            trainer.step(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"decay_fraction": 1.5}, "decay_fraction=1.5"),
        ({"aux_k": -1}, "aux_k=-1"),
        ({"aux_k": "half"}, "aux_k='half'"),
        ({"aux_weight": -1.0}, "aux_weight=-1.0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"dead_window": 0}, "dead_window=0"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16'"),
    ],
)
def test_a_training_that_cannot_be_is_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        TrainConfig(**change)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'adam'"):
        TrainConfig(optimizer="adamm")
    with pytest.raises(UnknownNameError, match="did you mean 'batch_size'"):
        TrainConfig.from_dict({"batchsize": 3})
    with pytest.raises(OptionError, match="'topk' to be trained"):
        Trainer(SparseAutoencoder(SAEConfig(d_in=D_IN, d_sae=D_SAE, activation="relu")))
    with pytest.raises(OptionError, match="bfloat16"):
        Trainer(make(dtype=torch.float64), quick(compute_dtype="bfloat16"))


# --- whole runs --------------------------------------------------------------------------------------


def test_fit_learns_and_logs(store: ActivationStore, tmp_path: Path) -> None:
    trainer = Trainer(make(), quick(clip_norm=10.0))
    history = trainer.fit(store, folder=tmp_path, log_every=10, windows=[128, 512], progress=False)
    assert [row["step"] for row in history] == [1, 10, 20, 30]
    assert trainer.tokens == history[-1]["tokens"] == 64 * 30
    assert history[-1]["fvu"] < history[0]["fvu"]
    assert list(history[0]) == [
        *("step", "tokens", "fvu", "l0", "loss", "aux_loss"),
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


@pytest.mark.parametrize("optimizer", KINDS)
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


CHILD = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import test_sae_train as t

    def kill(trainer, output):
        if output.step == {step}:
            os.kill(os.getpid(), signal.{signal})

    store = t.ActivationStore.from_tensor(t.rows(), metadata={{"site": "attn_out", "layer": 15}})
    trainer = t.Trainer(t.make(), t.quick(optimizer="sparse_adam_decay"))
    trainer.fit(store, folder={folder!r}, checkpoint_every=64 * 4, log_every=1, progress=False, on_log=kill)
    print("finished")
"""


def child(folder: Path, step: int, name: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(CHILD).format(
        tests=str(Path(__file__).parent), step=step, folder=str(folder), signal=name
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment
    )


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
    with checkpoints.read_checkpoint(tmp_path) as found:
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


def test_trainers_of_different_streams_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    pair = [Trainer(make(), quick()), Trainer(make(), quick(seed=1))]
    with pytest.raises(OptionError, match="different seed"):
        train_together(pair, store)
    same = [Trainer(make(), quick()), Trainer(make(), quick())]
    with pytest.raises(OptionError, match="folders"):
        train_together(same, store, folders=[tmp_path, tmp_path])
    with pytest.raises(OptionError, match="width 15"):
        train_together(same, ActivationStore.from_tensor(rows()[:, 1:]))


# --- when things go wrong ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(store: ActivationStore, tmp_path: Path) -> None:
    trainer = Trainer(make(), quick())

    def explode(trainer: Trainer, output: StepOutput) -> None:
        if output.step == 8:
            trainer.sae.W_dec.data[:] *= 1e30

    with pytest.raises(DivergedError, match="step 9"):
        trainer.fit(store, folder=tmp_path, progress=False, log_every=1, on_log=explode)
    with checkpoints.read_checkpoint(tmp_path) as found:
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
    with checkpoints.read_checkpoint(tmp_path) as found:
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
            checkpoints.write_checkpoint(path.parent, Trainer(make(), quick()).state(), {})
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


def test_loggers_are_asked_for(store: ActivationStore, tmp_path: Path) -> None:
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


def test_a_logger_that_is_not_installed_says_how_to_get_it(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OptionError, match=r"pip install 'asi_lens\[wandb\]'"):
        Trainer(make(), quick()).fit(store, loggers=["wandb"])
