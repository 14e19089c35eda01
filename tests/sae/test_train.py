"""The step against autograd, what it reports, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_trainings import D_IN, D_SAE, K, make, quick, rows, same_bits, same_gradients
from waits import Waits, accelerated

from asi_lens.activations.pairs import Pair
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.evaluate import evaluate
from asi_lens.sae.finite import power
from asi_lens.sae.initialize import initialize
from asi_lens.sae.subspace import expand
from asi_lens.sae.train import TrainConfig, Trainer
from asi_lens.training.config import OPTIMIZERS as KINDS


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
    loss = dense_step_loss(sae, x, dead, aux_k)
    output, _, expected = same_gradients(trainer, x, loss, monkeypatch)
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


@pytest.mark.parametrize(
    ("activation", "options", "search", "waited"),
    [
        ("topk", {"optimizer": "adam"}, "exact", 2),
        ("topk", {"optimizer": "sparse_adam"}, "exact", 2),
        ("topk", {"optimizer": "sparse_adam_decay", "aux_k": 5, "clip_norm": 1.0}, "exact", 3),
        ("topk", {"optimizer": "sparse_adam"}, "subspace", 2),
        ("batchtopk", {"optimizer": "adam"}, "exact", 6),
        ("relu", {"optimizer": "adam"}, "exact", 4),
        ("jumprelu", {"optimizer": "adam"}, "exact", 6),
        ("gated", {"optimizer": "adam"}, "exact", 6),
    ],
)
def test_waits_for_a_device_are_few_and_do_not_grow_with_the_dictionary(
    activation: str,
    options: dict[str, Any],
    search: str,
    waited: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Chunks of a few rows, or all in one: the same number of waits, and what a CPU computes."""
    free = activation in ("relu", "jumprelu", "gated")  # these wait for each block of the batch
    found, outputs = [], []
    for scratch in (None, 64 * D_SAE * 8, 64 * 40 * 8):
        with monkeypatch.context() as patch:
            if scratch is not None:
                accelerated(patch, scratch)
            sae = make(dtype=torch.float64, activation=activation)
            store = ActivationStore.from_tensor(rows().double())
            initialize(sae, "random", store.spectrum, sample=rows().double())
            trainer = Trainer(sae, quick(dead_window=64, **options), search=search)
            trainer.prepare(store)
            for batch in rows(64 * 5).double().split(64):
                trainer.step(batch)
            with Waits(patch) as waits:
                output = trainer.step(rows(64).double())
            found.append(waits.total)
            outputs.append((output, trainer.state()))
    assert (output.aux_loss > 0) == bool(trainer.aux_k)
    assert found[1] == waited
    assert found[2] == found[1] or free
    for output, state in outputs[1:]:
        assert output.l0 == outputs[0][0].l0
        assert output.dead_fraction == outputs[0][0].dead_fraction
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, outputs[0][1][name])


def test_batches_that_cannot_be_are_refused_and_change_nothing() -> None:
    trainer = Trainer(make(), quick())
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    broken = rows(64)
    broken[3, 3] = float("nan")
    for batch, message in [
        (torch.zeros(64, D_IN + 1), f"d_in={D_IN}"),
        (torch.zeros(0, D_IN), "at least 1"),
        (torch.zeros(()), "must be rows"),
        (Pair(rows(4), rows(4)), "the batch is Pair"),
        (broken, "1 of 64 activation rows hold NaN"),
    ]:
        with pytest.raises(DataError, match=message):
            trainer.step(batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state().items())


def test_a_dictionary_without_unit_rows_is_refused() -> None:
    """A step scales the rows to unit norm, and so would change the function of a loaded dictionary."""
    x, basis = rows(64), torch.linspace(0.5, 2, D_IN).diag()
    shaped = expand(make(), basis, torch.zeros(D_IN), basis.inverse())
    before = shaped(x)
    trainer = Trainer(shaped, TrainConfig(n_tokens=640, batch_size=64, lr=1e-9))
    with pytest.raises(DataError, match=r"rows of W_dec have norms from 0\.\d+ to 1\.\d+; training"):
        trainer.step(x)
    assert torch.equal(shaped(x), before)
    rounded = make()
    rounded.W_dec.data.mul_(1 + 5e-4)
    assert Trainer(rounded, TrainConfig(n_tokens=640, batch_size=64)).step(x).step == 1


@pytest.mark.parametrize("activation", ["batchtopk", "gated", "jumprelu", "relu"])
def test_a_target_of_all_features_is_refused(activation: str) -> None:
    """A folder of SAELens says no target; read, it has every feature."""
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, D_SAE, activation=activation))
    with pytest.raises(OptionError, match=f"k={D_SAE} is not allowed; k must be below d_sae={D_SAE}: it is"):
        Trainer(sae, TrainConfig(n_tokens=640, batch_size=64))


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    sae = make()
    sae.W_enc.data[2, 3] = value
    with pytest.raises(DataError, match="W_enc holds NaN or infinity"):
        Trainer(sae, quick()).step(rows(64))


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
    with pytest.raises(OptionError, match="bfloat16"):
        Trainer(make(dtype=torch.float64), quick(compute_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("activation", "start"), [("topk", "asi"), ("topk", "orthogonal"), ("gated", "random")]
)
def test_defaults_that_the_user_set_change_nothing(activation: str, start: str) -> None:
    """The default dtype, and (for a dictionary that is there) the default device."""
    ends, data = [], rows()
    for dtype, device in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")):
        sae = make(activation=activation) if device == "meta" else None
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                store = ActivationStore.from_tensor(data)
                sae = sae or make(activation=activation)
                d_init = 4 if start == "asi" else None
                initialize(sae, start, store.spectrum, d_init, store.sample(200))
                config = quick(optimizer="sparse_adam_decay", aux_k=3, dead_window=64, n_tokens=64 * 5)
                ends.append(Trainer(sae, config))
                ends[-1].fit(store, progress=False)
        finally:
            torch.set_default_dtype(torch.float32)
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])


def test_a_sum_of_squares_is_the_same_for_any_number_of_threads() -> None:
    x = torch.randn(4096, 576, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(power(x).item())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(x.double().square().sum().item(), rel=1e-4)


def test_autocast_of_the_caller_changes_nothing() -> None:
    ours, other = (Trainer(make(), quick()) for _ in range(2))
    for one, cast in ((ours, False), (other, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            for batch in rows().split(100):
                one.step(batch)
    assert same_bits(ours, other)


def test_a_dictionary_that_is_not_what_its_configuration_says_is_refused() -> None:
    with pytest.raises(OptionError, match=r"dtype=torch.float16 .* float32 or float64"):
        Trainer(make().half(), quick())
    pruned = make()
    pruned.b_enc = torch.nn.Parameter(pruned.b_enc.detach()[:7].clone())
    told = rf"b_enc='of shape \(7,\)' is not allowed; .* \({D_SAE},\), as the configuration says"
    with pytest.raises(OptionError, match=told):
        Trainer(pruned, quick())
    with pytest.raises(OptionError, match=told):
        evaluate(pruned, rows(), progress=False)
