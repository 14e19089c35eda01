"""Cached spectra: equal to a direct computation, incremental, resumable, and never silently wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_plain
import torch
from small_stores import hooked, sinking

from asi_lens.activations.harvest import harvest
from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.errors import CacheError, OptionError
from asi_lens.collapse import spectra
from asi_lens.collapse.spectra import collect_spectra, rank_growth
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.media_inputs import load_inputs

pytestmark = [
    pytest.mark.model_facing,
    # Tiny models on tiny texts: too few tokens is what these tests always have.
    pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, int]]]:
    """What each pass of the model was asked for."""
    seen: list[list[tuple[str, int]]] = []

    def counting(model: Any, tokens: Any, consumers: Any, **options: Any) -> None:
        seen.append([where for consumer in consumers for where in consumer.wants])
        harvest(model, tokens, consumers, **options)

    monkeypatch.setattr(spectra, "harvest", counting)
    return seen


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("moments/*/*.safetensors"))


def test_spectra_equal_those_of_the_rows(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    spectra = collect_spectra(tiny_llama, tiny_tokens, batch_tokens=3 * tiny_tokens.context, progress=False)
    assert len(spectra) == 4 * models.model_info(tiny_llama).n_layers
    for where, spectrum in spectra.items():
        found: list[torch.Tensor] = []
        hook = models.hook_name(tiny_llama, *where)
        models.forward(tiny_llama, tiny_tokens.ids, {hook: lambda x, found=found: found.append(x.clone())})
        rows = found[0][:, 1:].flatten(0, 1)
        direct = Spectrum.of(rows.double())
        assert spectrum.n == rows.shape[0]
        assert spectrum.effective_rank == pytest.approx(direct.effective_rank, rel=1e-4)
        torch.testing.assert_close(spectrum.covariance, direct.covariance, rtol=1e-3, atol=1e-7)


def test_a_second_call_runs_nothing_and_more_sites_run_alone(
    tiny_llama: Any, tiny_tokens: Tokens, passes: list[list[tuple[str, int]]]
) -> None:
    first = collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [0], progress=False)
    again = collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [0], progress=False)
    assert torch.equal(first["attn_out", 0].eigenvalues, again["attn_out", 0].eigenvalues)
    collect_spectra(tiny_llama, tiny_tokens, ["attn_out", "z"], [0, 1], progress=False)
    assert passes == [[("attn_out", 0)], [("z", 0), ("attn_out", 1), ("z", 1)]]


@pytest.mark.parametrize("variable", ["ASI_LENS_CACHE", "ASI_LENS_BUNDLE"])
def test_a_read_only_cache_serves_what_it_has(
    tiny_llama: Any,
    tiny_tokens: Tokens,
    own_cache: Path,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    refuse_writes: Any,
) -> None:
    asked = {"sites": ["attn_out"], "layers": [0, 1], "progress": False}
    first = collect_spectra(tiny_llama, tiny_tokens, **asked)
    grown = rank_growth(tiny_llama, tiny_tokens, steps=2, **asked)
    monkeypatch.setenv("ASI_LENS_CACHE", str(own_cache / "empty"))
    monkeypatch.setenv(variable, str(own_cache))
    refuse_writes()
    again = collect_spectra(tiny_llama, tiny_tokens, **asked)
    assert all(torch.equal(again[where].covariance, first[where].covariance) for where in first)
    assert rank_growth(tiny_llama, tiny_tokens, steps=2, **asked) == grown
    with pytest.raises(OSError, match=r"cannot write .*: Read-only file system"):
        collect_spectra(tiny_llama, tiny_tokens, ["z"], [0], progress=False)


def test_what_the_bundle_lacks_is_computed_into_the_cache(
    tiny_llama: Any,
    tiny_tokens: Tokens,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[list[tuple[str, int]]],
) -> None:
    collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [0], progress=False)
    monkeypatch.setenv("ASI_LENS_BUNDLE", str(own_cache))
    monkeypatch.setenv("ASI_LENS_CACHE", str(own_cache / "other"))
    collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [0, 1], progress=False)
    assert passes == [[("attn_out", 0)], [("attn_out", 1)]]
    assert [path.name for path in files(own_cache / "other")] == ["attn_out.1.safetensors"]


def test_other_tokens_or_options_are_other_results(
    tiny_llama: Any, tiny_tokens: Tokens, passes: list[list[tuple[str, int]]]
) -> None:
    for tokens, options in (
        (tiny_tokens, {}),
        (tiny_tokens[:2], {}),
        (tiny_tokens, {"drop_first": False}),
    ):
        collect_spectra(tiny_llama, tokens, ["attn_out"], [0], progress=False, **options)
    assert len(passes) == 3


def test_other_weights_are_another_result(
    tiny_llama: Any, tiny_tokens: Tokens, passes: list[list[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [0], progress=False)
    info = models.model_info(tiny_llama)
    monkeypatch.setattr(models, "model_info", lambda model, **_: replace(info, fingerprint="other"))
    collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [0], progress=False)
    assert len(passes) == 2


def test_an_interrupted_pass_goes_on_to_the_same_bits(
    tiny_llama: Any, tiny_tokens: Tokens, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_tokens": tiny_tokens.context, "progress": False}
    calls = []
    real = models.forward

    def interrupted(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(models, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect_spectra(tiny_llama, tiny_tokens, ["attn_out", "z"], **options)
    (partial,) = files(own_cache)
    assert partial.name.startswith("partial-")

    calls.clear()
    monkeypatch.setattr(models, "forward", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    resumed = collect_spectra(tiny_llama, tiny_tokens, ["attn_out", "z"], **options)
    assert len(calls) == len(tiny_tokens) - 2
    assert not partial.exists()

    monkeypatch.setenv("ASI_LENS_CACHE", str(own_cache / "other"))
    straight = collect_spectra(tiny_llama, tiny_tokens, ["attn_out", "z"], **options)
    for where in straight:
        assert torch.equal(resumed[where].covariance, straight[where].covariance)
        assert torch.equal(resumed[where].eigenvalues, straight[where].eigenvalues)


def test_a_pass_interrupted_inside_a_batch_saves_nothing_half_counted(
    tiny_llama: Any, tiny_tokens: Tokens, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = spectra.MomentsConsumer.consume, []

    def interrupted(self: Any, where: Any, rows: Any) -> None:
        count.append(1)
        if len(count) == 6:  # in the middle of the second batch of four pairs
            raise KeyboardInterrupt
        real(self, where, rows)

    with monkeypatch.context() as patch:
        patch.setattr(spectra.MomentsConsumer, "consume", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect_spectra(
                tiny_llama,
                tiny_tokens,
                ["attn_out", "z"],
                [0, 1],
                batch_tokens=tiny_tokens.context,
                progress=False,
            )
    assert files(own_cache) == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "other version"])
def test_a_damaged_file_is_named_not_used(
    tiny_llama: Any, tiny_tokens: Tokens, own_cache: Path, damage: str
) -> None:
    collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [0], progress=False)
    (path,) = files(own_cache)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "other version": whole.replace(b'"asi_lens_moments":"2"', b'"asi_lens_moments":"0"'),
        }[damage]
    )
    with pytest.raises(CacheError, match=path.name) as error:
        collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [0], progress=False)
    assert "delete" in str(error.value)


def test_massive_rows_are_left_out_of_spectra_and_kept_on_request(
    tiny_llama: Any, tiny_tokens: Tokens, passes: list[list[tuple[str, int]]]
) -> None:
    where, ask = ("resid_post", 0), {"sites": ["resid_post"], "layers": [0], "progress": False}
    with sinking(tiny_llama, tiny_tokens) as (sinks, out):
        rows = hooked(tiny_llama, sinks, *where).double()
        found = collect_spectra(tiny_llama, sinks, **ask)[where]
        others = collect_spectra(tiny_llama, sinks, batch_tokens=sinks.context, **ask)[where]
        whole = collect_spectra(tiny_llama, sinks, drop_massive=False, **ask)[where]
        growth = rank_growth(tiny_llama, sinks, ["resid_post"], [0], steps=2, progress=False)
    assert len(passes) == 2 + 2, "with massive rows, nothing new is computed"
    assert (found.left_out, others.left_out, whole.left_out) == (3, 3, 0)
    assert [row["n_left_out"] for row in growth] == [1, 3]
    kept = torch.ones(len(rows), dtype=torch.bool).index_fill(0, out, value=False)
    for spectrum, of in ((found, rows[kept]), (others, rows[kept]), (whole, rows)):
        direct = Spectrum.of(of)
        assert spectrum.n == len(of)
        assert spectrum.effective_rank == pytest.approx(direct.effective_rank, rel=1e-4)
    assert whole.effective_rank < 0.3 * found.effective_rank
    for of in (found.rank_with_massive, growth[-1]["rank_with_massive"]):
        assert of == pytest.approx(whole.effective_rank_fraction, rel=1e-7)  # products in float32
    assert "without 3 massive" in repr(found)


def test_a_pass_with_massive_rows_goes_on_to_the_same_bits(
    tiny_llama: Any, tiny_tokens: Tokens, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sinking(tiny_llama, tiny_tokens) as (sinks, _):
        options = {"batch_tokens": sinks.context, "progress": False}
        real, calls = models.forward, []

        def interrupted(*args: Any, **keywords: Any) -> Any:
            calls.append(1)
            if len(calls) == 9:  # after the first massive rows
                raise KeyboardInterrupt
            return real(*args, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(models, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                collect_spectra(tiny_llama, sinks, ["resid_post"], [0], **options)
        resumed = collect_spectra(tiny_llama, sinks, ["resid_post"], [0], **options)["resid_post", 0]
        monkeypatch.setenv("ASI_LENS_CACHE", str(own_cache / "other"))
        straight = collect_spectra(tiny_llama, sinks, ["resid_post"], [0], **options)["resid_post", 0]
    assert resumed.left_out == straight.left_out == 3
    assert torch.equal(resumed.covariance, straight.covariance)


def test_few_tokens_warn(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    from asi_lens.activations.spectrum import FewTokensWarning

    with pytest.warns(FewTokensWarning, match="rows per dimension"):
        collect_spectra(tiny_llama, tiny_tokens[:1], ["attn_out"], [0], progress=False)


def test_records_have_the_columns_of_the_table(tiny_llama: Any, tiny_tokens: Tokens) -> None:
    from asi_lens.results.rows import RankRow

    spectra = collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [0], progress=False)
    (row,) = [RankRow(**record) for record in spectra.records()]
    assert (row.site, row.layer, row.n_tokens) == (
        "attn_out",
        0,
        len(tiny_tokens) * (tiny_tokens.context - 1),
    )
    with pytest.raises(KeyError, match="attn_out"):
        spectra["mlp_out", 0]


def test_growth_ends_at_the_full_sample(
    tiny_llama: Any, tiny_tokens: Tokens, passes: list[list[tuple[str, int]]]
) -> None:
    options = {"batch_tokens": tiny_tokens.context, "progress": False}
    records = rank_growth(tiny_llama, tiny_tokens, ["attn_out"], [1], steps=3, **options)
    sizes = [
        len(tokens) * (tiny_tokens.context - 1)
        for tokens in (tiny_tokens[: len(tiny_tokens) >> k] for k in (2, 1, 0))
    ]
    assert [r["n_tokens"] for r in records] == sizes
    full = collect_spectra(tiny_llama, tiny_tokens, ["attn_out"], [1], **options)["attn_out", 1]
    assert records[-1]["effective_rank"] == pytest.approx(full.effective_rank, rel=1e-9)
    before = len(passes)
    assert rank_growth(tiny_llama, tiny_tokens, ["attn_out"], [1], steps=3, **options) == records
    assert len(passes) == before
    with pytest.raises(OptionError, match="steps="):
        rank_growth(tiny_llama, tiny_tokens, ["attn_out"], [1], steps=1)


def test_dropout_and_autocast_of_the_caller_change_nothing(plain: Any, tmp_path: Path) -> None:
    """Both had been in the numbers, and stayed in the cache."""
    model = plain("esm")
    for layer in model.source.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.5
    inputs = load_inputs(small_plain.sequences(), model, n_rows=40)
    options: dict[str, Any] = {"sites": ["attn_out"], "layers": [1], "progress": False}
    found = []
    for mode in ("train", "autocast", "as it is"):
        model.train(mode == "train")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            found.append(collect_spectra(model, inputs, **options)["attn_out", 1].covariance)
        assert model.training == (mode == "train")
        for path in files(tmp_path):
            path.unlink()
    assert all(torch.equal(one, found[0]) for one in found)
    model.eval()
