"""Paired stores give the same tokens of both, and refuse stores of others."""

from __future__ import annotations

import pytest
import torch

from asi_lens.activations.pairs import Pair, PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import OptionError

N, D_IN, D_OUT = 200, 3, 5


def store(site: str, d: int, n: int = N, model: str = "m") -> ActivationStore:
    """Rows whose first entry is their number."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(d))
    rows[:, 0] = torch.arange(float(n))
    return ActivationStore.from_tensor(rows, metadata={"model": model, "site": site, "layer": 3})


@pytest.fixture
def pairs() -> PairedStores:
    return PairedStores(store("resid_pre", D_IN), store("attn_out", D_OUT))


def test_batches_samples_and_rows_are_the_same_tokens_of_both(pairs: PairedStores) -> None:
    assert (len(pairs), pairs.n, pairs.d, pairs.d_out) == (N, N, D_IN, D_OUT)
    shuffled = list(pairs.batches(64, seed=2, n_tokens=2 * N))
    for part in (*shuffled, pairs.sample(20, seed=1)):
        assert torch.equal(part.x[:, 0], part.y[:, 0])
        assert (part.x.shape[1], part.y.shape[1]) == (D_IN, D_OUT)
    assert sum(len(part) for part in shuffled) == 2 * N
    in_order = torch.cat([part.y[:, 0] for part in pairs.in_order(64)])
    assert in_order.tolist() == list(range(N))


def test_a_part_of_a_pair_is_a_pair() -> None:
    part = Pair(torch.zeros(6, D_IN), torch.ones(6, D_OUT))[1:3]
    assert len(part) == 2
    assert part.y.shape == (2, D_OUT)


def test_metadata_is_that_of_the_outputs_and_says_what_is_read(pairs: PairedStores) -> None:
    assert pairs.metadata["site"] == "attn_out"
    assert pairs.metadata["reads"] == {"site": "resid_pre", "layer": 3, "hook_name": None}


def test_the_fingerprint_follows_either(pairs: PairedStores) -> None:
    again = PairedStores(store("resid_pre", D_IN), store("attn_out", D_OUT))
    other = PairedStores(store("resid_pre", D_IN + 1), store("attn_out", D_OUT))
    assert pairs.fingerprint == again.fingerprint != other.fingerprint
    turned = PairedStores(pairs.outputs, pairs.inputs)
    assert turned.fingerprint != pairs.fingerprint


def test_stores_of_other_tokens_are_refused() -> None:
    inputs = store("resid_pre", D_IN)
    with pytest.raises(OptionError, match=r"outputs=.100 rows. .* 200 rows, as the inputs"):
        PairedStores(inputs, store("attn_out", D_OUT, n=100))
    with pytest.raises(OptionError, match="model 'another', but the inputs have model 'm'"):
        PairedStores(inputs, store("attn_out", D_OUT, model="another"))
