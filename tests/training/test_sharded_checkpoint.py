"""Checkpoints of several ranks: what is shared out, what stays when one cannot be written, what is damaged.

That runs go on from them on any mesh is in `test_sae_run`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_trainings import D_SAE, make, quick, same_bits, small_store
from torch.distributed.checkpoint.api import CheckpointException

from asi_lens.base.errors import CacheError
from asi_lens.base.ranks import RankError
from asi_lens.sae.train import Trainer
from asi_lens.training import sharded_checkpoint
from asi_lens.training.checkpoint import CHECKPOINT_FILE
from asi_lens.training.config import OPTIMIZERS
from asi_lens.training.mesh import Mesh, MeshConfig

# Two ranks are pretended here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Pretended(Mesh):
    """A mesh of two, of which this process writes all."""

    config = MeshConfig(data=2)


def trained(steps: int = 3, optimizer: str = "adam") -> Trainer:
    trainer = Trainer(make(), quick(n_tokens=64 * 30, optimizer=optimizer))
    trainer.prepare(small_store())
    for _, batch in zip(range(steps), small_store().batches(64), strict=False):
        trainer.step(batch)
    return trainer


def about(trainer: Trainer) -> dict[str, Any]:
    return {"run": trainer.describe(), "step": trainer.steps, "tokens": trainer.tokens}


def write(folder: Path, trainer: Trainer) -> Path:
    sharded_checkpoint.write(folder, trainer.state(), about(trainer), Pretended())
    (found,) = folder.glob("checkpoint-*")
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_tensor_with_a_row_per_feature_is_shared_out(optimizer: str) -> None:
    state = trained(optimizer=optimizer).state()
    by_feature = {name for name, tensor in state.items() if tensor.ndim and tensor.shape[0] == D_SAE}
    shared_out = {name for name in state if name in sharded_checkpoint._BY_FEATURE}
    assert {name for name in shared_out if state[name].numel()} == by_feature


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_was_written_is_read(optimizer: str, tmp_path: Path) -> None:
    whole, fresh = trained(optimizer=optimizer), trained(0, optimizer)
    write(tmp_path, whole)
    with sharded_checkpoint.read(tmp_path, Mesh()) as found:
        assert found is not None
        said, read = found
        assert said["tokens"] == whole.tokens
        fresh.load_state(read)
    assert same_bits(fresh, whole)


def test_the_newest_counts_whatever_its_kind(tmp_path: Path) -> None:
    first, second, third = trained(1), trained(2), trained(3)
    write(tmp_path, first)
    sharded_checkpoint.write(tmp_path, second.state(), about(second), Mesh())
    assert not list(tmp_path.glob("checkpoint-*"))
    assert (tmp_path / CHECKPOINT_FILE).is_file()
    write(tmp_path, third)
    assert not (tmp_path / CHECKPOINT_FILE).exists()
    # A kill may leave both.
    sharded_checkpoint.write_checkpoint(tmp_path, second.state(), about(second))
    with sharded_checkpoint.read(tmp_path, Mesh()) as found:
        assert found is not None
        assert found[0]["step"] == 3
    with sharded_checkpoint.mapped_weights(tmp_path) as (said, weights):
        assert said["step"] == 3
        assert torch.equal(weights["W_dec"], third.sae.W_dec.detach())
        assert torch.equal(weights["encoder"], third.sae.encoder_rows)
        assert weights["input_scale"].shape == ()
    assert not list(tmp_path.glob(".weights*"))


def test_the_last_one_stays_when_a_rank_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = write(tmp_path, trained(1))

    def full(state: Any, **options: Any) -> None:
        error = OSError(28, "No space left on device")
        raise CheckpointException("write", {1: (error, None)})  # type: ignore[dict-item]

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(RankError, match=r"the last one stays: failed on rank 1: OSError: .*No space left"):
        write(tmp_path, trained(2))
    with sharded_checkpoint.read(tmp_path, Mesh()) as found:
        assert found is not None
        assert found[0]["step"] == 1
    assert kept.is_dir()


@pytest.mark.parametrize("damage", ["about", "format", "shard", "cut"])
def test_a_damaged_one_is_named(damage: str, tmp_path: Path) -> None:
    folder = write(tmp_path, trained())
    (shard,) = folder.glob("*.safetensors")
    if damage == "about":
        (folder / "about.json").unlink()
    elif damage == "format":
        said = json.loads((folder / "about.json").read_text())
        (folder / "about.json").write_text(json.dumps({**said, "format": 99}))
    elif damage == "shard":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CacheError, match=str(folder)), sharded_checkpoint.read(tmp_path, Mesh()):
        pass


def test_no_checkpoint(tmp_path: Path) -> None:
    with sharded_checkpoint.read(tmp_path, Mesh()) as found:
        assert found is None
    weights = sharded_checkpoint.mapped_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no checkpoint"), weights:
        pass
