"""One pass, many consumers: what they are given, and what happens when something goes wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_stores import sinking

from asi_lens.activations.harvest import batch_tokens_for, harvest, places
from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens

pytestmark = pytest.mark.model_facing


class Keep:
    """Keeps every row it is given."""

    def __init__(self, *wants: tuple[str, int]) -> None:
        self.wants = wants
        self.rows: dict[tuple[str, int], list[torch.Tensor]] = {where: [] for where in wants}

    def consume(self, where: tuple[str, int], rows: torch.Tensor) -> None:
        self.rows[where].append(rows.clone())

    def all(self, where: tuple[str, int]) -> torch.Tensor:
        return torch.cat(self.rows[where])


def seen_by_hook(model: Any, tokens: Tokens, site: str, layer: int) -> torch.Tensor:
    """The activation of all sequences at once, [sequence position width]."""
    found: list[torch.Tensor] = []
    models.forward(
        model, tokens.ids, {models.hook_name(model, site, layer): lambda x: found.append(x.clone())}
    )
    return found[0]


def test_rows_are_the_activations_in_order_without_first_positions(
    tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    keep = Keep(("attn_out", 1), ("z", 0))
    harvest(tiny_llama, tiny_tokens, [keep], batch_tokens=2 * tiny_tokens.context, progress=False)
    for where in keep.wants:
        whole = seen_by_hook(tiny_llama, tiny_tokens, *where)
        torch.testing.assert_close(keep.all(where), whole[:, 1:].flatten(0, 1), rtol=1e-5, atol=1e-6)


def test_the_first_position_can_be_kept(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    keep = Keep(("resid_post", 0))
    harvest(tiny_llama, tiny_tokens, [keep], drop_first=False, progress=False)
    assert keep.all(("resid_post", 0)).shape[0] == tiny_tokens.n_tokens


def test_a_full_hook_name_is_its_site(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    keep = Keep(("z", 1), ("blocks.1.attn.hook_z", 1), ("blocks.{}.attn.hook_z", 1))
    harvest(tiny_llama, tiny_tokens, [keep], progress=False)
    assert torch.equal(keep.all(("z", 1)), keep.all(("blocks.1.attn.hook_z", 1)))
    assert torch.equal(keep.all(("z", 1)), keep.all(("blocks.{}.attn.hook_z", 1)))


def test_consumers_share_a_pass(
    tiny_llama: Any, tiny_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = models.forward
    monkeypatch.setattr(models, "forward", lambda *a, **k: (calls.append(k), real(*a, **k))[1])
    one, two = Keep(("attn_out", 0)), Keep(("attn_out", 0), ("mlp_out", 0))
    harvest(tiny_llama, tiny_tokens, [one, two], progress=False)
    assert len(calls) == 1
    assert calls[0]["stop_after_layer"] == 0
    assert torch.equal(one.all(("attn_out", 0)), two.all(("attn_out", 0)))


def test_starting_later_gives_the_rest(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    where = ("mlp_out", 0)
    whole, rest = Keep(where), Keep(where)
    harvest(tiny_llama, tiny_tokens, [whole], batch_tokens=tiny_tokens.context, progress=False)
    harvest(tiny_llama, tiny_tokens, [rest], batch_tokens=tiny_tokens.context, start=2, progress=False)
    assert torch.equal(rest.all(where), whole.all(where)[2 * (tiny_tokens.context - 1) :])


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_massive_rows_are_left_out_where_they_occur(tiny_llama: Any, tiny_tokens: Tokens, batch: int) -> None:
    residual, attention = ("resid_post", 0), ("attn_out", 0)
    with sinking(tiny_llama, tiny_tokens) as (tokens, expected):
        options = {"batch_tokens": batch * tokens.context, "progress": False}
        kept, whole, found = Keep(residual, attention), Keep(residual), []
        harvest(tiny_llama, tokens, [kept], left_out=lambda *told: found.append(told), **options)
        harvest(tiny_llama, tokens, [whole], drop_massive=False, **options)
    assert {where for where, _, _ in found} == {residual}
    assert torch.cat([numbers for _, numbers, _ in found]).tolist() == expected.tolist()
    rows = whole.all(residual)
    assert torch.equal(torch.cat([rows for _, _, rows in found]), rows[expected])
    rest = torch.ones(len(rows), dtype=torch.bool).index_fill(0, expected, value=False)
    assert torch.equal(kept.all(residual), rows[rest])
    assert len(kept.all(attention)) == len(rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(
    tiny_llama: Any, tiny_tokens: Tokens, value: float
) -> None:
    weight = tiny_llama.original_model.get_input_embeddings().weight
    token = int(tiny_tokens.ids[-1, -1])
    before = weight.detach()[token].clone()
    with torch.no_grad():
        weight[token] = value
    try:
        with pytest.raises(DataError, match=r"attn_out of layer 1, batch \d+: NaN or infinity"):
            harvest(tiny_llama, tiny_tokens, [Keep(("attn_out", 1))], progress=False)
    finally:
        with torch.no_grad():
            weight[token] = before
    # No hook is left behind: the model gives finite rows again.
    harvest(tiny_llama, tiny_tokens, [Keep(("attn_out", 1))], progress=False)


def test_interrupting_leaves_no_hook(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    class Interrupt(Keep):
        def consume(self, where: tuple[str, int], rows: torch.Tensor) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_llama, tiny_tokens, [Interrupt(("attn_out", 0))], progress=False)
    harvest(tiny_llama, tiny_tokens, [Keep(("mlp_out", 1))], progress=False)


def test_pairs_are_checked_before_anything_runs(tiny_llama: Any) -> None:
    last = models.model_info(tiny_llama).n_layers - 1
    assert places(tiny_llama, ["attn_out"], [-1, last]) == [("attn_out", last)]
    assert len(places(tiny_llama, ["attn_out", "z"], None)) == 2 * (last + 1)
    assert places(tiny_llama, "z", [0]) == [("z", 0)]
    full = "blocks.1.attn.hook_z"
    assert places(tiny_llama, [full, "z"], [0]) == [("z", 0), (full, 1)]
    assert places(tiny_llama, ["blocks.{}.attn.hook_z"], [2]) == [("blocks.{}.attn.hook_z", 2)]
    with pytest.raises(UnknownNameError, match="did you mean 'attn_out'"):
        places(tiny_llama, ["atn_out"], None)
    with pytest.raises(OptionError, match=rf"layer=99 .* from 0 to {last}"):
        places(tiny_llama, ["attn_out"], [99])
    with pytest.raises(OptionError, match="name at least one site and one layer"):
        places(tiny_llama, [], None)


def test_options_out_of_range(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    keep = Keep(("attn_out", 0))
    with pytest.raises(OptionError, match="start="):
        harvest(tiny_llama, tiny_tokens, [keep], start=len(tiny_tokens) + 1)
    with pytest.raises(OptionError, match="batch_tokens="):
        harvest(tiny_llama, tiny_tokens, [keep], batch_tokens=0)
    with pytest.raises(OptionError, match="consumers ask for no site"):
        harvest(tiny_llama, tiny_tokens, [])
    short = Tokens(tiny_tokens.ids[:, :1], "tiny", "tiny", 1)
    with pytest.raises(OptionError, match="context of 1"):
        harvest(tiny_llama, short, [keep])


def test_batches_suit_the_device(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_tokens_for(tiny_llama) == 2048
    assert batch_tokens_for(tiny_llama, 77) == 77

    class OnCard(torch.nn.Module):
        """A model on a card."""

        def parameters(self, recurse: bool = True) -> Any:
            return iter([SimpleNamespace(device=torch.device("cuda"))])

    for gib, width, expected in ((80, 576, 32_768), (80, 64, 65_536), (8, 4096, 2048), (24, 1024, 4096)):
        info = SimpleNamespace(d_model=width)
        monkeypatch.setattr(models, "model_info", lambda model, fingerprint=True, info=info: info)
        memory = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, memory=memory: memory)
        assert batch_tokens_for(OnCard()) == expected
