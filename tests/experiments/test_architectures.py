"""architectures.py: parts of the data have no item in common; W_O is changed on the first."""

from __future__ import annotations

from typing import Any

import pytest
import small_plain

import asi_lens as al
from asi_lens.base.errors import OptionError
from asi_lens.collapse.output_projection import counterfactual_records
from asi_lens.experiments.architectures import cross_sites, joined, measure, overview, stores
from asi_lens.results.rows import RankRow, frame

pytestmark = [pytest.mark.model_facing, pytest.mark.filterwarnings("ignore:.*rows for width")]


def test_parts_are_measured_apart(plain: Any) -> None:
    model = plain("vit")
    data = al.load_inputs(small_plain.pictures(7), model, name="own")
    found = measure(model, data, 3, draws=1, seed=5)
    for part, items in enumerate((slice(0, 2), slice(2, 4), slice(4, 6)), start=1):
        expected = al.collect_spectra(model, data[items])
        rows = [row for row in found.ranks if row["corpus"] == f"own, part {part}"]
        assert [{**row, "corpus": "own"} for row in rows] == expected.records()
    assert len({row["corpus"] for row in found.ranks}) == 3
    first = counterfactual_records(model, al.collect_spectra(model, data[:2]), draws=1, seed=5)
    assert found.projections == [{**row, "corpus": "own, part 1"} for row in first]
    assert {row["corpus"] for row in found.overlaps} == {"own, part 1"}
    with pytest.raises(OptionError, match="parts=8"):
        measure(model, data, parts=8, draws=1, seed=0)


def test_text_too(tiny_llama: Any, tiny_tokens: Any) -> None:
    found = measure(tiny_llama, tiny_tokens, 2, draws=1, seed=0)
    assert {row["corpus"] for row in found.ranks} == {"random, part 1", "random, part 2"}
    assert found.cross_projections == found.cross_overlaps == []


@pytest.fixture
def spoken(plain: Any) -> tuple[Any, Any]:
    """A decoder, and clips with texts for it."""
    model = plain("whisper", "decoder")
    texts = ("abc de", "fgh", "hello you", "words")
    clips = [(*clip, text) for clip, text in zip(small_plain.clips((1.0,) * 4), texts, strict=True)]
    return model, al.load_inputs(clips * 2, model, name="told")


def test_a_decoders_cross_attention_is_measured_apart(spoken: tuple[Any, Any]) -> None:
    model, data = spoken
    assert cross_sites(model) == ["cross_attn_out", "cross_z"]
    found = measure(model, data, 2, draws=1, seed=5)
    assert {row["site"] for row in found.ranks} == {*al.SITES, *cross_sites(model)}
    spectra = al.collect_spectra(model, data[:4], ["z", "cross_z"])
    for site, rows in (("z", found.projections), ("cross_z", found.cross_projections)):
        expected = counterfactual_records(model, spectra, draws=1, seed=5, site=site)
        assert rows == [{**row, "corpus": "told, part 1"} for row in expected]
    ranks = {row["site"]: row for row in found.ranks if row["corpus"] == "told, part 1" and row["layer"] == 1}
    made = {
        row["variant"]: row["effective_rank_fraction"] for row in found.cross_projections if row["layer"] == 1
    }
    for variant, site in (("z", "cross_z"), ("attn_out", "cross_attn_out")):
        assert made[variant] == pytest.approx(ranks[site]["effective_rank_fraction"], rel=1e-3)
    assert found.overlaps != found.cross_overlaps
    assert len(found.overlaps) == len(found.cross_overlaps)


def test_dictionaries_of_a_decoder_are_trained_at_both_attentions(
    spoken: tuple[Any, Any], plain: Any
) -> None:
    model, data = spoken
    pairs = stores(model, data[:5], data[5:], "attn_out", 0.5, 1.0)
    places = [(one.metadata["site"], one.metadata["layer"]) for one, _ in pairs]
    assert places == [("attn_out", 1), ("cross_attn_out", 1)]
    for train, held_out in pairs:
        assert (len(train), len(held_out)) == (data[:5].n_rows, data[5:].n_rows)
    encoder = plain("whisper")
    clips = al.load_inputs(small_plain.clips((1.0,) * 2), encoder)
    assert len(stores(encoder, clips[:1], clips[1:], "attn_out", 0.5, 1.0)) == 1


def test_rows_of_several_models_are_told_together(spoken: tuple[Any, Any], plain: Any) -> None:
    model, data = spoken
    vit = plain("vit")
    each = [
        measure(vit, al.load_inputs(small_plain.pictures(4), vit), 2, draws=1, seed=0),
        measure(model, data, 2, draws=1, seed=0),
    ]
    found = joined(each)
    assert found.ranks == each[0].ranks + each[1].ranks
    assert found.cross_overlaps == each[1].cross_overlaps
    table = overview(frame([RankRow(**row) for row in found.ranks]))
    per = table.rows_per_direction[str(found.ranks[-1]["model"]), "attn_out"]
    assert per == pytest.approx(data.n_rows / 2 / small_plain.D_MODEL, rel=0.1)
