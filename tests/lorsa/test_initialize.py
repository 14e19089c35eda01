"""Where a Lorsa begins: exactness of the subspace, the best norm, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_lorsas import CONTEXT, LAYER, N_OV, config

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.lorsa import initialize
from asi_lens.lorsa.attention import read_attention
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.initialize import LORSA_METHODS, active_values, initialize_lorsa, squared_error
from asi_lens.lorsa.lorsa import Lorsa, LorsaConfig

pytestmark = pytest.mark.model_facing
D_INIT = 3


def d_init(method: str) -> int | None:
    return D_INIT if method == "asi" else None


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("n_qk_heads", [4, 8])
def test_nothing_leaks_out_of_the_subspace(
    tiny_llama: Any, pairs: SequencePairs, dtype: torch.dtype, limit: float, n_qk_heads: int
) -> None:
    lorsa = Lorsa(config(tiny_llama, n_qk_heads=n_qk_heads), dtype=dtype)
    report = initialize_lorsa(lorsa, tiny_llama, LAYER, pairs, "asi", D_INIT)
    assert report.leak_encoder is not None
    assert report.leak_decoder is not None
    assert max(report.leak_encoder, report.leak_decoder) < limit
    # By the definition once more: a value in head space, z of a unit depends on its top directions alone.
    source = read_attention(tiny_llama, LAYER, CONTEXT)
    x = pairs.inputs[:, 1:].flatten(0, 1).double()
    for unit in (0, N_OV // 2, N_OV - 1):
        head = lorsa.head_of_unit[unit] * 4 // n_qk_heads
        values = x @ source.W_V[head]
        U = torch.linalg.svd(values - values.mean(0), full_matrices=False).Vh[:D_INIT].T
        w_v, w_o = (rows[unit].detach().double().unsqueeze(1) for rows in (lorsa.W_V, lorsa.W_O))
        read = torch.linalg.lstsq(source.W_V[head], w_v).solution
        written = torch.linalg.lstsq(source.W_O[head].T, w_o).solution
        for direction in (read, written):
            outside = (direction - U @ (U.T @ direction)).norm() / direction.norm()
            assert outside < 1e-5 if dtype == torch.float32 else outside < 1e-10
        assert torch.cosine_similarity(read, written, dim=0).item() == pytest.approx(1, abs=1e-6)
    # The directions of each head fill its subspace.
    group = lorsa.W_V.detach().double()[: N_OV // n_qk_heads]
    assert torch.linalg.matrix_rank(group, rtol=1e-5) == D_INIT


def test_the_subspace_is_that_of_the_values(tiny_llama: Any, pairs: SequencePairs) -> None:
    source = read_attention(tiny_llama, LAYER, CONTEXT)
    U = active_values(source, pairs.input_moments.covariance, 6)
    torch.testing.assert_close(U.mT @ U, torch.eye(6, dtype=torch.float64).expand(4, 6, 6))
    values = pairs.inputs[:, 1:].flatten(0, 1).double() @ source.W_V[2]
    along = ((values - values.mean(0)) @ U[2]).square().mean(0)
    expected = torch.linalg.svdvals(values - values.mean(0)).square() / len(values)
    torch.testing.assert_close(along, expected)


@pytest.mark.parametrize("method", LORSA_METHODS)
def test_no_other_norm_is_better(tiny_llama: Any, pairs: SequencePairs, method: str) -> None:
    lorsa = Lorsa(config(tiny_llama), dtype=torch.float64)
    report = initialize_lorsa(lorsa, tiny_llama, LAYER, pairs, method, d_init(method), norm="search")
    about = {"method": method, "d_init": d_init(method), "seed": 0, "norm": "search"}
    assert report.options == lorsa.initialization == about
    norms = lorsa.W_V.norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, report.encoder_norm))
    torch.testing.assert_close(lorsa.W_O.norm(dim=1), torch.ones_like(norms))
    best = squared_error(lorsa, pairs)
    y = pairs.outputs[:, 1:].double()
    assert best == pytest.approx((lorsa(pairs.inputs)[:, 1:] - y).square().sum().item())
    assert report.fvu == pytest.approx(best / (y - y.mean((0, 1))).square().sum().item())
    for factor in (0.9, 0.999, 1.001, 1.1):
        lorsa.W_V.data.mul_(factor)
        assert squared_error(lorsa, pairs) > best
        lorsa.W_V.data.div_(factor)


@pytest.mark.parametrize("method", LORSA_METHODS)
def test_rows_have_unit_norm_unless_it_is_searched(
    tiny_llama: Any, pairs: SequencePairs, method: str
) -> None:
    unit, searched = (Lorsa(config(tiny_llama), dtype=torch.float64) for _ in range(2))
    report = initialize_lorsa(unit, tiny_llama, LAYER, pairs, method, d_init(method))
    assert report.encoder_norm == pytest.approx(1)
    half = Lorsa(config(tiny_llama), dtype=torch.float64)
    initialize_lorsa(half, tiny_llama, LAYER, pairs, method, d_init(method), norm=0.5)
    torch.testing.assert_close(half.W_V, unit.W_V * 0.5)
    torch.testing.assert_close(unit.W_V.norm(dim=1), torch.ones(N_OV).double())
    other = initialize_lorsa(searched, tiny_llama, LAYER, pairs, method, d_init(method), norm="search")
    torch.testing.assert_close(searched.W_V, unit.W_V * other.encoder_norm)
    assert torch.equal(searched.W_O, unit.W_O)
    assert other.fvu < report.fvu


def test_active_directions_explain_more_from_the_start(tiny_llama: Any, pairs: SequencePairs) -> None:
    fvu = {}
    for method in LORSA_METHODS:
        given = (tiny_llama, LAYER, pairs, method, d_init(method))
        fvu[method] = initialize_lorsa(Lorsa(config(tiny_llama)), *given, norm="search").fvu
    assert fvu["asi"] < fvu["random"] < 1


def test_heads_look_where_the_layer_looks(tiny_llama: Any, pairs: SequencePairs) -> None:
    lorsa = Lorsa(config(tiny_llama), dtype=torch.float64)
    initialize_lorsa(lorsa, tiny_llama, LAYER, pairs, "random")
    x = pairs.inputs[:2].double()
    source = read_attention(tiny_llama, LAYER, CONTEXT)
    patterns = lorsa.heads(lorsa.normalize(x))
    z = patterns @ (torch.einsum("bpd,hdv->bhpv", x, source.W_V) + source.b_V[:, None])
    y = torch.einsum("bhpv,hvd->bpd", z, source.W_O) + source.b_O
    torch.testing.assert_close(y, source.output(x))
    assert lorsa.input_mean.any()


def test_normalized_data_have_the_stated_size(tiny_llama: Any, pairs: SequencePairs) -> None:
    lorsa = Lorsa(config(tiny_llama), dtype=torch.float64)
    initialize_lorsa(lorsa, tiny_llama, LAYER, pairs, "random")
    for rows in (lorsa.normalize(pairs.inputs), lorsa.normalize_output(pairs.outputs)):
        counted = rows[:, 1:].flatten(0, 1)
        torch.testing.assert_close(counted.mean(0), torch.zeros(24, dtype=torch.float64))
        assert counted.square().sum(1).mean().item() == pytest.approx(24)
    # The position that is never counted is in no statistic.
    moved = SequencePairs(pairs.inputs.clone(), pairs.outputs.clone())
    moved.inputs[:, 0] *= 50
    torch.testing.assert_close(moved.input_moments.mean, pairs.input_moments.mean)


@pytest.mark.parametrize("method", LORSA_METHODS)
def test_a_start_comes_from_its_seed(tiny_llama: Any, pairs: SequencePairs, method: str) -> None:
    one, again, other = (Lorsa(config(tiny_llama)) for _ in range(3))
    for lorsa, seed in ((one, None), (again, 0), (other, 1)):
        initialize_lorsa(lorsa, tiny_llama, LAYER, pairs, method, d_init(method), seed=seed)
    assert torch.equal(one.W_V, again.W_V)
    assert not torch.allclose(one.W_V, other.W_V)
    assert one.initialization["method"] == method


@pytest.mark.parametrize("method", LORSA_METHODS)
@pytest.mark.parametrize("name", ["W_V", "W_O"])
def test_no_unit_starts_in_an_ablated_head(
    tiny_llama: Any, pairs: SequencePairs, method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_attention(tiny_llama, LAYER, CONTEXT)
    getattr(source, name)[3] = 0
    monkeypatch.setattr(initialize, "read_attention", lambda *given: source)
    with pytest.raises(DataError, match="head 3 of layer 1 reads or writes nothing"):
        initialize_lorsa(Lorsa(config(tiny_llama)), tiny_llama, LAYER, pairs, method, d_init(method))


def test_bad_input(tiny_llama: Any, pairs: SequencePairs) -> None:
    lorsa = Lorsa(config(tiny_llama))

    def start(method: str = "asi", d_init: Any = 3, **changes: Any) -> None:
        given = {"lorsa": lorsa, "model": tiny_llama, "layer": LAYER, "sample": pairs}
        initialize_lorsa(**{**given, **changes}, method=method, d_init=d_init)

    with pytest.raises(UnknownNameError, match="did you mean 'random'"):
        start("randm")
    for wrong in (0, 7, None):
        with pytest.raises(OptionError, match=f"d_init={wrong} .* from 1 to d_qk=6"):
            start(d_init=wrong)
    with pytest.raises(OptionError, match=r"d_init=3 .* left out for method='random'"):
        start("random")
    with pytest.raises(OptionError, match="seed=-1"):
        start(seed=-1)
    for norm in (0, -1.0, float("inf"), float("nan"), True, "searched"):
        with pytest.raises(OptionError, match="norm="):
            start(norm=norm)
    small = Lorsa(LorsaConfig(24, 6, 2, 8, 2, lorsa.config.pattern))
    with pytest.raises(OptionError, match=r"this Lorsa was made for another .* n_qk_heads=2"):
        start(lorsa=small)
    narrow = SequencePairs(pairs.inputs[..., :20], pairs.outputs[..., :20])
    with pytest.raises(OptionError, match="sample='of width 20'"):
        start(sample=narrow)
    flat = SequencePairs(torch.ones_like(pairs.inputs), pairs.outputs)
    with pytest.raises(OptionError, match=r"variance of the inputs=0\.0"):
        start(sample=flat)
    broken = SequencePairs(pairs.inputs.clone(), pairs.outputs)
    broken.inputs[1, 2, 3] = float("inf")
    with pytest.raises(DataError, match="NaN or infinity"):
        start(sample=broken)
