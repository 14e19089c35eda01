"""The autoencoder's function, its layout in memory, and what it refuses."""

from __future__ import annotations

import copy
from types import MappingProxyType

import pytest
import torch

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder


def make(d_in: int = 10, d_sae: int = 64, k: int = 4, **kwargs: object) -> SparseAutoencoder:
    sae = SparseAutoencoder(SAEConfig(d_in=d_in, d_sae=d_sae, k=k), **kwargs)
    generator = torch.Generator().manual_seed(1)
    for parameter in (sae.b_enc, sae.b_dec):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    sae.set_normalization(torch.linspace(-3, 3, d_in), 0.37)
    return sae


def raw(n: int = 50, d_in: int = 10) -> torch.Tensor:
    return 4 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(5)) + 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"d_in": 0}, "d_in=0"),
        ({"d_sae": 0}, "d_sae=0"),
        ({"k": 0}, "k=0"),
        ({"k": 65}, "from 1 to d_sae=64"),
        ({"seed": -1}, "seed=-1"),
        ({"d_in": True}, "d_in=True"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        SAEConfig(**{"d_in": 10, "d_sae": 64, "k": 4, **change})


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'topk'"):
        SAEConfig(d_in=10, d_sae=64, activation="top_k")
    with pytest.raises(UnknownNameError, match="did you mean 'd_sae'"):
        SAEConfig.from_dict({"d_in": 10, "dsae": 64})
    assert SAEConfig.from_dict({"d_in": 10, "d_sae": 64}) == SAEConfig(d_in=10, d_sae=64)


def test_metadata_is_a_copy_of_json_values() -> None:
    given = MappingProxyType({"site": "attn_out", "layers": (1, 2)})
    assert SAEConfig(d_in=10, d_sae=64, metadata=given).metadata == {"site": "attn_out", "layers": [1, 2]}
    with pytest.raises(OptionError, match="metadata"):
        SAEConfig(d_in=10, d_sae=64, metadata={"model": object()})


def test_the_formula() -> None:
    sae, x = make(dtype=torch.float64), raw().double()
    x_n = (x - sae.input_mean) * sae.input_scale
    pre = (x_n - sae.b_dec) @ sae.W_enc + sae.b_enc
    top = pre.relu().topk(4)
    acts = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    torch.testing.assert_close(sae.encode_dense(x), acts)
    expected = (acts @ sae.W_dec + sae.b_dec) / sae.input_scale + sae.input_mean
    torch.testing.assert_close(sae(x), expected)
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected)


def test_folded_weights_do_the_same_to_raw_activations() -> None:
    sae, x = make(dtype=torch.float64), raw().double()
    folded = sae.folded()
    pre = (x - folded["b_dec"]) @ folded["W_enc"] + folded["b_enc"]
    top = pre.relu().topk(4)
    acts = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    torch.testing.assert_close(acts @ folded["W_dec"] + folded["b_dec"], sae(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(acts, sae.encode_dense(x) / sae.input_scale, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_other_activations_fire_on_any_number_of_features(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks of few rows have codes of different widths.
    monkeypatch.setattr("asi_lens.sae.dictionary._BLOCK", 7)
    config = SAEConfig(d_in=10, d_sae=64, k=64, activation=activation)
    sae, x = SparseAutoencoder(config, dtype=torch.float64), raw().double()
    sae.b_enc.data.fill_(-2)
    pre = (x @ sae.W_enc + sae.b_enc).relu()
    if activation == "jumprelu":
        sae.get_parameter("activation.threshold").data.fill_(1.5)
        pre = pre * (pre > 1.5)
    assert (pre > 0).sum(1).unique().numel() > 3
    torch.testing.assert_close(sae.encode_dense(x), pre)
    torch.testing.assert_close(sae(x), pre @ sae.W_dec)


def test_leading_dimensions_are_kept() -> None:
    sae = make()
    x = raw(24).view(2, 3, 4, 10)
    assert sae.encode(x).indices.shape == (2, 3, 4, 4)
    torch.testing.assert_close(sae(x).view(24, 10), sae(x.view(24, 10)))
    assert sae.encode_dense(x).shape == (2, 3, 4, 64)
    assert sae.encode(raw(0)).values.shape == (0, 4)
    assert sae(raw(0)).shape == (0, 10)


def test_a_zero_value_means_that_a_feature_did_not_fire() -> None:
    sae = make()
    sae.b_enc.data.fill_(-1e4)
    assert (sae.encode(raw()).values == 0).all()
    baseline = sae.b_dec / sae.input_scale + sae.input_mean
    torch.testing.assert_close(sae(raw()), baseline.expand(50, 10))


def test_both_weights_of_a_feature_lie_side_by_side_and_stay_so() -> None:
    sae = make()
    for one in (sae, copy.deepcopy(sae), make().double(), make().to("cpu")):
        assert one.W_enc.shape == (10, 64)
        assert one.encoder_rows.is_contiguous()
    other = SparseAutoencoder(sae.config, draw=False)
    other.load_state_dict(sae.state_dict())
    assert other.encoder_rows.is_contiguous()
    assert torch.equal(other(raw()), sae(raw()))


def test_a_new_one_is_drawn_from_its_seed() -> None:
    config = SAEConfig(d_in=10, d_sae=64, k=4, seed=3)
    first, again = SparseAutoencoder(config), SparseAutoencoder(config)
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, SparseAutoencoder(SAEConfig(d_in=10, d_sae=64, k=4)).W_dec)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(first.W_enc.T, first.W_dec)
    torch.testing.assert_close(SparseAutoencoder(config, dtype=torch.float64).W_dec.float(), first.W_dec)


@pytest.mark.parametrize("shape", [(5, 9), (5, 11), (9,)])
def test_the_wrong_width_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="d_in=10"):
        make().encode(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(value: float) -> None:
    x = raw()
    x[3, 4] = x[7, 0] = value
    with pytest.raises(DataError, match="2 of 50 activation rows"):
        make().encode(x)


def test_normalization_that_cannot_be_is_refused() -> None:
    sae = SparseAutoencoder(SAEConfig(d_in=10, d_sae=64, k=4))
    assert not sae.is_normalized
    for mean, scale in [
        (torch.zeros(9), 1.0),
        (torch.full((10,), float("nan")), 1.0),
        (torch.zeros(10), 0.0),
    ]:
        with pytest.raises(OptionError):
            sae.set_normalization(mean, scale)
    sae.set_normalization(torch.zeros(10), 2.0)
    assert sae.is_normalized
    with pytest.raises(OptionError, match="master weights"):
        SparseAutoencoder(sae.config, dtype=torch.bfloat16)


def test_bfloat16_activations_are_taken() -> None:
    sae, x = make(), raw().bfloat16()
    torch.testing.assert_close(sae(x), sae(x.float()))
    assert sae(x).dtype == torch.float32
