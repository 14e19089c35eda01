"""The last firings that are kept are those of the ledger, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_trainings import make, quick, small_store

from asi_lens.base.errors import CacheError
from asi_lens.sae.train import StepOutput, Trainer
from asi_lens.training.last_firings import LastFirings, read_last_firings, read_start


def test_every_logged_row_has_the_ledgers_last_firings(tmp_path: Path) -> None:
    trainer, kept, ledgers = Trainer(make(), quick()), LastFirings(), []
    start = {"inside": torch.rand(128)}
    kept.begin(trainer, tmp_path, start)

    def log(trainer: Trainer, output: StepOutput) -> None:
        kept(trainer, output)
        ledgers.append(trainer.ledger.last_fired.clone())

    history = trainer.fit(small_store(), log_every=7, progress=False, on_log=log)
    found = read_last_firings(tmp_path, [int(row["tokens"] or 0) for row in history])
    assert torch.equal(found, torch.stack(ledgers))
    assert len(found) == 6, "the first, every seventh, and the last of 30 steps"
    assert torch.equal(found[-1], trainer.ledger.last_fired)
    assert torch.equal(read_start(tmp_path)["inside"], start["inside"])


def test_trainers_keep_to_their_own_folders(tmp_path: Path) -> None:
    kept, trainers = LastFirings(), [Trainer(make(seed), quick(n_tokens=64)) for seed in (0, 1)]
    for i, trainer in enumerate(trainers):
        kept.begin(trainer, tmp_path / str(i), {})
        trainer.fit(small_store(), progress=False, on_log=kept)
    for i, trainer in enumerate(trainers):
        assert torch.equal(read_last_firings(tmp_path / str(i), [64])[0], trainer.ledger.last_fired)


def test_rows_that_were_not_kept_are_named(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"64\.safetensors cannot be read"):
        read_last_firings(tmp_path, [64])
    with pytest.raises(CacheError, match=r"start\.safetensors cannot be read"):
        read_start(tmp_path)
