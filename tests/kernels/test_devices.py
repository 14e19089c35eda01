"""The way of an accelerator, taken on a CPU: the same results, and a fixed number of waits."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_kernels import normal
from waits import Waits, accelerated

from asi_lens.kernels import devices, gradients
from asi_lens.kernels.codes import SparseCode, marked
from asi_lens.kernels.draws import draw_gaussian, unit_rows_
from asi_lens.kernels.gradients import Term, add_at, decode_sum, picked_dots, sum_gradients
from asi_lens.kernels.topk import Workspace, encode_topk


def test_scratch_memory_of_a_cpu_is_fixed() -> None:
    assert devices.scratch_bytes(torch.device("cpu")) == 160 * 2**20
    assert devices.is_host(torch.device("cpu"))
    assert not devices.is_host(torch.device("cuda"))


@pytest.mark.parametrize("scratch", [1, 3000, 10**6])
@pytest.mark.parametrize("with_workspace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_encoder_picks_the_same(
    monkeypatch: pytest.MonkeyPatch, scratch: int, with_workspace: bool, dtype: torch.dtype
) -> None:
    accelerated(monkeypatch, scratch)
    x, weight, bias = normal(7, 12).to(dtype), normal(3333, 12, seed=1), normal(3333, seed=2)
    workspace = Workspace() if with_workspace else None
    code = encode_topk(x, weight, bias, 5, workspace=workspace)
    scores = (x @ weight.to(dtype).T + bias.to(dtype)).relu()
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    torch.testing.assert_close(
        code.values.sort(descending=True).values,
        scores.double().topk(5, dim=1).values,
        rtol=tolerance,
        atol=tolerance,
    )
    assert all(len(set(row)) == 5 for row in code.indices.tolist())
    if dtype == torch.float64:
        assert torch.equal(code.indices.sort().values, scores.topk(5, dim=1).indices.sort().values)


def test_the_encoder_never_waits_whatever_the_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = normal(7, 12).float(), normal(3333, 12, seed=1).float(), normal(3333, seed=2).float()
    for scratch in (2000, 10**6):
        accelerated(monkeypatch, scratch)
        for features in (None, torch.arange(0, 3333, 2)):
            with Waits(monkeypatch) as waits:
                encode_topk(x.bfloat16(), weight, bias, 5, workspace=Workspace(), features=features)
            assert waits.total == 0, waits.found


def test_nan_is_found_in_any_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerated(monkeypatch, 2000)
    weight, bias = normal(3333, 12, seed=1), normal(3333, seed=2)
    for place in (0, 1700, 3332):
        bad = bias.clone()
        bad[place] = torch.nan
        assert encode_topk(normal(3, 12), weight, bad, 5).values.isnan().any()


def test_marks_are_found_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = normal(1000) > 1
    expected = mask.nonzero().flatten()
    accelerated(monkeypatch)
    with Waits(monkeypatch) as waits:
        found = marked(mask, len(expected))
        assert len(marked(mask[:0], 0)) == 0
    assert torch.equal(found, expected)
    assert waits.total == 0, waits.found


def test_sums_at_indices_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    indices, values = torch.tensor([3, 0, 3, 3, 1]), normal(5)
    expected = torch.zeros(5, dtype=torch.float64).index_add_(0, indices, values)
    accelerated(monkeypatch)
    assert torch.equal(add_at(torch.zeros(5, dtype=torch.float64), indices, values), expected)


@pytest.mark.parametrize("silent", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scratch", [400, 10**6])
def test_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch, silent: float, scratch: int) -> None:
    x, encoder, decoder = normal(20, 6), normal(50, 6, seed=1), normal(50, 6, seed=2)
    code = encode_topk(x, encoder, normal(50, seed=3), 4)
    kept = torch.rand(code.values.shape, generator=torch.Generator().manual_seed(1)) >= silent
    # Features 40 to 49 never fire, and neither do some picks of others.
    code = SparseCode(code.indices % 40, code.values * kept)
    wide = SparseCode(*(torch.cat([part, part[:, :2]], 1) for part in code))
    terms = [
        Term(part, decode_sum(part, decoder) - x, holds_b_dec=holds)
        for part, holds in ((code, True), (wide, False))
    ]
    expected = sum_gradients(terms, x, encoder, decoder)
    accelerated(monkeypatch, scratch)
    with Waits(monkeypatch) as waits:
        found = sum_gradients(terms, x, encoder, decoder)
    assert waits.total == 1, waits.found
    for name in ("features", "offsets", "encoder_rows", "encoder_weights", "b_enc", "b_dec", "parallel"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert len(found.edges) == (5 if scratch == 400 else 2)
    chunks = list(itertools.pairwise(found.edges))
    with Waits(monkeypatch) as waits:
        sums = [found.rows(*chunk, decoder) for chunk in chunks]
        fired = [found.rows(*chunk, decoder, few=True) for chunk in chunks if chunk[0][1] < chunk[1][1]]
    assert waits.total == 0, waits.found
    for parts, few in ((sums, False), (fired, True)):
        if parts:
            whole = expected.rows(expected.edges[0], expected.edges[-1], decoder, few=few)
            assert all(map(torch.equal, map(torch.cat, zip(*parts, strict=True)), whole))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_picks_and_sums_what_a_cpu_does() -> None:
    x, weight, bias = normal(64, 24), normal(5000, 24, seed=1), normal(5000, seed=2)
    here = encode_topk(x, weight, bias, 8)
    there = encode_topk(x.cuda(), weight.cuda(), bias.cuda(), 8, tile_bytes=64 * 1000 * 8)
    assert torch.equal(there.indices.cpu().sort().values, here.indices.sort().values)
    grads = [
        sum_gradients([Term(code, decode_sum(code, w) - y)], y, w, w)
        for code, w, y in ((here, weight, x), (there, weight.cuda(), x.cuda()))
    ]
    for name in ("features", "offsets", "b_enc", "b_dec", "parallel"):
        torch.testing.assert_close(getattr(grads[1], name).cpu(), getattr(grads[0], name))
    assert devices.scratch_bytes(torch.device("cuda")) >= 160 * 2**20


@pytest.mark.parametrize(("first", "total"), [(0, None), (3, None), (16_380, 16_400), (16_384, 40_000)])
def test_draws_and_unit_rows_are_the_same(
    monkeypatch: pytest.MonkeyPatch, first: int, total: int | None
) -> None:
    drawn = []
    for elsewhere in (False, True):
        if elsewhere:
            accelerated(monkeypatch)
        out = torch.empty(10, 4)
        draw_gaussian(out, 3, first, total)
        drawn.append((out.clone(), unit_rows_(out)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_products_of_more_picks_than_one_call_of_pytorch_can_count_are_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grad, decoder = normal(6, 12, seed=1), normal(40, 12)
    indices = torch.randint(40, (6, 5), generator=torch.Generator().manual_seed(0))
    whole = picked_dots(grad, decoder, indices)
    assert 32 * gradients._MOST_PICKS < 2**31  # it counts 32 threads a pick
    monkeypatch.setattr(gradients, "_MOST_PICKS", 7)
    assert torch.equal(picked_dots(grad, decoder, indices), whole)
