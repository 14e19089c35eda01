"""The search in fewer coordinates: exact values, all picks if nothing lies outside, and when it gives up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_trainings import D_IN, K, Stop, make, quick, rows, same_bits, small_store, stop_at

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.topk import encode_topk
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.initialize import initialize
from asi_lens.sae.search import LEAST_MASS, SubspaceSearch, is_due
from asi_lens.sae.train import Trainer
from asi_lens.sae.transcoder import Transcoder
from asi_lens.sae.transcoder_init import initialize_transcoder
from asi_lens.training.mesh import Mesh, MeshConfig

D = 96  # wide enough for a search in 32 coordinates


def wide(n: int = 1200, *, decay: float = 0.85) -> ActivationStore:
    """Rows that vary by so much less in each direction than in the one before."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, D, generator=generator)
    return ActivationStore.from_tensor(x * decay ** torch.arange(D))


def begun(store: ActivationStore, method: str = "asi", d_init: int | None = 20) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(D, 1024, 3))
    initialize(sae, method, store.spectrum, d_init, store.sample(400))
    return sae


def search_of(
    store: ActivationStore, sae: SparseAutoencoder, dtype: torch.dtype = torch.float32, batch_size: int = 2048
) -> SubspaceSearch:
    return SubspaceSearch(sae, store.spectrum.active_subspace(D).float(), batch_size, dtype)


def as_sets(code: SparseCode) -> list[set[int]]:
    pairs = zip(code.indices, code.values > 0, strict=True)
    return [set(found[fires].tolist()) for found, fires in pairs]


def test_features_inside_are_all_found() -> None:
    # Encoder rows lie in 20 directions, so that 32 coordinates leave nothing out.
    store = wide()
    sae = begun(store)
    search = search_of(store, sae)
    x = sae.centered(store.sample(300))
    exact = encode_topk(x, sae.encoder_rows, sae.b_enc.data, 3)
    found = search.code(x)
    assert as_sets(found) == as_sets(exact)
    for name in ("indices", "values"):
        ours, theirs = (getattr(code, name).sort(1).values for code in (found, exact))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    search.measure(x)
    assert (search.r, search.width) == (32, 2)
    assert search.mass == pytest.approx(1)
    assert search.picks == 1


def test_values_are_exact_though_candidates_are_not() -> None:
    store = wide(decay=1)
    sae = begun(store, "random", None)
    search = search_of(store, sae, torch.bfloat16)
    sae.b_enc.data.uniform_(-0.3, 0.3)
    x = sae.centered(store.sample(200))
    found = search.code(x)
    scores = torch.relu(x @ sae.W_enc.data + sae.b_enc.data)
    torch.testing.assert_close(found.values, scores.gather(1, found.indices), rtol=1e-5, atol=1e-6)
    best = scores.topk(3, dim=1).values.sum(1)
    assert (found.values.sum(1) < best - 1e-4).any()  # some were no candidates


def test_it_widens_and_at_last_gives_up() -> None:
    flat = wide(decay=1)
    sae = begun(flat, "random", None)
    search = search_of(flat, sae)
    x = sae.centered(flat.sample(300))
    told = search.measure(x)
    assert told is not None
    assert told.startswith("search in 32 coordinates, 2 k candidates")
    assert told.endswith("exact from here on")
    assert search.is_exact
    assert search.mass == 1
    assert as_sets(search.code(x)) == as_sets(encode_topk(x, sae.encoder_rows, sae.b_enc.data, 3))
    # Where less lies in the directions left out, it stops at what is enough.
    store = wide(decay=0.95)
    sae = begun(store, "random", None)
    search = search_of(store, sae)
    first = (search.r, search.width)
    x = sae.centered(store.sample(300))
    told = search.measure(x)
    assert told is not None
    assert f"now {search.r}, {search.width} k" in told
    assert search._choices().index((search.r, search.width)) > search._choices().index(first)
    assert not search.is_exact
    assert search.mass >= LEAST_MASS


def test_it_tries_the_cheapest_first_and_nothing_that_costs_more_than_to_be_exact() -> None:
    store = wide()
    # Per row of a batch of 2,048: 1,024 features in r coordinates (1,072 r), w times 3 candidates that are
    # fetched (6,912 w), against 98,304.
    assert search_of(store, begun(store))._choices() == [(32, 2), (32, 4), (64, 2), (32, 8), (64, 4), (96, 1)]
    # In a small batch it costs more to take the features' coordinates than they save.
    assert search_of(store, begun(store), batch_size=32).is_exact


def test_it_is_measured_often_at_first() -> None:
    assert [steps for steps in range(301) if is_due(steps)] == [
        0,
        1,
        2,
        4,
        8,
        16,
        32,
        64,
        100,
        128,
        200,
        256,
        300,
    ]


def test_moved_rows_are_enough() -> None:
    store = wide()
    sae = begun(store)
    search, anew = search_of(store, sae), search_of(store, sae)
    search.refresh()
    moved = torch.tensor([3, 40, 41, 200])
    sae.encoder_rows[moved] += 0.1
    search.refresh(moved)
    anew.refresh()
    assert search._rows is not None
    assert anew._rows is not None
    torch.testing.assert_close(search._rows, anew._rows)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam"])
def test_training_with_it_is_training_where_it_finds_all(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SubspaceSearch, "_choices", lambda self: [(64, 8), (D, 1)])
    store = wide()
    config = quick(optimizer=optimizer, batch_size=256, n_tokens=256 * 130)
    exact, searched = (Trainer(begun(store), config, search=search) for search in ("exact", "subspace"))
    histories = [one.fit(store, progress=False, log_every=10) for one in (exact, searched)]
    last = [history[-1] for history in histories]
    assert last[1]["fvu"] == pytest.approx(last[0]["fvu"], rel=1e-2)
    assert last[1]["search_r"] == 64
    assert last[1]["search_mass"] == pytest.approx(1, abs=1e-5)
    assert "search_r" not in last[0]


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_run_resumes_with_its_search(tmp_path: Path) -> None:
    store, config = wide(), quick(optimizer="sparse_adam_decay", batch_size=256, n_tokens=256 * 150)

    def trainer() -> Trainer:
        return Trainer(begun(store, "random", None), config, search="subspace")

    whole, stopped, resumed = trainer(), trainer(), trainer()
    whole.fit(store, progress=False)
    options: dict[str, Any] = {"folder": tmp_path, "checkpoint_every": 256, "log_every": 1, "progress": False}
    with pytest.raises(Stop):
        stopped.fit(store, on_log=stop_at(107), **options)
    resumed.fit(store, **options)
    assert same_bits(whole, resumed)


@pytest.mark.parametrize("d_out", [D - 32, D, D + 32])
def test_a_transcoder_is_searched_along_its_inputs(d_out: int) -> None:
    inputs = wide()
    draw = torch.Generator().manual_seed(1)
    outputs = torch.randn(inputs.n, d_out, generator=draw)
    store = PairedStores(inputs, ActivationStore.from_tensor(outputs))
    sae = Transcoder(SAEConfig(D, 1024, 3, d_out=d_out))
    initialize_transcoder(sae, store, "random", "random")
    trainer = Trainer(sae, quick(n_tokens=128), search="subspace")
    trainer.fit(store, progress=False)
    assert trainer.subspace is not None
    shares = [trainer.subspace.directions[:, :32].T @ row for row in inputs.sample(100)]
    assert torch.stack(shares).square().sum() > 0.99 * inputs.sample(100).square().sum()


def test_what_it_is_not_for() -> None:
    with pytest.raises(UnknownNameError, match="search 'subspaces'"):
        Trainer(make(), quick(), search="subspaces")
    sae = SparseAutoencoder(SAEConfig(D_IN, 64, K, "batchtopk"))
    with pytest.raises(OptionError, match="'topk' on one process"):
        Trainer(sae, quick(), search="subspace")
    mesh = Mesh()
    mesh.config = MeshConfig(model=2)
    with pytest.raises(OptionError, match="'topk' on one process"):
        Trainer(make(), quick(), mesh=mesh, search="subspace")
    with pytest.raises(OptionError, match="call fit, or prepare"):
        Trainer(make(), quick(), search="subspace").step(rows(20))
    # Narrow inputs have no fewer coordinates to search in.
    trainer = Trainer(make(), quick(n_tokens=128), search="subspace")
    trainer.fit(small_store(), progress=False)
    assert trainer.subspace is not None
    assert trainer.subspace.is_exact
