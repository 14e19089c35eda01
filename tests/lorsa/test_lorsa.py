"""The forward pass of a Lorsa: a layer exactly, nothing from the future, k units at most."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import architectures
import pytest
import torch
from small_lorsas import CONTEXT, LAYER, N_OV, K, config, read_and_written, started

from asi_lens.base.errors import DataError, OptionError, UnknownNameError, UnsupportedModelError
from asi_lens.inputs.models import load_model
from asi_lens.kernels.codes import SparseCode
from asi_lens.lorsa.attention import read_attention
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.heads import PatternConfig, visible
from asi_lens.lorsa.initialize import from_attention
from asi_lens.lorsa.lorsa import Lorsa, LorsaConfig

pytestmark = pytest.mark.model_facing


@pytest.fixture(scope="module")
def lorsa(tiny_llama: Any, pairs: SequencePairs) -> Lorsa:
    return started(tiny_llama, pairs, dtype=torch.float64)


@pytest.mark.parametrize("layer", [0, 1])
def test_with_every_unit_on_it_is_the_layer(
    architecture: str, tiny_model: Any, ids: torch.Tensor, layer: int
) -> None:
    """Grouped queries, biases, soft caps, windows, partial rotations and query-key norms included."""
    if architecture == "bert":
        pytest.skip("not causal")
    x, y = read_and_written(tiny_model, ids, layer)
    exact = from_attention(tiny_model, layer, 40, dtype=torch.float64)
    torch.testing.assert_close(exact(x).float(), y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    assert exact.n_ov == exact.config.n_qk_heads * exact.config.d_qk
    single = from_attention(tiny_model, layer, 40)
    torch.testing.assert_close(single(x), y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    # Rows are unit, so that training can go on from here.
    torch.testing.assert_close(single.W_O.norm(dim=1), torch.ones(single.n_ov))


def test_the_rules_of_patterns_are_read(tiny_folder: Any) -> None:
    rules = {
        name: read_attention(load_model(tiny_folder(name), dtype="float32", device="cpu"), 0, 20).pattern
        for name in ("gpt2", "gemma2", "qwen3", "neox")
    }
    assert rules["gpt2"] == PatternConfig(20, 6**-0.5)
    assert rules["gemma2"] == PatternConfig(20, 8**-0.5, softcap=50.0, window=8, rotary_dim=8)
    assert rules["qwen3"] == PatternConfig(20, 8**-0.5, rotary_dim=8, norm_eps=1e-6)
    assert rules["neox"] == PatternConfig(20, 8**-0.5, rotary_dim=4)


def test_copies_of_heads_see_what_the_heads_see(tiny_llama: Any, pairs: SequencePairs) -> None:
    once = started(tiny_llama, pairs)
    twice = started(tiny_llama, pairs, n_qk_heads=8)
    source = read_attention(tiny_llama, LAYER, CONTEXT)
    assert source.W_K.shape == (4, 24, 6)
    # Two query heads share a key head.
    torch.testing.assert_close(source.W_K[0], source.W_K[1])
    assert not torch.allclose(source.W_K[1], source.W_K[2])
    x = once.normalize(pairs.inputs[:2])
    patterns, copied = once.heads(x), twice.heads(x)
    torch.testing.assert_close(copied, patterns.repeat_interleave(2, 1))
    torch.testing.assert_close(patterns.sum(-1), torch.ones(2, 4, CONTEXT))
    assert twice.head_of_unit == [unit // 12 for unit in range(N_OV)]


def test_units_are_the_definition(lorsa: Lorsa, pairs: SequencePairs) -> None:
    x = pairs.inputs[:3].double()
    lorsa.b_V.data.normal_(generator=torch.Generator().manual_seed(0))
    x_n = (x - lorsa.input_mean) * lorsa.input_scale
    patterns, found = lorsa.heads(x_n), lorsa.units(x)
    for unit in (0, 23, 24, N_OV - 1):
        value = x_n @ lorsa.W_V[unit] + lorsa.b_V[unit]
        expected = (patterns[:, lorsa.head_of_unit[unit]] @ value.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(found[..., unit], expected)
    code = lorsa.encode(x)
    dense = torch.zeros_like(found).scatter(-1, code.indices, code.values)
    best = found.topk(K, dim=-1)
    torch.testing.assert_close(dense, torch.zeros_like(found).scatter(-1, best.indices, best.values.relu()))
    y = (dense @ lorsa.W_O + lorsa.b_O) / lorsa.output_scale + lorsa.output_mean
    torch.testing.assert_close(lorsa(x), y)
    assert (code.values > 0).sum(-1).max() <= K
    lorsa.b_V.data.zero_()


def test_without_rectification_the_largest_by_size_write(tiny_llama: Any, pairs: SequencePairs) -> None:
    both = started(tiny_llama, pairs, rectify=False)
    code, z = both.encode(pairs.inputs), both.units(pairs.inputs)
    torch.testing.assert_close(
        code.values.abs().sort(-1).values, z.abs().topk(K, dim=-1).values.sort(-1).values
    )
    assert (code.values < 0).any()


def test_later_positions_change_nothing_before(lorsa: Lorsa, pairs: SequencePairs) -> None:
    x = pairs.inputs[:2].double()
    changed = x.clone()
    changed[:, 20:] += torch.randn(changed[:, 20:].shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lorsa(changed)[:, :20], lorsa(x)[:, :20], rtol=0, atol=1e-12)
    assert not torch.allclose(lorsa(changed)[:, 20:], lorsa(x)[:, 20:])
    # Neither does what follows: a sequence may be cut off anywhere.
    torch.testing.assert_close(lorsa(x[:, :20]), lorsa(x)[:, :20], rtol=0, atol=1e-12)


def test_gradients_reach_every_weight_and_are_right(lorsa: Lorsa, pairs: SequencePairs) -> None:
    x, y = pairs.inputs[:4].double(), pairs.outputs[:4].double()

    def loss() -> torch.Tensor:
        return (lorsa.decode_normalized(lorsa.encode(x)) - lorsa.normalize_output(y)).square().mean()

    lorsa.zero_grad()
    loss().backward()
    for name, parameter in lorsa.named_parameters():
        assert parameter.grad is not None, name
        # Without rotation a key's bias would add the same to all scores; with it everything has a gradient.
        assert parameter.grad.abs().max() > 0, name
        place = int(parameter.grad.abs().argmax())
        flat = parameter.data.view(-1)
        at, step = flat[place].item(), 1e-6
        losses = []
        for value in (at + step, at - step):
            flat[place] = value
            losses.append(loss().item())
        flat[place] = at
        slope = (losses[0] - losses[1]) / (2 * step)
        assert parameter.grad.view(-1)[place].item() == pytest.approx(slope, rel=1e-3), name
    lorsa.zero_grad()


def test_positions_seen_through_a_window() -> None:
    assert visible(4, None).tolist() == torch.ones(4, 4).tril().bool().tolist()
    assert visible(4, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_a_configuration_survives_json(tiny_llama: Any) -> None:
    one = config(tiny_llama, seed=3)
    assert LorsaConfig.from_dict(asdict(one)) == one
    assert one.metadata["hook_name"] == f"blocks.{LAYER}.hook_attn_out"
    with pytest.raises(UnknownNameError, match="did you mean 'n_ov'"):
        LorsaConfig.from_dict({**asdict(one), "nov": 3})
    with pytest.raises(UnknownNameError, match="did you mean 'scale'"):
        LorsaConfig.from_dict({**asdict(one), "pattern": {"scales": 1.0}})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_ov": 94}, "n_ov=94 is not allowed; n_ov must be a multiple of n_qk_heads=4"),
        ({"n_qk_heads": 6}, "n_qk_heads=6 is not allowed; n_qk_heads must be a multiple of the layer's 4"),
        ({"k": N_OV + 1}, f"k={N_OV + 1} is not allowed; k must be from 1 to n_ov={N_OV}"),
        ({"k": 0}, "k=0"),
        ({"seed": -1}, "seed=-1"),
        ({"context": 0}, "context=0"),
        ({"context": 129}, "context=129 is not allowed; context must be from 1 to the model's 128 tokens"),
    ],
)
def test_a_lorsa_that_cannot_be_is_refused(tiny_llama: Any, change: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        config(tiny_llama, **change)


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.0}, {"softcap": -1.0}, {"window": 0}, {"rotary_dim": 3}, {"norm_eps": 0.0}, {"context": 0}],
)
def test_patterns_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    (key, value) = next(iter(change.items()))
    with pytest.raises(OptionError, match=f"{key}={value}"):
        PatternConfig(**{"context": 8, "scale": 1.0, **change})
    with pytest.raises(OptionError, match="rotary_dim=8 is not allowed; rotary_dim must be at most d_qk=6"):
        Lorsa(LorsaConfig(24, 6, 4, 8, 2, PatternConfig(8, 1.0, rotary_dim=8)))


def test_sequences_that_cannot_be_are_refused(lorsa: Lorsa) -> None:
    broken = torch.zeros(3, 5, 24)
    broken[1, 2, 3] = float("nan")
    for x, message in [
        (torch.zeros(2, CONTEXT + 1, 24), f"sequences have {CONTEXT + 1} positions, .* context={CONTEXT}"),
        (torch.zeros(2, 5, 23), r"inputs have shape \(2, 5, 23\)"),
        (torch.zeros(0, 5, 24), r"inputs have shape \(0, 5, 24\)"),
        (broken, "1 of 3 sequences of inputs hold NaN"),
    ]:
        with pytest.raises(DataError, match=message):
            lorsa(x)


def test_attention_that_cannot_be_copied_is_refused(tiny_folder: Any, tiny_llama: Any) -> None:
    def load(name: str) -> Any:
        return load_model(tiny_folder(name), dtype="float32", device="cpu")

    with pytest.raises(UnsupportedModelError, match=r"bert.* cannot be copied: .* no causal mask"):
        from_attention(load("bert"), 0, 16)
    with pytest.raises(UnsupportedModelError, match="no site"):
        from_attention(load("mamba"), 0, 16)
    with pytest.raises(OptionError, match="layer=3"):
        from_attention(tiny_llama, 3, 16)


def test_attention_that_does_something_else_is_found_out(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the model rotated in another way than what was copied does.
    place = "transformers.models.gpt_neox.modeling_gpt_neox.apply_rotary_pos_emb"
    monkeypatch.setattr(place, lambda q, k, cos, sin: (q, k))
    with pytest.raises(UnsupportedModelError, match=r"layer 1 of tiny-llama .*relative error .* something"):
        read_attention(tiny_llama, LAYER, 16)


def test_a_model_that_somebody_hooked_is_refused(tiny_folder: Any) -> None:
    model = load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    model.add_hook(f"blocks.{LAYER}.hook_attn_out", lambda activation, hook: activation * 2)
    with pytest.raises(UnsupportedModelError, match="hooks that were added"):
        read_attention(model, LAYER, 16)


def test_decoding_is_linear_in_the_code(lorsa: Lorsa, pairs: SequencePairs) -> None:
    code = lorsa.encode(pairs.inputs[:2].double())
    nothing = SparseCode(code.indices, torch.zeros_like(code.values))
    once = lorsa.decode_normalized(code) - lorsa.decode_normalized(nothing)
    twice = lorsa.decode_normalized(SparseCode(code.indices, 2 * code.values)) - lorsa.b_O
    torch.testing.assert_close(twice, 2 * once)
    torch.testing.assert_close(lorsa.decode_normalized(nothing), lorsa.b_O.expand(2, CONTEXT, -1))


@pytest.mark.parametrize("architecture", ["deepseek-v2", "deepseek-v3"])
def test_attention_of_another_kind_is_refused(architecture: str, tmp_path: Path) -> None:
    """DeepSeek-V2 rotates by complex numbers, V3 has queries of low rank."""
    model = architectures.load(architectures.build(architecture, tmp_path / architecture))
    with pytest.raises(
        UnsupportedModelError, match=r"cannot be copied: (its rotation|it has no|.*gives? another)"
    ):
        read_attention(model, 1, 16)
