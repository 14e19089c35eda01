"""Data and training of a Lorsa."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_lorsas import CONTEXT, LAYER, N_OV, K, quick, read_and_written, started
from small_trainings import Stop, same_bits, stop_at
from waits import Waits, accelerated

from asi_lens.base.errors import DataError, OptionError
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.models import load_model
from asi_lens.lorsa.data import PairBatch, SequencePairs, harvest_pairs
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.lorsa.train import LorsaTrainer
from asi_lens.sae.train import DivergedError
from asi_lens.training.checkpoint import OtherConfigurationError
from asi_lens.training.loop import train_together

pytestmark = pytest.mark.model_facing
EACH = CONTEXT - 1


def trainer(
    model: Any, pairs: SequencePairs, method: str = "asi", dtype: Any = None, **changes: Any
) -> LorsaTrainer:
    return LorsaTrainer(started(model, pairs, method, dtype=dtype or torch.float32), quick(**changes))


# --- data -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_pairs_are_what_the_layer_reads_and_writes(tiny_folder: Any, tiny_tokens: Tokens, name: str) -> None:
    model = load_model(tiny_folder(name), dtype="float32", device="cpu")
    found = harvest_pairs(model, tiny_tokens, LAYER, batch_tokens=5 * CONTEXT, progress=False)
    x, y = read_and_written(model, tiny_tokens.ids, LAYER)
    torch.testing.assert_close(found.inputs, x)
    torch.testing.assert_close(found.outputs, y)
    assert (len(found), found.context, found.d, found.n) == (12, CONTEXT, 24, 12 * EACH)
    assert found.metadata["layer"] == LAYER
    half = harvest_pairs(model, tiny_tokens, LAYER, dtype="bfloat16", progress=False)
    assert half.inputs.dtype == torch.bfloat16
    torch.testing.assert_close(half.inputs.float(), x, rtol=0.01, atol=0.01)


def test_batches_are_shuffled_sequences_and_go_on_anywhere() -> None:
    inputs = torch.arange(7.0).view(7, 1, 1).expand(7, 4, 2)
    pairs = SequencePairs(inputs, -inputs)
    assert len(next(pairs.batches(10, seed=0))) == 9  # 3 sequences of 3 positions that count
    stream = list(pairs.batches(9, seed=0, n_tokens=9 * 14))
    assert len(stream) == 14
    order = [int(x) for batch in stream for x in batch.x[:, 0, 0]]
    for epoch in range(6):
        assert sorted(order[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert order[:7] != order[7:14]
    assert all(torch.equal(batch.x, -batch.y) for batch in stream)
    later = list(pairs.batches(9, seed=0, start=9 * 5, n_tokens=9 * 14))
    assert [int(x) for batch in later for x in batch.x[:, 0, 0]] == order[15:]
    other = [int(x) for batch in pairs.batches(9, seed=1, n_tokens=9 * 14) for x in batch.x[:, 0, 0]]
    assert other != order
    there = next(pairs.batches(9, seed=0, device=torch.device("meta")))
    assert (there.x.device.type, there.y.device.type, there.x.shape) == ("meta", "meta", (3, 4, 2))
    with pytest.raises(OptionError, match=r"batch_size=2 .* at least 3"):
        next(pairs.batches(2, seed=0))
    with pytest.raises(OptionError, match="start=4"):
        next(pairs.batches(9, seed=0, start=4))


def test_pairs_that_cannot_be_are_refused() -> None:
    x = torch.zeros(3, 4, 2)
    for inputs, outputs in ((x, x[:2]), (x[0], x[0]), (x[:, :1], x[:, :1]), (x[:0], x[:0])):
        with pytest.raises(DataError, match="inputs have shape"):
            SequencePairs(inputs, outputs)
    assert len(SequencePairs(x, x)[1:]) == 2
    assert SequencePairs(x, x).fingerprint != SequencePairs(x, x + 1).fingerprint


# --- a step -----------------------------------------------------------------------------------------


def test_what_a_step_reports(tiny_llama: Any, pairs: SequencePairs) -> None:
    one = trainer(tiny_llama, pairs, dtype=torch.float64)
    x, y = pairs.inputs[:4].double(), pairs.outputs[:4].double()
    with torch.no_grad():
        error = (one.lorsa(x) - y)[:, 1:].square().sum().item()
        l0 = (one.lorsa.encode(x).values[:, 1:] > 0).double().sum(-1).mean().item()
    rows = y[:, 1:].flatten(0, 1)
    output = one.step(PairBatch(x, y))
    assert output.fvu == pytest.approx(error / (rows - rows.mean(0)).square().sum().item())
    assert output.loss == pytest.approx(error / (4 * EACH) * one.lorsa.output_scale.item() ** 2)
    assert (output.step, output.tokens) == (1, 4 * EACH)
    assert output.l0 == pytest.approx(l0)
    assert l0 <= K
    assert output.lr == pytest.approx(3e-3 / 3)
    assert output.gradient_norm is None
    assert one.step(PairBatch(x, y)).loss < output.loss
    norms = one.lorsa.W_O.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_the_first_position_is_not_in_the_loss(tiny_llama: Any, pairs: SequencePairs) -> None:
    one, other = (trainer(tiny_llama, pairs) for _ in range(2))
    y = pairs.outputs[:4].clone()
    y[:, 0] += 100
    x = pairs.inputs[:4]
    assert one.step(PairBatch(x, pairs.outputs[:4])) == other.step(PairBatch(x, y))
    assert same_bits(one, other)


def test_gradients_are_free_of_the_part_that_would_change_norms(
    tiny_llama: Any, pairs: SequencePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(tiny_llama, pairs, clip_norm=1e-3)
    W_O = one.lorsa.W_O.detach().clone()
    found: list[torch.Tensor] = []
    norms: list[float] = []

    def look(*args: Any) -> None:
        found.append(one.lorsa.W_O.grad.clone())
        norms.append(sum(p.grad.square().sum().item() for p in one.lorsa.parameters()) ** 0.5)

    monkeypatch.setattr(one.optimizer, "step", look)
    output = one.step(PairBatch(pairs.inputs[:4], pairs.outputs[:4]))
    torch.testing.assert_close((found[0] * W_O).sum(1), torch.zeros(N_OV), rtol=0, atol=1e-8)
    assert found[0].any()
    assert output.gradient_norm is not None
    assert output.gradient_norm > 1e-3
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("rectify", [True, False])
def test_a_step_waits_for_a_device_once(
    tiny_llama: Any, pairs: SequencePairs, rectify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it computes what it does on a CPU. (PyTorch's own backward pass is not looked into.)"""
    ends = []
    for on_cpu in (True, False):
        with monkeypatch.context() as patch:
            one = LorsaTrainer(started(tiny_llama, pairs, rectify=rectify), quick(clip_norm=1e-3))
            if not on_cpu:
                accelerated(patch)
            stream = one.stream(pairs, 0)
            first, batch = one.step(next(stream)), next(stream)
            with Waits(patch) as waits:
                second = one.step(batch)
        assert waits.found["tolist"] == 1
        # The gradient takes two sizes that depend on data and decoding one, where a host computes itself and
        # need not wait.
        assert waits.total == (4 if on_cpu else 1), waits.found
        ends.append((first, second, one))
    assert ends[0][:2] == ends[1][:2]
    assert same_bits(ends[0][2], ends[1][2])


def test_batches_come_to_the_lorsas_device(tiny_llama: Any, pairs: SequencePairs) -> None:
    one = started(tiny_llama, pairs)
    assert next(LorsaTrainer(one, quick()).stream(pairs, 0)).x.device.type == "cpu"
    assert next(LorsaTrainer(one.to("meta"), quick()).stream(pairs, 0)).x.device.type == "meta"


def test_the_ledger_counts_positions_but_the_first(tiny_llama: Any, pairs: SequencePairs) -> None:
    one = trainer(tiny_llama, pairs, dead_window=4 * EACH)
    with torch.no_grad():
        one.lorsa.b_V[:10] = -1e4  # never above zero
        code = one.lorsa.encode(pairs.inputs[:4])
    output = one.step(PairBatch(pairs.inputs[:4], pairs.outputs[:4]))
    fired = code.indices[:, 1:][code.values[:, 1:] > 0]
    counts = torch.bincount(fired, minlength=N_OV)
    assert torch.equal(one.ledger.counts, counts)
    assert not counts[:10].any()
    assert one.ledger.n_tokens == 4 * EACH
    assert output.dead_fraction == (counts == 0).double().mean().item() >= 10 / N_OV


def test_steps_that_cannot_be_are_refused_and_change_nothing(tiny_llama: Any, pairs: SequencePairs) -> None:
    one = trainer(tiny_llama, pairs)
    before = {name: tensor.clone() for name, tensor in one.state().items()}
    x, y = pairs.inputs[:2], pairs.outputs[:2]
    broken, endless = y.clone(), x.clone()
    broken[0, 3, 3] = float("nan")
    endless[:, 0, 0] = torch.tensor([float("inf"), float("-inf")])
    for inputs, outputs, message in [
        (x, broken, "1 of 2 sequences of outputs hold NaN"),
        (endless, y, "2 of 2 sequences of inputs hold NaN or infinity"),
        (x, y[:1], "and outputs"),
        (x[:, :1], y[:, :1], "at least 2 positions"),
        (x[..., :20], y[..., :20], r"\[batch position 24\]"),
        (x.repeat(1, 2, 1), y.repeat(1, 2, 1), f"context={CONTEXT}"),
    ]:
        with pytest.raises(DataError, match=message):
            one.step(PairBatch(inputs, outputs))
    with pytest.raises(DivergedError, match=r"step 1: .* no weight was updated"):
        one.step(PairBatch(x, y * 1e30))
    assert before.keys() == one.state().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state().items())


def test_the_rate_of_the_rows_that_read_is_their_own(tiny_llama: Any, pairs: SequencePairs) -> None:
    before = dict(started(tiny_llama, pairs).named_parameters())
    plain, slow = (trainer(tiny_llama, pairs, encoder_lr=rate) for rate in (1.0, 0.25))
    for one in (plain, slow):
        one.step(next(pairs.batches(4 * EACH, seed=0)))
    for name, start in before.items():
        moved, own = (one.lorsa.get_parameter(name) - start for one in (plain, slow))
        torch.testing.assert_close(own, moved * (0.25 if name == "W_V" else 1.0), rtol=1e-4, atol=1e-7)
        assert moved.abs().max() > 1e-6
    assert slow.describe() != plain.describe()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optimizer": "sparse_adam"}, "optimizer='sparse_adam' .* 'adam' for a Lorsa"),
        ({"aux_k": 3}, "aux_k=3 .* 0 for a Lorsa"),
        ({"kernels": "triton"}, "kernels='triton' .* 'auto' or 'plain' for a Lorsa"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype='bfloat16'"),
    ],
)
def test_a_training_that_cannot_be_is_refused(
    tiny_llama: Any, pairs: SequencePairs, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(OptionError, match=named):
        trainer(tiny_llama, pairs, **change)
    with pytest.raises(OptionError, match="call `initialize_lorsa` first"):
        LorsaTrainer(Lorsa(started(tiny_llama, pairs).config))


# --- a run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["random", "asi"])
def test_training_lowers_the_loss(tiny_llama: Any, pairs: SequencePairs, method: str) -> None:
    one = trainer(tiny_llama, pairs, method)
    before = {name: p.detach().clone() for name, p in one.lorsa.named_parameters()}
    history = one.fit(pairs, log_every=10, windows=[50], progress=False)
    assert [row["step"] for row in history] == [1, 10, 20, 30]
    assert history[-1]["tokens"] == 30 * 4 * EACH
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert {"fvu", "l0", "dead_fraction_50", f"dead_fraction_{2 * 4 * EACH}", "tokens_per_s"} <= history[
        0
    ].keys()
    for name, parameter in one.lorsa.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_run_is_that_of_its_seed(tiny_llama: Any, pairs: SequencePairs) -> None:
    runs = [trainer(tiny_llama, pairs, steps=5, seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.fit(pairs, progress=False)
    assert same_bits(runs[0], runs[1])
    assert not same_bits(runs[0], runs[2])
    # Side by side each ends as it does alone.
    together = [trainer(tiny_llama, pairs, method, steps=5) for method in ("asi", "random")]
    train_together(together, pairs, progress=False)
    assert same_bits(together[0], runs[0])


def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tiny_llama: Any, pairs: SequencePairs, tmp_path: Path
) -> None:
    whole = trainer(tiny_llama, pairs, steps=12)
    whole.fit(pairs, progress=False)
    options: dict[str, Any] = {"folder": tmp_path, "log_every": 1, "progress": False}
    begun = trainer(tiny_llama, pairs, steps=12)
    with pytest.raises(Stop):
        begun.fit(pairs, checkpoint_every=4 * EACH * 3, on_log=stop_at(7), **options)
    again = trainer(tiny_llama, pairs, steps=12)
    history = again.fit(pairs, **options)
    assert same_bits(again, whole)
    assert [row["step"] for row in history] == list(range(1, 13))
    with pytest.raises(OtherConfigurationError, match=r"initialization\.method"):
        trainer(tiny_llama, pairs, "random", steps=12).fit(pairs, folder=tmp_path, progress=False)


def test_data_that_do_not_fit_are_refused(tiny_llama: Any, pairs: SequencePairs) -> None:
    one = trainer(tiny_llama, pairs)
    long = SequencePairs(pairs.inputs.repeat(1, 2, 1), pairs.outputs.repeat(1, 2, 1))
    with pytest.raises(OptionError, match=f"of context {2 * CONTEXT}"):
        one.fit(long, progress=False)
    with pytest.raises(OptionError, match="of width 20"):
        one.fit(SequencePairs(pairs.inputs[..., :20], pairs.outputs[..., :20]), progress=False)
    with pytest.raises(OptionError, match=f"batch_size={EACH - 1}"):
        trainer(tiny_llama, pairs, batch_size=EACH - 1).fit(pairs, progress=False)


def test_a_caller_without_gradients_or_in_half_precision_trains_alike(
    tiny_llama: Any, pairs: SequencePairs
) -> None:
    ours = trainer(tiny_llama, pairs)
    ours.fit(pairs, progress=False)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        other = trainer(tiny_llama, pairs)
        with context:
            other.fit(pairs, progress=False)
        assert same_bits(ours, other)


def test_a_lorsa_of_half_precision_is_neither_trained_nor_written(
    tiny_llama: Any, pairs: SequencePairs, tmp_path: Path
) -> None:
    half = started(tiny_llama, pairs).bfloat16()
    with pytest.raises(OptionError, match=r"dtype=torch.bfloat16 .* float32 or float64"):
        LorsaTrainer(half, quick())
    with pytest.raises(OptionError, match=r"dtype=torch.bfloat16 .* float32 or float64"):
        half.save(tmp_path / "half.safetensors")
    assert not list(tmp_path.iterdir())
