"""Runs from a file, on one process and on several: what they leave, how they end, how they go on."""

from __future__ import annotations

import importlib.metadata
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from small_ranks import Launched, file_of
from small_trainings import rows

from asi_lens.activations.shard_writer import ShardWriter
from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.base.ranks import Ranks
from asi_lens.sae.__main__ import RunConfig, export_folder, main, run
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.training.metrics import read_metrics

STEPS, BATCH, TIMEOUT = 60, 40, 10
ROOT = Path(__file__).resolve().parents[2]
LIMIT = TIMEOUT + 15  # with the start of Python and 2 s of asking who is lost


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store on disk, of one shard: fewer than there are ranks."""
    folder, x = tmp_path_factory.mktemp("stores") / "attn_out.1", rows()
    origin = {"model": "m", "site": "attn_out", "layer": 1, "hook_name": "h"}
    writer = ShardWriter(folder, origin, n_total=len(x), d=x.shape[1], dtype="float32", shard_rows=len(x))
    writer.append(x)
    writer.finish()
    return folder


def values(store: Path, output: Path, data: int = 1, model: int = 1) -> dict[str, Any]:
    train = {"n_tokens": STEPS * BATCH, "batch_size": BATCH, "warmup_steps": 3, "dead_window": 300}
    return {
        "store": str(store),
        "sae": {"d_sae": 64, "k": 4},
        "initialize": {"d_init": 5, "sample": 500},
        "train": {**train, "lr": 3e-3, "optimizer": "sparse_adam_decay", "compute_dtype": "float32"},
        "mesh": {"data": data, "model": model},
        "fit": {"checkpoint_every": 6 * BATCH, "log_every": 1},
        "output": str(output),
        "timeout_s": TIMEOUT,
    }


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> SparseAutoencoder:
    """What one process trains without a disturbance."""
    folder = tmp_path_factory.mktemp("alone")
    assert main([str(file_of(folder, values(store, folder / "out"))), "--quiet"]) == 0
    return SparseAutoencoder.load(folder / "out" / "sae")


def weights(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in sae.state_dict().items()}


def close(a: SparseAutoencoder, b: SparseAutoencoder) -> None:
    for name, tensor in weights(a).items():
        torch.testing.assert_close(weights(b)[name], tensor, rtol=1e-4, atol=1e-4)


def same(a: SparseAutoencoder, b: SparseAutoencoder) -> bool:
    return all(torch.equal(weights(b)[name], tensor) for name, tensor in weights(a).items())


def test_a_run_leaves_the_dictionary_that_it_trained(
    store: Path, alone: SparseAutoencoder, tmp_path: Path
) -> None:
    trainer = run(RunConfig.read(file_of(tmp_path, values(store, Path("out")))), Ranks(), progress=False)
    saved = SparseAutoencoder.load(tmp_path / "out" / "sae")  # `output` is relative to the file
    assert same(saved, trainer.sae)
    assert same(saved, alone)
    assert saved.initialization["method"] == "asi"
    assert saved.config.metadata["site"] == "attn_out"
    assert len(read_metrics(tmp_path / "out" / "metrics.csv")) == STEPS


NEEDED = {"torch", "numpy", "safetensors", "jaxtyping", "einops", "filelock", "packaging", "pyyaml", "tqdm"}


def test_a_training_needs_few_packages(store: Path, alone: SparseAutoencoder, tmp_path: Path) -> None:
    """On a GPU machine often little but PyTorch is there: all other packages are made to be missing."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {canonicalize_name(Requirement(line).name) for line in lines}
    assert names > NEEDED
    tops = importlib.metadata.packages_distributions().items()
    missing = [top for top, found in tops if {canonicalize_name(one) for one in found} <= names - NEEDED]
    assert {"transformers", "xxhash", "pydantic", "PIL"} <= set(missing)
    path = file_of(tmp_path, values(store, tmp_path / "out"))
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({missing}))\n"
        f"from asi_lens.sae.__main__ import main\nraise SystemExit(main([{str(path)!r}, '--quiet']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert same(SparseAutoencoder.load(tmp_path / "out" / "sae"), alone)


def test_other_dictionaries_are_exported_too(store: Path, tmp_path: Path) -> None:
    content = values(store, tmp_path / "out")
    content["sae"]["activation"] = "batchtopk"
    trainer = run(RunConfig.read(file_of(tmp_path, content)), Ranks(), progress=False)
    assert same(SparseAutoencoder.load(tmp_path / "out" / "sae"), trainer.sae)


def test_a_run_goes_on_on_another_mesh(
    store: Path, alone: SparseAutoencoder, tmp_path: Path, launch: Any
) -> None:
    one = file_of(tmp_path, values(store, tmp_path / "out"))
    four = file_of(tmp_path, values(store, tmp_path / "out", 2, 2), "four.yaml")
    (tmp_path / "out").mkdir()
    for step, files in ((10, [four] * 4), (25, [one]), (40, [four] * 4)):
        ranks = launch(*files)
        ranks.at_step(tmp_path / "out", step)
        for process in ranks.processes:
            process.send_signal(signal.SIGTERM)
        codes, said = ranks.ended(LIMIT)
        assert set(codes) == {-signal.SIGTERM}, said
        export_folder(tmp_path / "out", tmp_path / "so far")
        assert not same(SparseAutoencoder.load(tmp_path / "so far"), alone)
        shutil.rmtree(tmp_path / "so far")
    codes, said = launch(one).ended()
    assert codes == [0], said
    close(SparseAutoencoder.load(tmp_path / "out" / "sae"), alone)
    rows = read_metrics(tmp_path / "out" / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> SparseAutoencoder:
    """What two ranks that share the features train."""
    folder = tmp_path_factory.mktemp("undisturbed")
    codes, said = Launched.with_files([file_of(folder, values(store, folder / "out", 1, 2))] * 2).finish()
    assert codes == [0, 0], said
    return SparseAutoencoder.load(folder / "out" / "sae")


@pytest.mark.parametrize("attempt", range(int(os.environ.get("ASI_LENS_KILLS", "2"))))
def test_a_killed_rank_ends_the_run_which_goes_on(
    attempt: int, store: Path, undisturbed: SparseAutoencoder, tmp_path: Path, launch: Any
) -> None:
    path = file_of(tmp_path, values(store, tmp_path / "out", 1, 2))
    chance = random.Random(attempt)
    ranks, lost = launch(path, path), attempt % 2
    (tmp_path / "out").mkdir(exist_ok=True)
    ranks.at_step(tmp_path / "out", chance.randrange(1, STEPS // 2))
    ranks.processes[lost].kill()
    started = time.monotonic()
    codes, said = ranks.ended(LIMIT)
    assert time.monotonic() - started < LIMIT
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1
    # The store of the ranks lives with rank 0 where torchrun does not hold it.
    assert f"rank {lost} died" in said or (lost == 0 and "common store is gone" in said)
    codes, said = launch(path, path).ended()
    assert codes == [0, 0], said
    assert same(SparseAutoencoder.load(tmp_path / "out" / "sae"), undisturbed)


def test_a_rank_that_hangs_is_named(store: Path, tmp_path: Path, launch: Any) -> None:
    path = file_of(tmp_path, {**values(store, tmp_path / "out", 2, 1), "timeout_s": 3})
    ranks = launch(path, path)
    (tmp_path / "out").mkdir(exist_ok=True)
    ranks.at_step(tmp_path / "out", 5)
    ranks.processes[1].send_signal(signal.SIGSTOP)
    said, _ = ranks.processes[0].communicate(timeout=LIMIT)
    assert ranks.processes[0].returncode == 1
    # In a step, or where a checkpoint begins.
    assert "rank 1 died or stands still" in said or "rank 1 did not answer within 3 s" in said


def test_torchrun_starts_again_by_itself(store: Path, undisturbed: SparseAutoencoder, tmp_path: Path) -> None:
    path = file_of(tmp_path, values(store, tmp_path / "out", 1, 2))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "asi_lens.sae", str(path), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    output = tmp_path / "out"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as torchrun:
        until = time.monotonic() + 120
        while not any((row["step"] or 0) >= 5 for row in read_metrics(output / "metrics.csv")):
            assert torchrun.poll() is None
            assert time.monotonic() < until
            time.sleep(0.002)
        workers = psutil.Process(torchrun.pid).children()
        next(one for one in workers if one.environ().get("RANK") == "1").kill()
        said, _ = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, said
    # What rank 0 says of it is not asked for here: on a busy machine torchrun ends it sooner.
    assert same(SparseAutoencoder.load(output / "sae"), undisturbed)


def test_ranks_that_do_not_belong_together_all_stop(store: Path, tmp_path: Path, launch: Any) -> None:
    first = file_of(tmp_path, values(store, tmp_path / "out", 1, 2))
    other = values(store, tmp_path / "out", 1, 2)
    other["train"]["lr"] = 1e-3
    lost = values(tmp_path / "nowhere", tmp_path / "out", 1, 2)
    for content, message in (
        (other, "the ranks have different configurations: train is"),
        (lost, "opening the store failed on rank 1: FileNotFoundError"),
    ):
        codes, said = launch(first, file_of(tmp_path, content, "other.yaml")).ended(LIMIT)
        assert codes == [1, 1]
        assert said.count(message) == 2, said
    assert not (tmp_path / "out" / "metrics.csv").exists()


def test_an_output_in_use_is_left_alone(store: Path, tmp_path: Path, launch: Any) -> None:
    from asi_lens.training.checkpoint import held

    path = file_of(tmp_path, values(store, tmp_path / "out", 2, 1))
    with held(tmp_path / "out"):
        codes, said = launch(path, path).ended(LIMIT)
    assert codes == [1, 1]
    assert said.count("the output folder failed on rank 0: FolderInUseError") == 2


def test_a_mesh_of_another_size_is_refused(store: Path, tmp_path: Path, capsys: Any) -> None:
    path = file_of(tmp_path, values(store, tmp_path / "out", 2, 2))
    assert main([str(path)]) == 1
    assert "data=2 x model=2 needs 4 processes, but there are 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stores": "x"}, UnknownNameError, "key in run.yaml 'stores'; did you mean 'store'"),
        ({"sae": {"d_sae": 64, "dsae": 3}}, UnknownNameError, "sae key 'dsae'"),
        ({"sae": {"k": 3}}, OptionError, "given with d_sae"),
        ({"train": {"lr": -1.0}}, OptionError, "lr=-1"),
        ({"train": {"lr": "8e-4"}}, OptionError, "lr='8e-4' .*YAML reads 8e-4 as text; write 0.0008"),
        ({"train": {"n_tokens": "1e6"}}, OptionError, "write .* 1_000_000"),
        ({"train": {"batch_size": True}}, OptionError, "batch_size=True .* a whole number"),
        ({"sae": {"d_sae": 64, "k": "4"}}, OptionError, "k='4' .* a whole number"),
        ({"initialize": {"tied": "no"}}, OptionError, "tied='no' .* True or False"),
        ({"initialize": {"method": 3}}, OptionError, "method=3 .* text"),
        ({"fit": {"windows": "256"}}, OptionError, "windows='256' .* a list"),
        ({"fit": {"log_every": 0.5}}, OptionError, "log_every=0.5 .* a whole number"),
        ({"train": {"learning_rate": 1}}, UnknownNameError, "train key 'learning_rate'"),
        ({"initialize": {"sample": 0}}, OptionError, "sample=0"),
        ({"initialize": {"spectrum": 0}}, UnknownNameError, "initialize key 'spectrum'"),
        ({"mesh": {"data": 0}}, OptionError, "data=0"),
        ({"mesh": [2, 2]}, OptionError, "keys and values"),
        ({"fit": {"folder": "x"}}, UnknownNameError, "fit key 'folder'"),
        ({"device": "tpu"}, OptionError, "device='tpu'"),
        ({"timeout_s": 0}, OptionError, "timeout_s=0"),
        ({"store": None}, OptionError, "no key 'store'"),
    ],
)
def test_what_a_file_may_not_hold(
    change: dict[str, Any], error: type[Exception], message: str, store: Path, tmp_path: Path
) -> None:
    content = {**values(store, tmp_path / "out"), **change}
    with pytest.raises(error, match=message):
        RunConfig.read(file_of(tmp_path, {k: v for k, v in content.items() if v is not None}))
