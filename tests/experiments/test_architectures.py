"""architectures.py: parts of the data have no item in common; W_O is changed on the first."""

from __future__ import annotations

from typing import Any

import pytest
import small_plain

import asi_lens as al
from asi_lens.base.errors import OptionError
from asi_lens.collapse.output_projection import counterfactual_records
from asi_lens.experiments.architectures import measure

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
