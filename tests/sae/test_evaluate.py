"""Evaluation: numbers that are right by construction, and that do not depend on batches or units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.activations.harvest_store import ActivationStore, harvest_store
from asi_lens.base.errors import DataError, OptionError, UnsupportedModelError
from asi_lens.collapse.interventions import cross_entropy, edited_cross_entropy, mean_ablate, skip_outliers
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.sae import dictionary
from asi_lens.sae import evaluate as module
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.evaluate import evaluate, evaluate_together
from asi_lens.sae.splice import SpliceLosses

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")

D = 12


def data(n: int = 500, seed: int = 0, mean: float = 3.0) -> torch.Tensor:
    """Rows of unequal variances, away from zero."""
    noise = torch.randn(n, D, generator=torch.Generator().manual_seed(seed))
    return noise * torch.linspace(0.2, 2, D) + mean


def trained_like(rows: torch.Tensor, seed: int = 0, **config: Any) -> SparseAutoencoder:
    """A dictionary with the rows' normalization, whose features fire unequally."""
    sae = SparseAutoencoder(SAEConfig(**{"d_in": D, "d_sae": 40, "k": 4, "seed": seed, **config}))
    store = ActivationStore.from_tensor(rows)
    sae.set_normalization(store.mean, store.scale)
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-5, 0.5, sae.d_sae))
    return sae


def predicting_the_mean(rows: torch.Tensor) -> SparseAutoencoder:
    sae = trained_like(rows)
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
    return sae


def perfect(d: int) -> SparseAutoencoder:
    """Every direction and its opposite: all that is in a row is in the features that fire."""
    sae = SparseAutoencoder(SAEConfig(d_in=d, d_sae=2 * d, k=2 * d))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


# --- reconstruction ---------------------------------------------------------------------------------


@given(seed=st.integers(0, 100), mean=st.sampled_from([0.0, 3.0, -1000.0]), n=st.integers(2, 300))
def test_predicting_the_mean_explains_nothing(seed: int, mean: float, n: int) -> None:
    rows = data(n, seed, mean)
    found = evaluate(predicting_the_mean(rows), rows)
    assert found.explained_variance == pytest.approx(0, abs=1e-6)
    assert (found.l0, found.dead_fraction, found.n_tokens) == (0, 1, n)


@given(seed=st.integers(0, 100), n=st.integers(2, 300))
def test_a_perfect_reconstruction_explains_everything(seed: int, n: int) -> None:
    found = evaluate(perfect(D), data(n, seed))
    assert found.fvu == pytest.approx(0, abs=1e-10)
    assert found.explained_variance == pytest.approx(1)
    assert found.l0 == D


def test_numbers_are_those_of_the_definitions() -> None:
    rows = data()
    sae = trained_like(rows)
    found = evaluate(sae, rows)
    error = (rows.double() - sae(rows).detach().double()).square().sum()
    fired = sae.encode_dense(rows) > 0
    assert found.fvu == pytest.approx((error / (rows.double() - rows.double().mean(0)).square().sum()).item())
    assert 0.05 < found.fvu < 1
    assert found.explained_variance == 1 - found.fvu
    assert found.l0 == pytest.approx(fired.sum(1).double().mean().item())
    assert found.dead_fraction == (~fired.any(0)).double().mean().item()
    assert 0 < found.dead_fraction < 1
    assert found.losses is None


@pytest.mark.parametrize("batch", [1, 13, 100])
def test_the_batch_size_does_not_matter(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    rows = data()
    sae = trained_like(rows)
    whole = evaluate(sae, rows)
    monkeypatch.setattr(module, "_ROWS", batch)
    monkeypatch.setattr(dictionary, "_BLOCK", batch)
    parts = evaluate(sae, rows)
    assert parts.fvu == pytest.approx(whole.fvu, rel=1e-6)
    assert (parts.l0, parts.dead_fraction) == (whole.l0, whole.dead_fraction)


@given(scale=st.sampled_from([1e-3, 0.37, 250.0]))
def test_the_unit_of_the_activations_does_not_matter(scale: float) -> None:
    rows = data()
    assert evaluate(trained_like(rows * scale), rows * scale).fvu == pytest.approx(
        evaluate(trained_like(rows), rows).fvu, rel=1e-4
    )


def test_a_mean_far_from_zero_does_not_matter() -> None:
    rows = data(2000, mean=0.0).double()
    near = evaluate(trained_like(rows), rows).fvu
    far = evaluate(trained_like(rows + 1e4), rows + 1e4).fvu
    assert far == pytest.approx(near, rel=0.02)


def test_several_dictionaries_at_once_are_those_alone() -> None:
    rows = data()
    saes = [trained_like(rows, seed=seed, k=k) for seed, k in ((0, 4), (1, 4), (2, 9))]
    assert evaluate_together(saes, rows) == [evaluate(sae, rows) for sae in saes]


def test_several_dictionaries_read_the_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore.from_tensor(data())
    saes = [trained_like(data(), seed=seed) for seed in range(3)]
    expected, real = [evaluate(sae, store) for sae in saes], ActivationStore.in_order
    read: list[int] = []

    def counted(self: ActivationStore, batch_size: int) -> Any:
        for block in real(self, batch_size):
            read.append(len(block))
            yield block

    monkeypatch.setattr(ActivationStore, "in_order", counted)
    assert evaluate_together(saes, store) == expected
    assert sum(read) == store.n


def test_stores_and_tensors_give_the_same() -> None:
    rows = data()
    sae = trained_like(rows)
    assert evaluate(sae, ActivationStore.from_tensor(rows)) == evaluate(sae, rows)


def test_rows_that_cannot_be_evaluated() -> None:
    rows = data()
    sae = trained_like(rows)
    with pytest.raises(OptionError, match=r"rows='of width 5'.* 12 wide"):
        evaluate(sae, rows[:, :5])
    with pytest.raises(DataError, match="do not vary"):
        evaluate(sae, rows[:1].expand(50, -1) / 3)
    with pytest.raises(DataError, match="NaN"):
        evaluate(sae, rows.clone().fill_(float("nan")))
    with pytest.raises(OptionError, match="at least one"):
        evaluate(sae, rows[:0])
    with pytest.raises(OptionError, match="one or more"):
        evaluate_together([], rows)


def test_a_store_of_another_site_than_the_dictionary() -> None:
    rows = data()
    sae = trained_like(rows, metadata={"site": "attn_out", "layer": 3})
    with pytest.raises(OptionError, match=r"site 'mlp_out', but the dictionary has site 'attn_out'"):
        evaluate(sae, ActivationStore.from_tensor(rows, {"site": "mlp_out", "layer": 3}))
    with pytest.raises(OptionError, match=r"layer 4, but the dictionary has layer 3"):
        evaluate(sae, ActivationStore.from_tensor(rows, {"site": "attn_out", "layer": 4}))


def test_options_that_belong_together(tiny_llama: Any) -> None:
    rows = data()
    sae = trained_like(rows)
    with pytest.raises(OptionError, match="model and tokens"):
        evaluate(sae, rows, model=tiny_llama)


# --- losses of the language model -------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tiny_llama: Any, tiny_tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("store") / "s"
    return harvest_store(
        tiny_llama, tiny_tokens, "attn_out", 1, folder=folder, dtype="float32", progress=False
    )


def small_sae(store: ActivationStore) -> SparseAutoencoder:
    metadata = {key: store.metadata[key] for key in ("site", "layer", "hook_name")}
    sae = SparseAutoencoder(SAEConfig(d_in=store.d, d_sae=48, k=3, metadata=metadata))
    sae.set_normalization(store.mean, store.scale)
    return sae


@pytest.mark.model_facing
def test_losses_are_those_of_the_interventions(
    store: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    sae = small_sae(store)
    losses = evaluate(sae, store, model=tiny_llama, tokens=tiny_tokens, progress=False).losses
    assert losses is not None
    edits = {"spliced": skip_outliers(sae), "ablated": skip_outliers(mean_ablate(store.mean))}
    direct = edited_cross_entropy(tiny_llama, tiny_tokens, "attn_out", 1, edits, progress=False)
    clean = cross_entropy(tiny_llama, tiny_tokens, progress=False)
    assert losses.cross_entropy == pytest.approx(direct["spliced"], abs=1e-6)
    assert losses.cross_entropy_clean == pytest.approx(clean, abs=1e-6)
    assert losses.cross_entropy_mean_ablated == pytest.approx(direct["ablated"], abs=1e-6)
    assert losses.cross_entropy_delta == losses.cross_entropy - losses.cross_entropy_clean
    assert losses.loss_recovered == pytest.approx(
        (direct["ablated"] - direct["spliced"]) / (direct["ablated"] - clean), rel=1e-4
    )
    assert losses.n_predictions == 12 * 31


@pytest.mark.model_facing
def test_the_error_of_the_loss_is_over_sequences(
    store: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    sae = small_sae(store)

    def losses(tokens: Tokens, batch_tokens: int = 64) -> SpliceLosses:
        found = evaluate(
            sae, store, model=tiny_llama, tokens=tokens, batch_tokens=batch_tokens, progress=False
        )
        assert found.losses is not None
        return found.losses

    each = [losses(tiny_tokens[k : k + 1]) for k in range(len(tiny_tokens))]
    deltas = torch.tensor([one.cross_entropy_delta for one in each], dtype=torch.float64)
    assert all(one.cross_entropy_delta_error is None for one in each)
    for batch_tokens in (32, 1024):
        whole = losses(tiny_tokens, batch_tokens)
        assert whole.cross_entropy_delta == pytest.approx(deltas.mean().item(), abs=1e-6)
        assert whole.cross_entropy_delta_error == pytest.approx(deltas.std().item() / 12**0.5, rel=1e-3)


@pytest.mark.model_facing
def test_the_divergence_is_that_of_the_whole_distributions(
    store: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    sae = small_sae(store)
    losses = evaluate(sae, store, model=tiny_llama, tokens=tiny_tokens, progress=False).losses
    assert losses is not None
    hook = models.hook_name(tiny_llama, "attn_out", 1)
    logits = [
        models.forward(tiny_llama, tiny_tokens.ids, hooks, logits=True)[:, :-1].double().log_softmax(-1)
        for hooks in ({}, {hook: skip_outliers(sae)})
    ]
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean().item()
    assert losses.kl == pytest.approx(kl, rel=1e-3)
    assert losses.kl > 1e-4


@pytest.mark.model_facing
def test_a_perfect_dictionary_costs_nothing_and_the_mean_recovers_nothing(
    store: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    mean = predicting_nothing = SparseAutoencoder(SAEConfig(d_in=store.d, d_sae=4, k=1))
    predicting_nothing.set_normalization(store.mean, store.scale)
    with torch.no_grad():
        predicting_nothing.b_enc.fill_(-1e9)
    both = evaluate_together(
        [perfect(store.d), mean],
        store,
        model=tiny_llama,
        tokens=tiny_tokens,
        where=("attn_out", 1),
        progress=False,
    )
    best, worst = both[0].losses, both[1].losses
    assert best is not None
    assert worst is not None
    assert best.cross_entropy_delta == pytest.approx(0, abs=1e-6)
    assert best.kl == pytest.approx(0, abs=1e-6)
    assert best.loss_recovered == pytest.approx(1, abs=1e-3)
    assert worst.loss_recovered == pytest.approx(0, abs=1e-3)
    assert worst.cross_entropy == pytest.approx(worst.cross_entropy_mean_ablated, abs=1e-6)


@pytest.mark.model_facing
def test_losses_do_not_depend_on_batches(
    store: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    sae = small_sae(store)
    options: dict[str, Any] = {"model": tiny_llama, "tokens": tiny_tokens, "progress": False}
    one, all_at_once = (evaluate(sae, store, batch_tokens=size, **options).losses for size in (32, 10_000))
    assert one is not None
    assert all_at_once is not None
    assert one.cross_entropy == pytest.approx(all_at_once.cross_entropy, abs=1e-6)
    assert one.kl == pytest.approx(all_at_once.kl, rel=1e-4)


@pytest.mark.model_facing
def test_the_first_position_is_never_edited(
    store: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    seen: list[torch.Tensor] = []
    sae = small_sae(store)
    real = sae.forward
    sae.forward = lambda x: seen.append(x) or real(x)  # type: ignore[method-assign]
    evaluate(sae, store, model=tiny_llama, tokens=tiny_tokens[:2], progress=False)
    assert [tuple(x.shape) for x in seen] == [(2, 31, store.d)]


@pytest.mark.model_facing
def test_where_the_site_comes_from(store: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens) -> None:
    rows = torch.cat(list(store.in_order(100)))
    named = small_sae(store)
    options: dict[str, Any] = {"model": tiny_llama, "tokens": tiny_tokens[:2], "progress": False}
    expected = evaluate(named, rows, **options).losses
    anonymous = small_sae(ActivationStore.from_tensor(rows, store.metadata))
    object.__setattr__(anonymous.config, "metadata", {})
    hooked = small_sae(store)
    object.__setattr__(hooked.config, "metadata", {"hook_name": "blocks.1.hook_attn_out"})
    assert evaluate(anonymous, store, **options).losses == expected
    assert evaluate(hooked, store, **options).losses == expected
    assert evaluate(hooked, rows, **options).losses == expected
    assert evaluate(anonymous, rows, where=("attn_out", 1), **options).losses == expected
    with pytest.raises(OptionError, match=r"are not known; give where=\(site, layer\)"):
        evaluate(anonymous, rows, **options)
    other = small_sae(store)
    object.__setattr__(other.config, "metadata", {"site": "attn_out", "layer": 2})
    with pytest.raises(OptionError, match=r"differ .*blocks.1.hook_attn_out, blocks.2.hook_attn_out"):
        evaluate_together([named, other], rows, **options)


@pytest.mark.model_facing
def test_models_and_widths_that_do_not_fit(
    store: ActivationStore, tiny_llama: Any, tiny_folder: Any, tiny_tokens: Tokens
) -> None:
    bert = models.load_model(tiny_folder("bert"), dtype="float32", device="cpu")
    rows = torch.cat(list(store.in_order(64)))  # without the name of the model that wrote them
    with pytest.raises(UnsupportedModelError, match="does not predict next tokens"):
        evaluate(small_sae(store), rows, model=bert, tokens=tiny_tokens, progress=False)
    options: dict[str, Any] = {"model": tiny_llama, "progress": False}
    with pytest.raises(OptionError, match=r"d_in=5 .* 24, the width of blocks.1.hook_attn_out"):
        evaluate(perfect(5), torch.rand(9, 5), tokens=tiny_tokens, where=("attn_out", 1), **options)
    with pytest.raises(OptionError, match="at least one sequence"):
        evaluate(small_sae(store), store, tokens=tiny_tokens[:0], **options)
