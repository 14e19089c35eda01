"""The small transformer computes what Llama computes, and its parts have their closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from asi_lens.base.errors import OptionError
from asi_lens.experiments.small_transformer import (
    SmallTransformer,
    TransformerConfig,
    head_overlap_penalty,
    rotated,
)

CONFIG = TransformerConfig(vocab=40, d_model=32, n_layers=3, n_heads=4, d_mlp=44)


def ids(positions: int = 12) -> torch.Tensor:
    return torch.randint(CONFIG.vocab, (5, positions), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def moved(model: SmallTransformer) -> SmallTransformer:
    """Norms and biases away from ones and zeros, so that their place shows."""
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def test_it_is_llama() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = moved(SmallTransformer(CONFIG, seed=1)).double()
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 44}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4}
    more = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attn_implementation": "eager"}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **more)).double().eval()
    names = {"W_Q": "self_attn.q_proj", "W_K": "self_attn.k_proj", "W_V": "self_attn.v_proj"}
    names = {f"attention.{ours}": theirs for ours, theirs in {**names, "W_O": "self_attn.o_proj"}.items()}
    names |= {"norm_attention": "input_layernorm", "norm_mlp": "post_attention_layernorm"}
    names |= {"W_gate": "mlp.gate_proj", "W_in": "mlp.up_proj", "W_out": "mlp.down_proj"}
    state = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    for layer in range(3):
        for ours, theirs in names.items():
            weight = model.get_parameter(f"blocks.{layer}.{ours}.weight")
            state[f"model.layers.{layer}.{theirs}.weight"] = weight
    found = llama.load_state_dict(state, strict=False)
    assert found.missing_keys == ["lm_head.weight"]
    assert not found.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), llama(ids()).logits, rtol=0, atol=1e-5)


def test_what_comes_later_changes_nothing() -> None:
    model, text = SmallTransformer(CONFIG), ids()
    other = text.clone()
    other[:, 7:] = (other[:, 7:] + 1) % CONFIG.vocab
    with torch.no_grad():
        a, b = model(text), model(other)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert (a[:, 7:] - b[:, 7:]).abs().min() > 0


def test_a_gate_that_is_open_is_no_gate() -> None:
    plain, gated = SmallTransformer(CONFIG, 1), SmallTransformer(replace(CONFIG, gate=True), 1)
    assert not gated.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    with torch.no_grad():
        half = gated(ids())
        for attention in gated.attentions():
            attention.W_G.weight.zero_()
            attention.W_G.bias.fill_(40.0)
        torch.testing.assert_close(gated(ids()), plain(ids()), rtol=0, atol=1e-6)
        assert (half - plain(ids())).abs().max() > 1e-3
        for attention in gated.attentions():
            attention.W_G.bias.fill_(-200.0)
        x = torch.randn(2, 6, 32)
        assert not gated.attentions()[0](x).any(), "a closed gate writes nothing"


def test_draws_depend_on_seed_and_name_alone() -> None:
    one, same, other = (SmallTransformer(CONFIG, seed).state_dict() for seed in (4, 4, 5))
    narrow = SmallTransformer(replace(CONFIG, gate=True, d_mlp=33), 4).state_dict()
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name])
        assert torch.equal(tensor, other[name]) == (tensor.ndim == 1), name
        if tensor.shape == narrow[name].shape:
            assert torch.equal(tensor, narrow[name])
    assert not torch.equal(one["blocks.0.attention.W_Q.weight"], one["blocks.1.attention.W_Q.weight"])


def test_the_draw_has_its_variances() -> None:
    drawn = SmallTransformer(replace(CONFIG, d_model=256, n_heads=8, d_mlp=400, vocab=900)).state_dict()
    assert drawn["blocks.1.attention.W_V.weight"].std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert drawn["blocks.1.attention.W_O.weight"].std().item() == pytest.approx((256 * 6) ** -0.5, rel=0.02)
    assert drawn["blocks.1.W_out.weight"].std().item() == pytest.approx((400 * 6) ** -0.5, rel=0.02)
    assert drawn["embedding.weight"].std().item() == pytest.approx(0.02, rel=0.02)


def test_rotary_products_depend_on_distance() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 1, 9, 8)
    scores = (rotated(q) @ rotated(k).mT)[0, 0]
    for distance in range(9):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotated(q)[..., 0, :], q[..., 0, :])
    torch.testing.assert_close(rotated(q).norm(dim=-1), q.norm(dim=-1), rtol=1e-6, atol=0)


def test_the_penalty_is_zero_for_orthogonal_heads_alone() -> None:
    frame = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q
    mixed = torch.block_diag(*(torch.randn(8, 8, dtype=torch.float64) for _ in range(4)))
    # Any directions inside mutually orthogonal subspaces.
    assert head_overlap_penalty(frame @ mixed, 4).item() == pytest.approx(0, abs=1e-12)
    # Four heads that write to one subspace: each direction is wholly inside the three others.
    same = frame[:, :8].repeat(1, 4)
    assert head_overlap_penalty(same, 4).item() == pytest.approx(3)
    assert head_overlap_penalty(7 * same, 4).item() == pytest.approx(3), "of directions, not of their size"
    random = head_overlap_penalty(torch.randn(256, 256, dtype=torch.float64), 8).item()
    assert random == pytest.approx((256 - 32) / 256, rel=0.03)


def test_the_gradient_of_the_penalty() -> None:
    W_O = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda W: head_overlap_penalty(W, 4), W_O)
    (slope,) = torch.autograd.grad(head_overlap_penalty(W_O, 4), W_O)
    # By hand: with unit columns r_i, the gradient of sum_ij m_ij (r_i . r_j)^2 / n, made tangent to each r_i.
    length = W_O.detach().norm(dim=0)
    r = W_O.detach() / length
    mask = 1 - torch.block_diag(*(torch.ones(2, 2, dtype=torch.float64) for _ in range(4)))
    raw = 4 * r @ (mask * (r.T @ r)) / 8
    torch.testing.assert_close(slope, (raw - r * (raw * r).sum(0)) / length)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_layers": 0}, "n_layers=0 .* at least 1"),
        ({"d_mlp": 2.5}, "d_mlp=2.5"),
        ({"d_model": 36}, "d_model=36 .* a multiple of twice n_heads=4"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        replace(CONFIG, **changes)
