"""Variants side by side: each is trained once, on the same draws and batches, and its rows say what it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asi_lens.base.errors import CacheError, OptionError, UnknownNameError
from asi_lens.experiments import rank_and_loss
from asi_lens.experiments.rank_and_loss import VARIANTS, train_variants
from asi_lens.experiments.small_training import Training, TrainingConfig, Variant
from asi_lens.experiments.small_transformer import TransformerConfig
from asi_lens.inputs.corpora import Tokens
from asi_lens.training.metrics import METRICS_FILE

CONFIG = TransformerConfig(vocab=30, d_model=32, n_layers=2, n_heads=4, d_mlp=40)
OPTIONS = TrainingConfig(n_tokens=256, batch_size=64, lr=5e-3, n_points=2)


def text(sequences: int, seed: int = 0, context: int = 16, tokenizer: str = "made:1") -> Tokens:
    ids = torch.randint(30, (sequences, context), generator=torch.Generator().manual_seed(seed))
    return Tokens(ids, "made", tokenizer, context)


TRAIN, HELD_OUT = text(20), text(60, seed=9)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))


def train(variants: Any = ("baseline", "gate", "frozen W_O"), **options: Any) -> list[rank_and_loss.SmallRun]:
    given: dict[str, Any] = {"train": TRAIN, "held_out": HELD_OUT, "config": CONFIG, "training": OPTIONS}
    return train_variants(list(variants), **{**given, "device": "cpu", "progress": False, **options})


def test_rows_of_every_run_measurement_and_layer() -> None:
    runs = train(seeds=[0, 1])
    assert [(run.seed, run.variant.name) for run in runs] == [
        (seed, name) for seed in (0, 1) for name in ("baseline", "gate", "frozen W_O")
    ]
    rows = rank_and_loss.rows(runs)
    assert len(rows) == 6 * 3 * 2
    assert {row.tokens for row in rows} == {0, 128, 256}
    assert {row.n_parameters for row in rows} == {2 * (4 * 32 * 32 + 3 * 32 * 40 + 64) + 30 * 32 + 32}
    trained = {row.variant: row.n_trained for row in rows}
    assert trained["frozen W_O"] == trained["baseline"] - 2 * 32 * 32
    assert {(row.variant, row.d_mlp) for row in rows} == {("baseline", 40), ("gate", 29), ("frozen W_O", 40)}
    told = rank_and_loss.budget(runs)
    assert told.startswith("2 layers of width 32, 4 heads, 16,992 parameters, byte-pair vocabulary of 30")
    assert "256 training tokens, context 16, batches of 64, lr 0.005" in told


def test_every_run_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = train()
    rows = rank_and_loss.rows(first)
    monkeypatch.setattr(Training, "step", None)
    assert rank_and_loss.rows(train()) == rows
    # The name is not part of what was trained.
    (renamed,) = train([Variant("the same, renamed")])
    assert renamed.folder == first[0].folder
    assert {row.variant for row in renamed.rows()} == {"the same, renamed"}


def test_everything_that_matters_makes_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_and_loss, "_train", lambda run, *_: None)
    keys = [
        train([Variant("v", **changes)], **options)[0].folder.name
        for changes, options in (
            ({}, {}),
            ({"gate": True}, {}),
            ({"weight_decay": 0.2}, {}),
            ({"muon": True}, {}),
            ({"orthogonality": 0.5}, {}),
            ({"frozen": True}, {}),
            ({}, {"seeds": [1]}),
            ({}, {"train": text(21)}),
            ({}, {"held_out": text(61)}),
            ({}, {"config": replace(CONFIG, d_mlp=41)}),
            ({}, {"training": replace(OPTIONS, lr=4e-3)}),
            ({}, {"training": replace(OPTIONS, n_points=1)}),
            ({}, {"training": replace(OPTIONS, compute_dtype="bfloat16")}),
        )
    ]
    assert len(set(keys)) == len(keys)


def test_variants_of_a_seed_read_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}
    step = Training.step

    def spy(self: Training, ids: torch.Tensor) -> Any:
        seen.setdefault((self.variant.name, self.seed), []).append(ids)
        return step(self, ids)

    monkeypatch.setattr(Training, "step", spy)
    train(["baseline", "gate"], seeds=[0, 1])
    stacked = {key: torch.stack(batches) for key, batches in seen.items()}
    assert torch.equal(stacked["baseline", 0], stacked["gate", 0])
    assert not torch.equal(stacked["baseline", 0], stacked["baseline", 1])


def test_a_folder_that_lost_its_log_is_told() -> None:
    (run,) = train(["baseline"])
    (run.folder / METRICS_FILE).unlink()
    with pytest.raises(CacheError, match=r"marks a finished run, but .*metrics\.csv is missing; delete"):
        train(["baseline"])


def test_the_registry_changes_one_thing_at_a_time() -> None:
    base = VARIANTS["baseline"]
    for name, variant in VARIANTS.items():
        assert name == variant.name
        differing = [key for key, value in vars(variant).items() if value != getattr(base, key)]
        assert len(differing) == (0 if variant is base else 2), f"{name}: {differing}"


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"variants": ["gait"]}, UnknownNameError, "unknown variant 'gait'; did you mean 'gate'"),
        ({"variants": []}, OptionError, r"variants=\[\] .* one or more"),
        ({"variants": ["gate", Variant("gate")]}, OptionError, "of different names"),
        ({"seeds": []}, OptionError, r"seeds=\[\]"),
        ({"seeds": [-1]}, OptionError, "seed=-1"),
        ({"config": replace(CONFIG, vocab=29)}, OptionError, "vocab=29 .* above 29, the largest token"),
        ({"held_out": text(60, context=8)}, OptionError, "the same tokenizer and context"),
        ({"held_out": text(60, tokenizer="made:2")}, OptionError, "the same tokenizer and context"),
        ({"held_out": text(45)}, OptionError, "held_out='630 rows' .* at least 640"),
        ({"training": replace(OPTIONS, batch_size=512)}, OptionError, "n_tokens=256 .* at least"),
        ({"variants": ["gate"], "config": replace(CONFIG, d_mlp=9)}, OptionError, "the gate is paid with"),
    ],
)
def test_what_does_not_fit_is_told(options: dict[str, Any], error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        train(**options)
