"""A diagnosis before training: numbers of the activations, and advice that follows from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import hooked, sinking

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import DataError, OptionError
from asi_lens.collapse.centering import dead_at_start, gamma, predicted_dead
from asi_lens.experiments import diagnose as module
from asi_lens.experiments.diagnose import KILLED, advise, advise_width, diagnose
from asi_lens.figures.beyond import diagnosis
from asi_lens.inputs.corpora import Tokens
from asi_lens.results.beyond_rows import DiagnosisRow
from asi_lens.results.tables import frame, read_rows
from asi_lens.sae.initialize import auto_d_init

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


def spectrum(values: torch.Tensor, mean: float = 0.0) -> Spectrum:
    values = values.double()
    return Spectrum(values, torch.full_like(values, mean), 10**6, torch.diag(values))


def test_a_diagnosis_is_of_the_activations(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    (row,) = diagnose(tiny_llama, tiny_tokens, ["attn_out"], [1], d_sae=128, k=4, progress=False)
    exact = hooked(tiny_llama, tiny_tokens, "attn_out", 1)
    direct = Spectrum.of(exact.double())
    assert (row.n_tokens, row.n_rows, row.d) == (len(exact), len(exact), exact.shape[1])
    assert row.effective_rank_fraction == pytest.approx(direct.effective_rank_fraction, rel=1e-4)
    assert row.gamma == pytest.approx(gamma(direct), rel=1e-4)
    assert row.predicted == pytest.approx(predicted_dead(gamma(direct), 4, 128, len(exact)), rel=1e-3)
    assert row.dead_raw == pytest.approx(dead_at_start(exact, 4, 128), abs=2 / 128)
    assert row.dead_centered == pytest.approx(dead_at_start(exact, 4, 128, center=direct.mean), abs=2 / 128)
    few = diagnose(tiny_llama, tiny_tokens, ["attn_out"], [1], d_sae=128, k=4, n_rows=50, progress=False)
    assert (few[0].n_rows, few[0].n_tokens) == (50, len(exact))


def test_massive_rows_are_counted_and_left_out(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    with sinking(tiny_llama, tiny_tokens) as (tokens, _):
        (row,) = diagnose(tiny_llama, tokens, ["resid_post"], [0], d_sae=64, k=4, progress=False)
    assert (row.n_left_out, row.n_tokens, row.n_rows) == (3, 12 * 31, 12 * 31 - 3)


def test_advice_follows_from_mean_and_spectrum() -> None:
    flat, collapsed = spectrum(torch.ones(40)), spectrum(0.7 ** torch.arange(40))
    found = advise(flat, 0.0, 0.0)
    assert (found.start, found.d_init, found.center) == ("random", None, "harmless")
    found = advise(collapsed, 0.0, 0.0)
    assert (found.start, found.d_init) == ("asi", auto_d_init(collapsed))
    assert found.d_init is not None
    assert found.d_init <= collapsed.intrinsic_dimension(0.999), "never beyond the rank"
    assert advise(flat, 0.5, 0.01).center == "needed"
    assert "silence 50.0% of a random start, centered ones 1.0%" in advise(flat, 0.5, 0.01).reason
    assert advise(flat, 0.5, 0.5).center == "harmless", "not the mean's deaths"


def test_the_width_is_the_largest_half_whose_start_fires() -> None:
    rows = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)) * 0.85 ** torch.arange(40) + 2
    site = Spectrum.of(rows)
    advice = advise(site, 0.0, 0.0)
    assert advice.start == "asi"
    found = advise_width(rows, site, advice, 4_096, 4)
    inside = ((rows.double() - site.mean) @ site.active_subspace(advice.d_init or 1)).float()
    assert found.d_sae < 4_096
    assert found.dead == dead_at_start(inside, 4, found.d_sae) <= KILLED
    assert dead_at_start(inside, 4, 2 * found.d_sae) > KILLED
    assert f"of 4,096 features never fire, {found.dead:.1%} of {found.d_sae:,} features" in found.reason
    assert advise_width(rows, site, advice, found.d_sae, 4).d_sae == found.d_sae
    # The random start is measured at full width; where no size will do, that is said.
    flat = advise(spectrum(torch.ones(40)), 0.0, 0.0)
    assert advise_width(rows, site, flat, 64, 4).dead == dead_at_start(rows, 4, 64, center=site.mean)
    worst = advise_width(rows[:2], site, advice, 4_096, 4)
    assert (worst.d_sae, worst.reason.endswith("measure on more text")) == (16, True)


def test_what_cannot_be_diagnosed_is_refused(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    short = Tokens(tiny_tokens.ids[:1, :20], "short", "tiny", 20)
    with pytest.raises(DataError, match="too short a text for a rank"):
        diagnose(tiny_llama, short, ["attn_out"], [0], progress=False)
    with pytest.raises(OptionError, match="k=64"):
        diagnose(tiny_llama, tiny_tokens, d_sae=64, k=64)
    with pytest.raises(OptionError, match="n_rows=1"):
        diagnose(tiny_llama, tiny_tokens, n_rows=1)


def test_the_command_prints_a_row_a_place_and_writes_what_is_asked_for(
    tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + (7 * i * i + i) % 90) for i in range(4_000)), encoding="utf-8")
    options = ["--tokens", "1024", "--context", "32", "--features", "64", "-k", "4", "--layers", "0,2"]
    assert (
        module.main([str(tiny_folder("llama")), str(text), *options, "--output", str(tmp_path / "out")]) == 0
    )
    shown = capsys.readouterr().out
    assert shown.count("centering ") == 6
    rows = read_rows(tmp_path / "out" / "diagnosis.csv", DiagnosisRow)
    assert len(rows) == 6
    assert (tmp_path / "out" / "diagnosis.html").is_file()
    figure = diagnosis(frame(rows))
    assert len([t for t in figure.data if t.line.dash == "dash"]) == 3
    assert module.main(["no-such-model"]) == 1
    assert "no-such-model" in capsys.readouterr().err
