"""Paired stores give the same tokens of both, and refuse stores of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import OPTIONS, PER_SEQUENCE, hooked, sinking

from asi_lens.activations.harvest_store import harvest_stores
from asi_lens.activations.moments import Moments
from asi_lens.activations.pairs import Pair, PairedStores
from asi_lens.activations.shaped import ShapedStore
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import OptionError
from asi_lens.inputs.corpora import Tokens

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")

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
    there = next(pairs.batches(64, device=torch.device("meta")))
    assert (there.x.device.type, there.y.device.type) == ("meta", "meta")
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
    with pytest.raises(OptionError, match=r"outputs=.1,000 rows. .* 200 rows, as the inputs"):
        PairedStores(inputs, store("attn_out", D_OUT, n=1_000))
    with pytest.raises(OptionError, match="model 'another', but the inputs have model 'm'"):
        PairedStores(inputs, store("attn_out", D_OUT, model="another"))


def test_massive_rows_of_one_side_are_left_out_of_both(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path
) -> None:
    with sinking(tiny_llama, tiny_tokens) as (tokens, out):
        wheres = [("attn_out", 0), ("resid_post", 0)]
        stores = harvest_stores(tiny_llama, tokens, wheres, folder=tmp_path, **OPTIONS)
        pairs = PairedStores(stores["attn_out", 0], stores["resid_post", 0])
        exact = [hooked(tiny_llama, tokens, *where).bfloat16() for where in wheres]
    rest = torch.ones(len(exact[0]), dtype=torch.bool).index_fill(0, out, value=False)
    found = Pair(*(torch.cat(side) for side in zip(*((p.x, p.y) for p in pairs.in_order(50)), strict=True)))
    assert torch.equal(found.x, exact[0][rest])
    assert torch.equal(found.y, exact[1][rest])
    assert pairs.inputs.n == pairs.outputs.n == len(exact[0]) - 3
    assert pairs.inputs.left_out.tolist() == pairs.outputs.left_out.tolist() == out.tolist()
    assert pairs.inputs.positions(torch.arange(pairs.n)).tolist() == [
        [i // PER_SEQUENCE, i % PER_SEQUENCE + 1] for i in range(len(rest)) if rest[i]
    ]
    direct = Moments.of(exact[0][rest].double())
    torch.testing.assert_close(pairs.inputs.moments.scatter, direct.scatter, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pairs.inputs.mean, direct.mean, rtol=0, atol=1e-7)
    assert pairs.inputs.fingerprint != stores["attn_out", 0].fingerprint
    assert pairs.inputs.spectrum.left_out == 3
    shaped = PairedStores(
        ShapedStore(stores["attn_out", 0], torch.full((pairs.inputs.d,), 2.0)), pairs.outputs
    )
    expected = 2 * (pairs.inputs.rows(torch.arange(pairs.n)).double() - stores["attn_out", 0].mean)
    seen = torch.cat([pair.x for pair in shaped.in_order(50)]).double()
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-4)
