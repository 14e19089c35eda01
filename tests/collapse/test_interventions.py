"""Losses under edits: identities that must hold, and independence of how the work is cut up."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch

from asi_lens.base.errors import DataError, OptionError, UnsupportedModelError
from asi_lens.collapse import interventions as iv
from asi_lens.collapse.spectra import collect_spectra
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.results.rows import LossRow

pytestmark = [
    pytest.mark.model_facing,
    pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning"),
]
WHERE = ("attn_out", 1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    return tmp_path


def orthonormal(d: int, r: int) -> torch.Tensor:
    noise = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(noise).Q[:, :r]


def test_clean_loss_is_that_of_the_plain_model(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    with torch.inference_mode():
        output = tiny_llama.original_model(tiny_tokens.ids, labels=tiny_tokens.ids)
    loss = iv.cross_entropy(tiny_llama, tiny_tokens, progress=False)
    assert loss == pytest.approx(float(output.loss), rel=1e-5)


def test_losses_do_not_depend_on_the_batch(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    context = tiny_tokens.context
    edits = {"mean": iv.mean_ablate(torch.zeros(models.site_width(tiny_llama, WHERE[0])))}
    for run in (
        lambda b: iv.cross_entropy(tiny_llama, tiny_tokens, batch_tokens=b, progress=False),
        lambda b: iv.edited_cross_entropy(
            tiny_llama, tiny_tokens, *WHERE, edits, batch_tokens=b, progress=False
        )["mean"],
    ):
        # 3 sequences a batch leaves a short last one: averages of batch averages would differ.
        assert run(3 * context) == pytest.approx(run(context), rel=1e-5)


def test_changing_nothing_costs_nothing(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    d = models.site_width(tiny_llama, WHERE[0])
    edits = {
        "same": lambda x: x,
        "all directions": iv.project(torch.randn(d), orthonormal(d, d)),
    }
    losses = iv.edited_cross_entropy(tiny_llama, tiny_tokens, *WHERE, edits, progress=False)
    clean = iv.cross_entropy(tiny_llama, tiny_tokens, progress=False)
    for loss in losses.values():
        assert loss == pytest.approx(clean, rel=1e-5)


def test_an_edit_reaches_the_model(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    hook = models.hook_name(tiny_llama, *WHERE)
    logits = models.forward(tiny_llama, tiny_tokens.ids, {hook: torch.zeros_like}, logits=True)
    direct = iv.next_token_loss(logits, tiny_tokens.ids).mean().item()
    swept = iv.edited_cross_entropy(
        tiny_llama, tiny_tokens, *WHERE, {"zero": torch.zeros_like}, progress=False
    )
    assert swept["zero"] == pytest.approx(direct, rel=1e-5)
    assert swept["zero"] != pytest.approx(iv.cross_entropy(tiny_llama, tiny_tokens, progress=False), rel=1e-6)


def test_projections_on_no_directions_ablate_and_are_idempotent() -> None:
    x, mean = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    basis = orthonormal(8, 3)
    edit = iv.project(mean, basis)
    torch.testing.assert_close(edit(edit(x)), edit(x))
    torch.testing.assert_close((edit(x) - mean) @ basis, (x - mean) @ basis)
    torch.testing.assert_close(iv.project(mean, basis[:, :0])(x), iv.mean_ablate(mean)(x))
    skipped = iv.skip_outliers(iv.mean_ablate(mean))(x)
    assert torch.equal(skipped[:, 0], x[:, 0])
    assert torch.equal(skipped[:, 1:], mean.expand(2, 2, 8))
    x[1, 2, 4] = 1e5  # a massive activation stays as it is
    skipped = iv.skip_outliers(iv.mean_ablate(mean))(x)
    assert torch.equal(skipped[1, 2], x[1, 2])
    assert torch.equal(skipped[:, 1], mean.expand(2, 8))


def test_a_sweep_is_complete_cached_and_nested(
    tiny_llama: Any, tiny_tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    spectra = collect_spectra(tiny_llama, tiny_tokens, ["attn_out", "mlp_out"], [1], progress=False)
    ranks = [0.25, 0.5, 1.0]
    sweep = partial(
        iv.truncation_sweep, tiny_llama, tiny_tokens, spectra, ranks, random_seeds=[3], progress=False
    )
    records = sweep()
    rows = [LossRow(**record) for record in records]
    assert len(rows) == 2 * 2 * 3
    for row in rows:
        assert row.rank == round(row.rank_fraction * spectra[row.site, 1].d)
        assert row.seed == (3 if row.subspace == "random" else None)
        if row.rank_fraction == 1.0:
            assert row.cross_entropy == pytest.approx(row.cross_entropy_clean, rel=1e-4)
    monkeypatch.setattr(models, "forward", None)  # nothing may run
    assert (
        iv.truncation_sweep(tiny_llama, tiny_tokens, spectra, ranks, random_seeds=[3], progress=False)
        == records
    )


def test_recovered_share() -> None:
    assert iv.loss_recovered(2.0, 2.0, 5.0) == 1.0
    assert iv.loss_recovered(5.0, 2.0, 5.0) == 0.0
    assert iv.loss_recovered(6.5, 2.0, 5.0) == -0.5
    assert iv.loss_recovered(2.0, 2.0, 2.0) is None


def test_next_token_loss_of_uniform_and_certain_predictions() -> None:
    ids = torch.tensor([[1, 2, 0]])
    torch.testing.assert_close(iv.next_token_loss(torch.zeros(1, 3, 4), ids), torch.full((1, 2), math.log(4)))
    certain = torch.zeros(1, 3, 4)
    certain[0, 0, 2] = certain[0, 1, 0] = 100.0
    torch.testing.assert_close(iv.next_token_loss(certain, ids), torch.zeros(1, 2))


def test_bad_input(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    spectra = collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [1], progress=False)
    with pytest.raises(OptionError, match=r"ranks=1\.5"):
        iv.truncation_sweep(tiny_llama, tiny_tokens, spectra, [1.5])
    with pytest.raises(OptionError, match="random_seeds"):
        iv.truncation_sweep(tiny_llama, tiny_tokens, spectra, [0.5], random_seeds=[-1])
    with pytest.raises(DataError, match="'broken' is not finite"):
        iv.edited_cross_entropy(
            tiny_llama, tiny_tokens, *WHERE, {"broken": lambda x: x * float("nan")}, progress=False
        )
    with pytest.raises(OptionError, match="context=1"):
        iv.cross_entropy(tiny_llama, Tokens(tiny_tokens.ids[:, :1], "tiny", "tiny", 1))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "bert-causal"])
def test_an_encoder_has_no_next_token_loss_at_any_door(
    architecture: str, tmp_path: Path, tiny_tokens: Tokens
) -> None:
    """`bert-causal` has a causal mask, and a head that was trained to fill in masked tokens."""
    model = architectures.load(architectures.build(architecture, tmp_path / architecture))
    if isinstance(model, Exception) or models.model_info(model).causal:
        pytest.skip("TransformerLens 3 has no RoBERTa; TransformerLens 4 loads a causal BERT as what it is")
    edits = {"mean": iv.mean_ablate(torch.zeros(24))}
    doors: list[Any] = [
        lambda: iv.cross_entropy(model, tiny_tokens, progress=False),
        lambda: iv.edited_cross_entropy(model, tiny_tokens, *WHERE, edits, progress=False),
        lambda: iv.truncation_sweep(
            model,
            tiny_tokens,
            collect_spectra(model, tiny_tokens, [WHERE[0]], [WHERE[1]], progress=False),
            [0.5],
            progress=False,
        ),
    ]
    for door in doors:
        with pytest.raises(UnsupportedModelError, match="does not predict next tokens"):
            door()
