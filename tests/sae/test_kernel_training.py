"""Training by the kernels: the same bytes again, the plain path's results, and batches beyond them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_triton import DEVICE, need_kernels

need_kernels()

from small_trainings import D_IN, K, Stop, quick, rows, same_bits, small_store, stop_at
from waits import Waits

from asi_lens.base.errors import DataError
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.topk import encode_topk
from asi_lens.sae import kernel_step
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.kinds.kind import Picked
from asi_lens.sae.train import DivergedError, Trainer
from asi_lens.training.checkpoint import OtherConfigurationError
from asi_lens.training.config import OPTIMIZERS

# Small: the interpreter takes a millisecond for every operation on a row of the batch or of the weights.
BATCH, D_SAE = 4, 40
X = rows(BATCH * 20).to(DEVICE)


def trainer(kernels: str = "triton", dtype: torch.dtype = torch.float32, **changes: Any) -> Trainer:
    """A trainer of a dictionary of 40 features with biases, on batches of 4 rows."""
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K), dtype=dtype)
    sae.b_enc.data += 0.1 * torch.randn(D_SAE, generator=torch.Generator().manual_seed(3))
    options = {"batch_size": BATCH, "n_tokens": len(X), "compute_dtype": "bfloat16", "dead_window": 2 * BATCH}
    if dtype == torch.float64:
        options["compute_dtype"] = "auto"
    return Trainer(sae.to(DEVICE), quick(kernels=kernels, **{**options, **changes}))


def rounded(of: Trainer) -> None:
    """Let a float64 trainer pick by products of numbers rounded to bfloat16, as the kernels do."""

    def picks(x: torch.Tensor, step: int, workspace: Any) -> Picked:
        x, encoder = x.bfloat16().double(), of.sae.encoder_rows.bfloat16().double()
        return Picked(encode_topk(x, encoder, of.sae.b_enc.data, of.sae.k))

    of.sparsity.picks = picks  # type: ignore[method-assign]


@pytest.mark.parametrize(("optimizer", "encoder_lr"), [*((name, 1.0) for name in OPTIMIZERS), ("adam", 0.25)])
def test_steps_are_those_of_float64(optimizer: str, encoder_lr: float) -> None:
    ours = trainer(optimizer=optimizer, encoder_lr=encoder_lr)
    exact = trainer("plain", torch.float64, optimizer=optimizer, encoder_lr=encoder_lr)
    rounded(exact)
    for batch in X.split(BATCH)[:3]:
        mine, theirs = ours.step(batch), exact.step(batch.double())
        for name in ("loss", "fvu", "lr"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-4)
        for name in ("step", "tokens", "l0", "dead_fraction", "aux_loss", "penalty", "gradient_norm"):
            assert getattr(mine, name) == getattr(theirs, name)
    expected = exact.state()
    for name, tensor in ours.state().items():
        if name.startswith(("ledger", "optimizer.steps", "optimizer.updated")):
            assert torch.equal(tensor, expected[name]), name
        else:
            # A key cuts a value by 2^-21, and Adam divides small gradients by small numbers.
            torch.testing.assert_close(tensor.double(), expected[name].double(), rtol=2e-3, atol=2e-5)
    assert ours.kernels is not None
    assert ours.kernels.mended == 0


def test_the_plain_path_learns_as_much() -> None:
    found = {}
    for kernels in ("triton", "plain"):
        one = trainer(kernels, optimizer="adam")
        found[kernels] = sum(one.step(batch).fvu for batch in X.split(BATCH))
    # The plain path rounds its products to bfloat16, so a pick may be another one of nearly the same score.
    assert found["triton"] == pytest.approx(found["plain"], rel=0.01)


@pytest.mark.parametrize(("optimizer", "steps"), [("adam", 20), ("sparse_adam_decay", 6)])
def test_the_same_bytes_twice_and_after_a_stop(optimizer: str, steps: int, tmp_path: Path) -> None:
    store, half = small_store(), steps // 2
    changes: dict[str, Any] = {"optimizer": optimizer, "n_tokens": steps * BATCH}
    options: dict[str, Any] = {"progress": False, "log_every": 1, "checkpoint_every": BATCH * half}
    once, again, stopped = (trainer(**changes) for _ in range(3))
    once.fit(store, **options)
    again.fit(store, **options)
    with pytest.raises(Stop):
        stopped.fit(store, folder=tmp_path, on_log=stop_at(half + 1), **options)
    resumed = trainer(**changes)
    resumed.fit(store, folder=tmp_path, **options)
    assert once.steps == steps
    assert same_bits(once, again)
    assert same_bits(once, resumed)
    plain = trainer("plain", **changes)
    with pytest.raises(OtherConfigurationError, match=r"kernels \('triton' there, 'absent' here\)"):
        plain.fit(store, folder=tmp_path, **options)


def test_a_batch_that_overflows_is_encoded_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = trainer(), trainer("plain")
    encode = kernel_step.encode

    def wrong(*given: Any) -> Any:
        code, overflow = encode(*given)
        return SparseCode(code.indices.fill_(0), code.values.fill_(7)), overflow + 3

    monkeypatch.setattr(kernel_step, "encode", wrong)
    mine, theirs = ours.step(X[:BATCH]), plain.step(X[:BATCH])
    assert (mine.l0, mine.dead_fraction) == (theirs.l0, theirs.dead_fraction)
    assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert torch.equal(ours.ledger.counts, plain.ledger.counts)
    assert ours.kernels is not None
    assert ours.kernels.mended == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter
def test_a_batch_that_cannot_be_changes_nothing() -> None:
    ours = trainer()
    ours.step(X[:BATCH])
    before = {name: tensor.clone() for name, tensor in ours.state().items()}
    broken = X[:BATCH].clone()
    broken[3, 3] = torch.nan
    with pytest.raises(DataError, match="1 of 4 activation rows hold NaN"):
        ours.step(broken)
    with pytest.raises(DivergedError, match=r"step 2: .* no weight was updated"):
        ours.step(X[:BATCH] * 1e25)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state().items())
    ours.step(X[:BATCH])


def test_weights_that_come_after_the_trainer_are_those_that_encode() -> None:
    ours, fresh = trainer(), trainer()
    for one in (ours, fresh):
        initialize(one.sae, "orthogonal", sample=X)
    late = Trainer(fresh.sae, fresh.config)
    assert ours.step(X[:BATCH]).loss == late.step(X[:BATCH]).loss


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer()
    for _ in range(2):  # the second records a graph
        ours.step(X[:BATCH])
    with Waits(monkeypatch) as waits:
        ours.step(X[:BATCH])
    assert waits.found["tolist"] == 1
    assert waits.total == 1, waits.found


def test_the_last_batch_may_be_smaller() -> None:
    ours = trainer()
    assert ours.step(X[:3]).tokens == 3
    assert ours.step(X[:1]).tokens == 4
