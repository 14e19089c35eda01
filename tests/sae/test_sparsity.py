"""Training of every activation function: gradients by definition, l0 where it was aimed at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_trainings import D_IN, close, quick, rows, same_gradients, small_store

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.sae.dictionary import ACTIVATIONS, SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.sparsity import SparsityConfig, set_threshold
from asi_lens.sae.sparsity_kinds import KINDS
from asi_lens.sae.train import StepOutput, Trainer

D_SAE, K, WIDTH = 96, 4, 0.3


class Jump(torch.autograd.Function):
    """JumpReLU and its step, with the straight-through gradients of Rajamanoharan et al. (2024)."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, threshold: torch.Tensor, step: bool) -> torch.Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.step = step
        on = ((z > threshold) & (z > 0)).to(z)
        return on if step else z * on

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        z, threshold = ctx.saved_tensors
        kernel = ((z - threshold).abs() < WIDTH / 2).to(z)
        height = 1.0 if ctx.step else threshold
        into = None if ctx.step else grad * ((z > threshold) & (z > 0))
        return into, (-height / WIDTH * kernel * grad).sum(0), None


def make(activation: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, activation, seed), dtype=dtype)
    sae.set_normalization(torch.ones(D_IN), 0.4)
    with torch.no_grad():
        sae.b_dec += 0.1
        generator = torch.Generator().manual_seed(5)
        sae.b_enc += 0.1 * torch.randn(D_SAE, generator=generator, dtype=dtype)
        if activation == "jumprelu":
            threshold = sae.activation.threshold
            threshold += 0.6 + 0.3 * torch.rand(D_SAE, generator=generator)
        if activation == "gated":
            sae.activation.r_mag += 0.3 * torch.randn(D_SAE, generator=generator, dtype=dtype)
            sae.activation.b_mag += 0.3 * torch.randn(D_SAE, generator=generator, dtype=dtype)
    return sae


def dense_loss(sae: SparseAutoencoder, x: torch.Tensor, config: SparsityConfig) -> torch.Tensor:
    """The whole loss of a first step by its definition."""
    x_n = (x - sae.input_mean) * sae.input_scale
    z = (x_n - sae.b_dec) @ sae.W_enc + sae.b_enc
    kind = sae.config.activation
    acts = Jump.apply(z, sae.activation.threshold, False) if kind == "jumprelu" else z.relu()
    if kind == "gated":
        acts = (z > 0) * ((z - sae.b_enc) * sae.activation.r_mag.exp() + sae.activation.b_mag).relu()
    if kind == "batchtopk":
        least = acts.flatten().topk(K * len(x)).values.min().detach()
        acts = acts * (acts >= least)
    if kind == "topk":
        chosen = acts.topk(K, dim=1).indices
        acts = torch.zeros_like(acts).scatter(1, chosen, acts.gather(1, chosen))
    loss = torch.zeros((), dtype=z.dtype)
    for size in (D_SAE, *config.prefixes):
        reconstruction = acts[:, :size] @ sae.W_dec[:size] + sae.b_dec
        loss = loss + (reconstruction - x_n).square().sum(1).mean()
    target = config.initial_l0 or K
    weight = config.coefficient * D_IN
    if kind == "relu":
        loss = loss + weight / target * acts.sum(1).mean()
    if kind == "gated":
        gates = z.relu()
        loss = loss + weight / target * gates.sum(1).mean()
        missed = gates @ sae.W_dec.detach() + sae.b_dec.detach() - x_n
        loss = loss + missed.square().sum(1).mean()
    if kind == "jumprelu" and config.penalty == "tanh":
        loss = loss + weight / target * acts.tanh().sum(1).mean()
    if kind == "jumprelu" and config.penalty == "l0":
        l0 = Jump.apply(z, sae.activation.threshold, True).sum(1).mean()
        loss = loss + weight * (l0 / target - 1).square()
    return loss


CASES = [
    ("topk", {"prefixes": (10, 40)}),
    ("batchtopk", {}),
    ("batchtopk", {"prefixes": (10, 40)}),
    ("relu", {"coefficient": 0.3}),
    ("gated", {"coefficient": 0.3}),
    ("gated", {"coefficient": 0.3, "prefixes": (10, 40)}),
    ("jumprelu", {"coefficient": 0.3}),
    ("jumprelu", {"coefficient": 0.3, "initial_l0": 20.0, "prefixes": (10, 40)}),
    ("jumprelu", {"coefficient": 0.3, "penalty": "tanh"}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_step_gradients_equal_autograd(
    kind: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = make(kind), rows(64).double()
    config = SparsityConfig(bandwidth=WIDTH, **options)
    trainer = Trainer(sae, quick(), config)
    loss = dense_loss(sae, x, config)
    output, own, expected = same_gradients(trainer, x, loss, monkeypatch)
    assert set(own) == {"jumprelu": {"threshold"}, "gated": {"r_mag", "b_mag"}}.get(kind, set())
    for name, grad in own.items():
        assert expected[f"activation.{name}"].any()
        close(grad, expected[f"activation.{name}"])
    if not config.prefixes:
        assert output.loss + output.penalty == pytest.approx(loss.item())


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "relu", "gated"])
@pytest.mark.parametrize("method", ["random", "asi"])
def test_l0_reaches_its_target(kind: str, method: str) -> None:
    store = small_store()
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
    d_init = 8 if method == "asi" else None
    initialize(sae, method, store.spectrum, d_init, store.sample(500))
    options = {"bandwidth": 0.5} if kind in ("batchtopk", "jumprelu") else {"coefficient": 0.05}
    trainer = Trainer(sae, quick(n_tokens=64 * 600, lr=1e-2), SparsityConfig(**options))
    history = trainer.fit(store, progress=False, log_every=1)[-50:]
    assert sum(row["l0"] for row in history) / 50 == pytest.approx(K, rel=0.15)
    # L1 shrinks what it keeps.
    assert history[-1]["fvu"] < (0.75 if kind == "relu" else 0.5)
    # What inference does agrees with what training did.
    assert sae.encode_dense(rows()).gt(0).sum(1).double().mean().item() == pytest.approx(K, rel=0.25)


@pytest.mark.parametrize("kind", list(ACTIVATIONS))
def test_computing_in_bfloat16_changes_little(kind: str) -> None:
    store = small_store()
    fvu = {}
    for dtype in ("float32", "bfloat16"):
        sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
        initialize(sae, "random", store.spectrum, None, store.sample(400))
        fvu[dtype] = Trainer(sae, quick(compute_dtype=dtype)).fit(store, progress=False)[-1]["fvu"]
    assert fvu["bfloat16"] == pytest.approx(fvu["float32"], rel=0.05)


def test_l0_is_annealed_down() -> None:
    store = small_store()
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, "jumprelu"))
    initialize(sae, "random", store.spectrum, None, store.sample(500), initial_l0=20)
    sparsity = SparsityConfig(initial_l0=20, anneal_fraction=0.6, bandwidth=0.5)
    trainer = Trainer(sae, quick(n_tokens=64 * 600, lr=1e-2), sparsity)
    history = trainer.fit(store, progress=False, log_every=20)
    assert history[0]["l0"] == pytest.approx(20, rel=0.15)
    assert [trainer.sparsity.target(step) for step in (0, 180, 360, 599)] == [20, 12, 4, 4]
    assert history[-1]["l0"] == pytest.approx(K, rel=0.15)


def test_batchtopk_keeps_the_largest_of_the_batch() -> None:
    sae, x = make("batchtopk"), rows(50).double()
    # One row far stronger than the others holds more than its share.
    x[0] = 30 * (x[0] - 1) + 1
    trainer = Trainer(sae, quick())
    centered = sae.normalize(x) - sae.b_dec.detach()
    code = trainer.sparsity.code(centered, 0)
    dense = torch.zeros(50, D_SAE, dtype=torch.float64).scatter_add(1, code.indices, code.values)
    z = (centered @ sae.W_enc + sae.b_enc).detach().relu()
    least = z.flatten().topk(K * 50).values.min()
    torch.testing.assert_close(dense, z * (z >= least))
    assert (dense[0] > 0).sum() > 4 * K
    trainer.step(x)
    torch.testing.assert_close(sae.activation.threshold, least)


def test_matryoshka_puts_the_variance_first() -> None:
    store = small_store()
    found = []
    for prefixes in ((), (8, 24)):
        sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, "topk"))
        initialize(sae, "random", store.spectrum, None, store.sample(500))
        trainer = Trainer(sae, quick(n_tokens=64 * 300, lr=1e-2), SparsityConfig(prefixes=prefixes))
        trainer.fit(store, progress=False)
        with torch.no_grad():
            acts = sae.encode_dense(rows())
            acts[:, 24:] = 0
            inner = (acts @ sae.W_dec + sae.b_dec) / sae.input_scale + sae.input_mean
        found.append(((inner - rows()).square().sum() / (rows() - rows().mean(0)).square().sum()).item())
    assert found[1] < 0.6 * found[0]


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "relu", "gated"])
def test_a_stored_run_goes_on_to_the_same_bits(kind: str, tmp_path: Any) -> None:
    store, finals = small_store(), []
    for stop in (None, 700):
        sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
        initialize(sae, "random", store.spectrum, None, store.sample(500))
        trainer = Trainer(sae, quick(), SparsityConfig(coefficient=0.1))
        if stop:
            for batch in store.batches(64, seed=0, n_tokens=640):
                trainer.step(batch)
            state = {name: tensor.clone() for name, tensor in trainer.state().items()}
            fresh = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
            initialize(fresh, "random", store.spectrum, None, store.sample(500))
            trainer = Trainer(fresh, quick(), SparsityConfig(coefficient=0.1))
            trainer.load_state(state.__getitem__)
        for batch in store.batches(64, seed=0, start=trainer.tokens, n_tokens=64 * 30):
            trainer.step(batch)
        finals.append(trainer.state())
    assert finals[0].keys() == finals[1].keys()
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def buried(kind: str) -> tuple[Trainer, torch.Tensor, StepOutput]:
    """Five steps with AuxK of a dictionary whose features from the 50th on are far below zero: the trainer,
    the encoder rows of those before, and what the last step says."""
    store = small_store()
    sae = SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, kind))
    initialize(sae, "random", store.spectrum, None, store.sample(500))
    sae.b_enc.data[50:] = -50
    before = sae.encoder_rows[50:].clone()
    trainer = Trainer(sae, quick(aux_k=8, dead_window=64), SparsityConfig(coefficient=0.1))
    for batch in store.batches(64, n_tokens=64 * 5):
        output = trainer.step(batch)
    return trainer, before, output


@pytest.mark.parametrize("kind", ["batchtopk", "jumprelu", "relu"])
def test_aux_k_reaches_dead_features(kind: str) -> None:
    trainer, before, output = buried(kind)
    sae, store = trainer.sae, small_store()
    assert output.dead_fraction > 0.4
    # So far below zero nothing can be picked, and nothing is learned.
    assert torch.equal(sae.encoder_rows[50:], before)
    sae.b_enc.data[50:] = -0.5
    for batch in store.batches(64, n_tokens=64 * 2):
        output = trainer.step(batch)
    assert output.aux_loss > 0
    assert not torch.equal(sae.encoder_rows[50:], before)


def test_aux_k_reaches_behind_closed_gates() -> None:
    trainer, before, output = buried("gated")
    sae = trainer.sae
    assert output.aux_loss > 0
    assert not torch.equal(sae.encoder_rows[50:], before)
    # Only Adam's step for no gradient at all would leave these where they are.
    assert torch.equal(sae.b_enc[50:], torch.full_like(sae.b_enc[50:], -50))


def test_a_threshold_for_an_l0() -> None:
    x = rows()
    for kind in ("batchtopk", "jumprelu", "gated", "relu"):
        for l0 in (2, 12.5):
            sae = make(kind, torch.float32)
            if kind == "gated":
                # So large that every open gate fires.
                sae.activation.b_mag.data.fill_(100)
            set_threshold(sae, x, l0)
            assert sae.encode_dense(x).gt(0).sum(1).double().mean().item() == pytest.approx(l0, abs=0.01)
    with pytest.raises(OptionError, match="to have a threshold"):
        set_threshold(make("topk", torch.float32), x, 3)
    with pytest.raises(OptionError, match="l0=0"):
        set_threshold(make("jumprelu", torch.float32), x, 0)


def test_every_activation_can_be_trained() -> None:
    assert set(KINDS) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"coefficient": 0.0}, "coefficient=0.0"),
        ({"bandwidth": -1.0}, "bandwidth=-1.0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"penalty": "l1"}, "l1"),
        ({"anneal_fraction": 1.5}, "anneal_fraction=1.5"),
        ({"prefixes": (8, 4)}, "prefixes"),
        ({"prefixes": (8, D_SAE)}, f"below d_sae={D_SAE}"),
        ({"initial_l0": 2.0}, "annealed down to k=4"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises((OptionError, UnknownNameError), match=named):
        Trainer(make("jumprelu"), quick(), SparsityConfig(**options))
