"""Sequences to ids: residues are rows, special tokens and padding are not and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small_plain
import torch
from small_plain import LETTERS

import asi_lens as al
from asi_lens.base.errors import DataError
from asi_lens.inputs import models, sequences

pytestmark = pytest.mark.model_facing

KINDS = ("bert-model", "bert-masked", "distilbert", "esm")


@pytest.mark.parametrize("kind", KINDS)
def test_residues_are_rows(kind: str, plain: Any) -> None:
    lengths = (12, 7, 20, 15)
    inputs = al.load_inputs(small_plain.sequences(lengths), plain(kind))
    assert inputs.context == 22, "the longest, [CLS] and [SEP]"
    assert inputs.kept.sum(1).tolist() == list(lengths)
    assert not inputs.kept[:, 0].any()
    first = [5 + LETTERS.index(letter) for letter in small_plain.sequences(lengths)[0]]
    assert inputs.arrays["input_ids"][0].tolist() == [1, *first, 2] + [0] * 8
    assert inputs.arrays["attention_mask"].sum(1).tolist() == [length + 2 for length in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_row(kind: str, plain: Any) -> None:
    model, texts = plain(kind), small_plain.sequences((30, 6, 9))
    inputs = al.load_inputs(texts, model)
    hook = models.hook_name(model, "resid_post", 2)
    found: list[torch.Tensor] = []
    models.forward(model, inputs.batch(slice(None)), {hook: lambda x: found.append(x.clone())})
    ids = inputs.arrays["input_ids"][1:2, : 6 + 2]
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    models.forward(model, alone, {hook: lambda x: found.append(x.clone())})
    torch.testing.assert_close(found[0][1][inputs.kept[1]], found[1][0, 1:-1], rtol=1e-4, atol=1e-4)


def test_unknown_residues_are_named(plain: Any) -> None:
    with pytest.raises(DataError, match=r"sequence 1 has residues that the model does not know: 'J', 'x'"):
        al.load_inputs(["ACD" * 9, "AJCxJ"], plain("esm"))
    with pytest.raises(DataError, match="sequence 0 is empty"):
        al.load_inputs([" "], plain("esm"))
    with pytest.raises(DataError, match=r"sequence 0 has 42 tokens; the model takes 40"):
        al.load_inputs(["A" * 40], plain("esm"))


def test_files_hold_a_sequence_a_line_or_fasta(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ACDEFGHIKL\n\nMNPQRSTVWY\n")
    (tmp_path / "b.fasta").write_text(">one\nACDEF\nGHIKL\n>two\nMNPQRSTVWY\n>empty\n")
    found = [text for _, text in sequences.open_sequences(sorted(tmp_path.iterdir()))]
    assert found == ["ACDEFGHIKL", "MNPQRSTVWY"] * 2
    assert al.load_inputs(tmp_path, plain("esm")).n_rows == 40
    assert al.load_inputs(tmp_path, plain("esm"), offset=1).n_rows == 30
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"c\.txt holds no sequences that can be read"):
        al.load_inputs(tmp_path, plain("esm"))
