"""Sequences (proteins, for example) to token ids, made by the model's own tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from asi_lens.base.errors import DataError, UnsupportedModelError
from asi_lens.inputs import models
from asi_lens.inputs.loading import REVISIONS
from asi_lens.inputs.media_items import Made, label
from asi_lens.inputs.plain import PlainModel

# A bridge's own tokenizer is not the folder's: TransformerLens takes the special tokens out of it.
_OWN: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def open_sequences(items: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield (name for errors, sequence).

    An item is a text, or a file with a sequence a line (in FASTA, the lines after a `>` are one sequence).
    Raises DataError for anything else.
    """
    for number, item in enumerate(items):
        if isinstance(item, Path):
            try:
                lines = item.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{item} holds no sequences that can be read: {error}") from error
            yield from ((f"{item}, sequence {i}", one) for i, one in enumerate(_in_file(lines)))
        elif isinstance(item, str):
            yield label("sequence", number, item), item.strip()
        else:
            raise DataError(f"sequence {number} is no text: a {type(item).__name__}")


def _in_file(lines: list[str]) -> Iterator[str]:
    lines = [line.strip() for line in lines]
    if not any(line.startswith(">") for line in lines):
        yield from filter(None, lines)
        return
    parts: list[str] = []
    for line in [*lines, ">"]:
        if line.startswith(">"):
            if parts:
                yield "".join(parts)
            parts = []
        else:
            parts.append(line)


def made(model: nn.Module, items: Iterable[Any], offset: int = 0) -> Iterator[Made]:
    """Yield each sequence's ids and attention mask; special tokens ([CLS], [SEP] ...) are not rows.

    A vocabulary of single letters is given the letters one by one. Raises DataError for an unknown residue,
    an empty sequence, and one that is longer than the model's context.
    """
    tokenizer = tokenizer_of(model)
    limit = models.model_info(model, fingerprint=False).n_ctx
    for name, text in itertools.islice(open_sequences(items), offset, None):
        if not text:
            raise DataError(f"{name} is empty")
        ids, special = _encoded(tokenizer, text)
        if tokenizer.unk_token_id in ids:
            ids, special = _encoded(tokenizer, " ".join(text))
        if tokenizer.unk_token_id in ids:
            raise DataError(f"{name} has residues that the model does not know: {_unknown(tokenizer, text)}")
        if len(ids) > limit:
            raise DataError(f"{name} has {len(ids)} tokens; the model takes {limit}")
        kept = torch.tensor(special) == 0
        if not bool(kept.any()):
            raise DataError(f"{name} has no tokens but special ones")
        yield Made({"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids)).long()}, kept)


def tokenizer_of(model: nn.Module) -> Any:
    """Return the tokenizer as the model's folder or revision has it, with its special tokens.

    Raises UnsupportedModelError for a model without one.
    """
    if isinstance(model, PlainModel):
        return models.tokenizer_of(model)
    if model not in _OWN:
        from transformers import AutoTokenizer

        source: Any = getattr(model, "original_model", None)
        try:
            _OWN[model] = AutoTokenizer.from_pretrained(source.name_or_path, revision=REVISIONS.get(model))
        except (AttributeError, OSError, ValueError) as error:
            name = models.model_info(model, fingerprint=False).name
            raise UnsupportedModelError(f"the tokenizer of {name!r} cannot be read again: {error}") from error
    return _OWN[model]


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return ids with special tokens, and 1 for each special token."""
    found = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    ids, special = list(found["input_ids"]), list(found["special_tokens_mask"])
    unknown = tokenizer.unk_token_id
    return ids, [0 if one == unknown else flag for one, flag in zip(ids, special, strict=True)]


def _unknown(tokenizer: Any, text: str) -> str:
    bad = [
        letter for letter in dict.fromkeys(text) if tokenizer.unk_token_id in _encoded(tokenizer, letter)[0]
    ]
    return ", ".join(repr(letter) for letter in bad[:5]) or repr(text[:20])
