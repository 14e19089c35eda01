"""Transcoders: their step, their start, what they cost a model, their folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from precisions import inside
from small_trainings import Stop, close, quick, stop_at

from asi_lens.activations.harvest_store import ActivationStore, harvest_stores
from asi_lens.activations.pairs import Pair, PairedStores
from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.inputs.corpora import Tokens
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.evaluate import evaluate, evaluate_transcoder
from asi_lens.sae.formats import load_folder
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.subspace import expand
from asi_lens.sae.train import Trainer
from asi_lens.sae.transcoder import Transcoder
from asi_lens.sae.transcoder_init import READERS, initialize_transcoder, linear_guess
from asi_lens.training.config import OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")

D_IN, D_OUT, D_SAE, K, R = 12, 20, 96, 4, 6


def data(n: int = 1500) -> Pair:
    """Outputs in a subspace of R directions, a noisy linear function of the inputs; both away from zero."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, D_IN, generator=draw) * torch.linspace(2, 0.5, D_IN)
    into = torch.randn(D_IN, R, generator=draw)
    out_of = torch.randn(R, D_OUT, generator=draw)
    y = (x @ into + 0.3 * torch.randn(n, R, generator=draw)).relu() @ out_of
    return Pair(x + 2, y - 1)


def stores(n: int = 1500) -> PairedStores:
    pair = data(n)
    about = {"model": "m", "corpus": "news", "layer": 3}
    sides = (("resid_pre", pair.x), ("attn_out", pair.y))
    return PairedStores(
        *(ActivationStore.from_tensor(rows, metadata={**about, "site": s}) for s, rows in sides)
    )


def make(activation: str = "topk", dtype: torch.dtype = torch.float32, seed: int = 0) -> Transcoder:
    return Transcoder(SAEConfig(D_IN, D_SAE, K, activation, seed, d_out=D_OUT), dtype=dtype)


def perturbed(activation: str) -> Transcoder:
    """One in which no parameter is trivial, float64."""
    sae, draw = make(activation, torch.float64), torch.Generator().manual_seed(4)
    sae.set_normalization(torch.ones(D_IN), 0.4)
    sae.set_output_normalization(torch.full((D_OUT,), -2.0), 0.3)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        for parameter in sae.activation.parameters() if activation in ("jumprelu", "gated") else ():
            parameter += 0.3 * torch.rand(parameter.shape, generator=draw, dtype=torch.float64)
    return sae


def test_starts_and_numbers_are_of_exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, pairs = make(), stores(200)
    begun = inside(monkeypatch, Transcoder, "encode", lambda: initialize_transcoder(sae, pairs, d_init=3))
    assert begun == inside(monkeypatch, Transcoder, "encode", lambda: evaluate_transcoder(sae, pairs))
    assert begun == {"ieee"}


# --- what it computes -------------------------------------------------------------------------------


def test_it_is_its_formula() -> None:
    sae, pair = perturbed("topk"), data(50)
    z = (pair.x.double() - sae.input_mean) * sae.input_scale @ sae.W_enc + sae.b_enc
    top = z.relu().topk(K)
    acts = torch.zeros_like(z).scatter(1, top.indices, top.values)
    expected = (acts @ sae.W_dec + sae.b_dec) / sae.output_scale + sae.output_mean
    torch.testing.assert_close(sae(pair.x), expected)
    assert sae(pair.x.view(5, 10, D_IN)).shape == (5, 10, D_OUT)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_folded_is_the_same_function_of_raw_rows(activation: str) -> None:
    sae, x = perturbed(activation), data(50).x.double()
    if activation == "batchtopk":
        sae.activation.threshold.fill_(0.5)
    w = sae.folded()
    z = x @ w["W_enc"] + w["b_enc"]
    if activation == "topk":
        top = z.relu().topk(K)
        acts = torch.zeros_like(z).scatter(1, top.indices, top.values)
    elif activation == "gated":
        acts = (z > 0) * (x @ w["W_enc"] * w["r_mag"].exp() + w["b_mag"]).relu()
    else:
        acts = z.relu() * (z > w.get("threshold", torch.zeros(())))
    torch.testing.assert_close(acts @ w["W_dec"] + w["b_dec"], sae(x))


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("aux_k", [0, 5])
def test_step_gradients_equal_autograd(activation: str, aux_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sae, pair = perturbed(activation), data(64)
    pair = Pair(pair.x.double(), pair.y.double())
    config = SparsityConfig(coefficient=0.3, bandwidth=0.3)
    trainer = Trainer(sae, quick(aux_k=aux_k, dead_window=1), config)
    trainer.ledger.n_tokens = 10
    trainer.ledger.last_fired[:60] = 10
    x = (pair.x - sae.input_mean) * sae.input_scale
    code = trainer.sparsity.picks(x.detach(), 0).code
    fired = torch.zeros(64, D_SAE, dtype=torch.float64).scatter_add(
        1, code.indices, (code.values > 0).double()
    )
    z = x @ sae.W_enc + sae.b_enc
    goal = (pair.y - sae.output_mean) * sae.output_scale
    values = (
        (z - sae.b_enc) * sae.activation.r_mag.exp() + sae.activation.b_mag if activation == "gated" else z
    )
    missed = (values * (fired > 0)) @ sae.W_dec + sae.b_dec - goal
    loss = missed.square().sum(1).mean()
    weight = 0.3 * D_OUT / K
    if activation == "relu":
        loss = loss + weight * z.relu().sum(1).mean()
    if activation == "gated":
        gates = z.relu()
        frozen = gates @ sae.W_dec.detach() + sae.b_dec.detach() - goal
        loss = loss + weight * gates.sum(1).mean() + frozen.square().sum(1).mean()
    if aux_k:
        dead, residual = torch.arange(60, D_SAE), -missed.detach()
        pre = (z if activation != "gated" else z - sae.b_enc)[:, dead].relu()
        top, places = pre.topk(aux_k, dim=1)
        aux = torch.zeros(64, D_SAE, dtype=torch.float64).scatter(1, dead[places], top) @ sae.W_dec
        error = (aux - residual).square().sum() / (residual - residual.mean(0)).square().sum()
        loss = loss + D_OUT / 32 * error
    loss.backward()
    unit = sae.W_dec.detach().clone()
    expected = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    found: list[Any] = []
    monkeypatch.setattr(trainer.optimizer, "step", lambda *args: found.append(args))
    trainer.step(pair)
    ((grads, *_),) = found
    encoder_grad, decoder_grad = grads.rows(grads.edges[0], grads.edges[-1], unit)
    close(encoder_grad, expected["W_enc"].T)
    close(grads.b_enc, expected.get("b_enc", torch.zeros(D_SAE, dtype=torch.float64)))
    close(grads.b_dec, expected["b_dec"])
    decoder = expected["W_dec"]
    close(decoder_grad, decoder - (decoder * unit).sum(1, keepdim=True) * unit)


# --- how it begins ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("method", ["random", "asi"])
def test_it_begins_where_it_was_asked_to(method: str, reader: str) -> None:
    store, sae = stores(), make()
    report = initialize_transcoder(sae, store, method, reader, R if method == "asi" else None)
    V = store.outputs.spectrum.active_subspace(R)
    inside = (sae.W_dec.double() @ V).square().sum(1)
    if method == "asi":
        assert report.leak_decoder is not None
        assert report.leak_decoder < 1e-6
        assert inside.min().item() == pytest.approx(1)
        assert report.d_init == R
    else:
        assert inside.mean().item() == pytest.approx(R / D_OUT, abs=0.1)
    if reader == "active":
        U = store.inputs.spectrum.active_subspace(report.options["d_reads"])
        outside = sae.encoder_rows.double() - sae.encoder_rows.double() @ U @ U.T
        assert report.leak_encoder == pytest.approx((outside.norm(dim=1) / report.encoder_norm).max().item())
    # The scale is the best one: the first reconstruction cannot be improved by another.
    pair = store.sample(store.n)
    goal = sae.normalize_output(pair.y) - sae.b_dec
    made = sae.normalize_output(sae(pair.x)) - sae.b_dec
    if reader == "regression":
        assert ((goal * made).sum() / made.square().sum()).item() == pytest.approx(1, abs=1e-4)
    else:
        # What is read at random has nothing to do with what is written: no norm is better than none.
        assert report.encoder_norm == pytest.approx(1)
    assert report.fvu == pytest.approx(((goal - made).square().sum() / goal.square().sum()).item(), rel=1e-4)
    assert (report.linear_fvu is None) == (reader != "regression")
    assert report.options == sae.initialization
    again = make()
    initialize_transcoder(again, store, method, reader, R if method == "asi" else None)
    assert torch.equal(again.W_enc, sae.W_enc)
    initialize_transcoder(again, store, method, reader, R if method == "asi" else None, overshoot=1.5)
    torch.testing.assert_close(again.W_enc, 1.5 * sae.W_enc)


def test_reading_what_is_written_is_the_better_start() -> None:
    store, found = stores(), {}
    for reader in READERS:
        found[reader] = initialize_transcoder(make(), store, "asi", reader, R).fvu
    assert found["regression"] < min(found["active"], found["random"]) - 0.05


def test_the_linear_guess_is_ridge_regression() -> None:
    store, sae = stores(), make(dtype=torch.float64)
    sae.set_normalization(store.inputs.mean, store.inputs.scale)
    sae.set_output_normalization(store.outputs.mean, store.outputs.scale)
    guess, fvu = linear_guess(sae, store)
    pair = data()
    x, y = sae.normalize(pair.x.double()), sae.normalize_output(pair.y.double())
    padded = torch.cat([x, math.sqrt(0.01 * len(x)) * torch.eye(D_IN, dtype=torch.float64)])
    expected = torch.linalg.lstsq(padded, torch.cat([y, torch.zeros(D_IN, D_OUT).double()])).solution.T
    torch.testing.assert_close(guess, expected, rtol=1e-6, atol=1e-8)
    assert fvu == pytest.approx(((y - x @ guess.T).square().sum() / y.square().sum()).item(), rel=1e-6)


# --- training and evaluation ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_learns_and_resumes_to_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    store = stores()

    def trainer() -> Trainer:
        sae = make()
        initialize_transcoder(sae, store, "asi", "regression", R)
        return Trainer(sae, quick(optimizer=optimizer, n_tokens=64 * 60))

    options = {"checkpoint_every": 64 * 8, "log_every": 10, "progress": False}
    whole = trainer()
    history = whole.fit(store, **options)
    with pytest.raises(Stop):
        trainer().fit(store, folder=tmp_path, on_log=stop_at(20), **options)
    resumed = trainer()
    resumed.fit(store, folder=tmp_path, **options)
    first, second = whole.state(), resumed.state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert history[-1]["fvu"] < 0.6 * history[0]["fvu"]
    found = evaluate_transcoder(whole.sae, store)
    pair = data()
    error = (whole.sae(pair.x) - pair.y).square().sum() / (pair.y - pair.y.mean(0)).square().sum()
    assert found.fvu == pytest.approx(error.item(), rel=1e-3)
    fired = whole.sae.encode_dense(pair.x) > 0
    assert found.l0 == pytest.approx(fired.double().sum(1).mean().item())
    assert found.dead_fraction == pytest.approx(1 - fired.any(0).double().mean().item())


def test_batches_are_the_same_tokens_of_both() -> None:
    store, pair = stores(), data()
    row_of = {tuple(row): i for i, row in enumerate(pair.x.tolist())}
    for batch in store.batches(64, seed=2, n_tokens=640):
        index = [row_of[tuple(row)] for row in batch.x.tolist()]
        torch.testing.assert_close(batch.y, pair.y[index])


@pytest.mark.model_facing
def test_a_perfect_one_costs_the_model_nothing(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    # The same values under two names.
    wheres = [("blocks.1.hook_resid_post", 1), ("blocks.2.hook_resid_pre", 2)]
    found = harvest_stores(tiny_llama, tiny_tokens, wheres, folder=tmp_path, progress=False)
    pairs = PairedStores(*(found[where] for where in wheres))
    d = pairs.d
    sae = Transcoder(SAEConfig(d, 2 * d, 2 * d, "relu", d_out=d))
    with torch.no_grad():
        sae.encoder_rows.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_dec.copy_(sae.encoder_rows)
    found = evaluate_transcoder(sae, pairs, model=tiny_llama, tokens=tiny_tokens, progress=False)
    assert found.fvu == pytest.approx(0, abs=1e-9)
    assert found.losses is not None
    assert found.losses.cross_entropy_delta == pytest.approx(0, abs=1e-5)
    assert abs(found.losses.cross_entropy_mean_ablated - found.losses.cross_entropy_clean) > 1e-5
    with torch.no_grad():
        sae.W_dec.zero_()
    found = evaluate_transcoder(sae, pairs, model=tiny_llama, tokens=tiny_tokens, progress=False)
    assert abs(found.losses.cross_entropy_delta) > 1e-5


@pytest.mark.model_facing
def test_it_reads_one_site_and_writes_another(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    names = [("blocks.1.hook_resid_pre", 1), ("attn_out", 1)]
    found = harvest_stores(tiny_llama, tiny_tokens, names, folder=tmp_path, progress=False)
    pairs = PairedStores(*(found[name] for name in names))
    assert pairs.metadata["reads"]["layer"] == 1
    sae = Transcoder(SAEConfig(pairs.d, 64, 4, d_out=pairs.d_out))
    initialize_transcoder(sae, pairs, "asi", "regression", "auto")
    Trainer(sae, quick()).fit(pairs, progress=False)
    numbers = evaluate_transcoder(sae, pairs, model=tiny_llama, tokens=tiny_tokens, progress=False)
    assert numbers.fvu < 1
    assert numbers.losses is not None
    assert math.isfinite(numbers.losses.cross_entropy_delta)


# --- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu", "gated"])
def test_a_folder_is_read_back_to_the_bit(activation: str, tmp_path: Path) -> None:
    sae, x = perturbed(activation), data(40).x
    sae.save(tmp_path / "a")
    # TopK from one width to another, and Gated, are in no other library.
    known = (tmp_path / "a" / "cfg.json").exists()
    assert known == (activation not in ("topk", "gated"))
    again = load_folder(tmp_path / "a")
    assert isinstance(again, Transcoder)
    assert again.config == sae.config
    assert torch.equal(again(x), sae(x))


# --- what is refused --------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    store, pair = stores(), data(30)
    with pytest.raises(OptionError, match="d_out=None"):
        Transcoder(SAEConfig(D_IN, D_SAE, K))
    with pytest.raises(OptionError, match="only a Transcoder"):
        SparseAutoencoder(SAEConfig(D_IN, D_SAE, K, d_out=D_OUT))
    with pytest.raises(OptionError, match="d_out=0"):
        SAEConfig(D_IN, D_SAE, K, d_out=0)
    trainer = Trainer(make(), quick())
    with pytest.raises(DataError, match="must be a Pair"):
        trainer.step(pair.x)
    with pytest.raises(DataError, match="n at least 1"):
        trainer.step(Pair(pair.x, pair.y[:5]))
    with pytest.raises(DataError, match="d_out=20"):
        trainer.step(Pair(pair.x, pair.x))
    with pytest.raises(DataError, match="output rows hold NaN"):
        trainer.step(Pair(pair.x, pair.y * math.nan))
    with pytest.raises(OptionError, match="PairedStores"):
        trainer.fit(store.inputs, progress=False)
    plain = Trainer(SparseAutoencoder(SAEConfig(D_IN, D_SAE, K)), quick())
    with pytest.raises(OptionError, match="for an autoencoder"):
        plain.fit(store, progress=False)
    with pytest.raises(OptionError, match="autoencoder"):
        expand(make(), torch.eye(D_IN)[:, :D_IN], torch.zeros(D_IN))
    with pytest.raises(OptionError, match=r"saes='a transcoder' .* autoencoders .*evaluate_transcoder"):
        evaluate(make(), pair.x)
    narrow = PairedStores(store.inputs, store.inputs)
    with pytest.raises(OptionError, match=r"store='of widths \(12, 12\)' .* of widths \(12, 20\)"):
        evaluate_transcoder(make(), narrow)
    with pytest.raises(OptionError, match=r"store='with outputs 12 wide' .* with outputs 20 wide"):
        initialize_transcoder(make(), narrow, "random")


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"method": "assi"}, UnknownNameError, "asi"),
        ({"reader": "regresion"}, UnknownNameError, "regression"),
        ({"method": "asi"}, OptionError, "d_init"),
        ({"method": "asi", "d_init": D_OUT + 1}, OptionError, "d_init=21"),
        ({"method": "random", "d_init": 3}, OptionError, "left out for method='random'"),
        ({"method": "random", "initial_l0": 3}, OptionError, "initial_l0=3"),
        ({"method": "random", "seed": -1}, OptionError, "seed=-1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        initialize_transcoder(make(), stores(), **options)
