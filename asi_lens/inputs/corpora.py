"""Text to packed tokens: `load_tokens`.

Documents are tokenised without special tokens. An end-of-sequence token follows each document, and the
resulting stream is cut into rows of `context` tokens. With `prepend_bos`, position 0 of a row is the
beginning-of-sequence token and the text fills the other `context - 1` positions. Row i of a corpus does not
depend on the number of requested rows, so `offset` gives text that is in no earlier row.

Packed tokens are cached. A cache file that is truncated, changed or from another version raises CacheError
naming the file to delete; such a file is never read in part or replaced without asking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from asi_lens.base.doors import checked
from asi_lens.base.errors import CacheError, DataError, OptionError, require
from asi_lens.base.facts import facts_html
from asi_lens.base.files import cache_key, file_name, locked
from asi_lens.base.paths import cached
from asi_lens.base.safetensors_io import read_tensors, save_tensors
from asi_lens.inputs.documents import Corpus, corpus_names, open_corpus
from asi_lens.inputs.tokenizing import Packing, special_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Tokens", "corpus_names", "load_tokens"]

_FORMAT = "1"
_PIECE = 1 << 18
"""Characters of a document tokenised at once, which bounds the memory for documents of any length."""
_BATCH = 1 << 20
"""Characters tokenised per call."""


@checked
@dataclass(frozen=True, eq=False)
class Tokens:
    """Packed token ids and their origin. `tokens[a:b]` are sequences a to b."""

    ids: Int[Tensor, "sequence position"]
    """int64, on the CPU."""
    corpus: str
    """Name of the corpus, for tables and figures."""
    tokenizer: str
    """Class and fingerprint of the tokenizer."""
    context: int
    """Positions per sequence."""
    bos: bool = True
    """Whether position 0 of every sequence is the beginning-of-sequence token."""
    content: str = ""
    """Fingerprint of the corpus that the rows were taken from; "" if not known."""

    def __post_init__(self) -> None:
        require(
            self.ids.ndim == 2 and self.ids.shape[1] == self.context,
            "ids",
            tuple(self.ids.shape),
            f"of shape (sequence, {self.context})",
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the ids and of what position 0 is, computed anew at every call."""
        digest = hashlib.sha256(self.ids.to("cpu", torch.int32).contiguous().numpy().tobytes())
        digest.update(f"{self.context} {self.bos}".encode())
        return digest.hexdigest()[:16]

    @property
    def n_tokens(self) -> int:
        """Number of all positions, BOS included."""
        return self.ids.numel()

    def __len__(self) -> int:
        """Number of sequences."""
        return self.ids.shape[0]

    def __getitem__(self, rows: slice) -> Tokens:
        """Return a slice of the sequences, with its own fingerprint."""
        if not isinstance(rows, slice):
            raise OptionError(f"tokens[{rows!r}]: take sequences by a slice, tokens[:8], or use tokens.ids")
        return Tokens(self.ids[rows], self.corpus, self.tokenizer, self.context, self.bos, self.content)

    def _repr_html_(self) -> str:
        facts = {
            "sequences x context": f"{len(self):,} x {self.context:,}",
            "tokens": self.n_tokens,
            "position 0": "the beginning-of-sequence token" if self.bos else "text",
            "different tokens": len(self.ids.unique()),
            "first ids": ", ".join(map(str, self.ids[:1].flatten()[:12].tolist())) or None,
            "tokenizer": self.tokenizer,
            "fingerprint": self.fingerprint,
        }
        return facts_html(f"Tokens of {self.corpus}", facts)

    def batches(self, batch_size: int) -> Iterator[Int[Tensor, "batch position"]]:
        """Yield the ids in order, `batch_size` sequences at a time; the last batch may be smaller."""
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        for start in range(0, len(self), batch_size):
            yield self.ids[start : start + batch_size]


@checked
def load_tokens(
    source: Any,
    model_or_tokenizer: Any,
    n_tokens: int,
    *,
    context: int = 256,
    prepend_bos: bool = True,
    seed: int | None = None,
    column: str = "text",
    split: str = "train",
    name: str | None = None,
    offset: int = 0,
) -> Tokens:
    """Return text packed into sequences of token ids.

    Args:
        source: a packaged corpus (`corpus_names()`), a `.txt`, `.md`, `.py`, `.csv`, `.jsonl` or `.parquet`
            file, a folder of such files, a hub dataset "owner/name" or "owner/name@revision" (streamed), a
            `datasets` object, or a list of strings. `asi_lens.inputs.documents` defines a document.
        model_or_tokenizer: a model from `load_model`, or a Hugging Face tokenizer. `context` is checked
            against the context length of a model.
        n_tokens: total number of positions, BOS included; rounded down to whole sequences.
        context: positions per sequence.
        prepend_bos: start every sequence with the tokenizer's BOS (else its EOS, else its CLS) token.
        seed: shuffles the documents (a hub stream through a buffer of 10,000); None keeps their order.
        column: column of a table that holds the text.
        split: split of a hub dataset.
        name: configuration of a hub dataset.
        offset: number of sequences to skip first. Rows [0, n) and rows from offset n on share no text
            position, so they can be a training set and a held-out set (same corpus, context and seed).

    Returns:
        Tokens with ids of shape (n_tokens // context, context).

    Raises:
        DataError: the corpus has fewer tokens than requested (the error states how many), no text, bytes that
            are not UTF-8, or text of which the tokenizer does not know half.
        OptionError: an argument out of range, a context longer than the model's.
        UnknownNameError: an unknown corpus, column or split.
        FetchError, CacheError, OSError: from downloads and the cache.
    """
    tokenizer, limit, d_vocab = _tokenizer_and_limits(model_or_tokenizer)
    context = _integer("context", context, 1 + prepend_bos)
    require(context <= limit, "context", context, f"at most {limit:,}, the longest that the model takes")
    n_tokens = _integer("n_tokens", n_tokens, context, " (one sequence)")
    offset = _integer("offset", offset, 0)
    seed = None if seed is None else _integer("seed", seed, 0)
    corpus = open_corpus(source, column=column, split=split, name=name)
    packing = Packing(tokenizer, context, prepend_bos)
    rows = n_tokens // context
    pack = partial(_pack, corpus, packing, rows, offset, seed)

    if corpus.fingerprint is None:
        ids = pack()
    else:
        key = cache_key(
            format=_FORMAT,
            corpus=corpus.fingerprint,
            column=column,
            tokenizer=packing.tokenizer_name,
            context=context,
            start=packing.start,
            end=packing.end,
            rows=rows,
            offset=offset,
            seed=seed,
        )
        path = cached("corpora", f"{file_name(corpus.name[:60], key=key)}.safetensors")
        ids = _cached(path, key, pack)
    if d_vocab is not None and int(ids.max()) >= d_vocab:
        raise DataError(f"the tokenizer gives token {int(ids.max())}, but the model knows {d_vocab} tokens")
    _require_known_text(ids[:, prepend_bos:], packing, corpus.name)
    return Tokens(
        torch.from_numpy(ids.astype(np.int64)),
        corpus.name,
        packing.tokenizer_name,
        context,
        bos=prepend_bos,
        content=corpus.fingerprint or "",
    )


def _require_known_text(ids: np.ndarray, packing: Packing, corpus: str) -> None:
    """Raise DataError if most ids stand for text that the tokenizer does not know: nothing could be read."""
    unknown = special_id(packing.tokenizer, "unk")
    if unknown in (None, packing.start, packing.end):  # GPT-2 has one token for all three, and knows all text
        return
    share = float((ids == unknown).mean())
    if share > 0.5:
        raise DataError(
            f"{share:.0%} of the tokens of {corpus} are {packing.tokenizer.unk_token!r}: the tokenizer does "
            "not know this text, so the model cannot read it"
        )


def _integer(key: str, value: Any, least: int, why: str = "") -> int:
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else least - 1
    require(number >= least, key, value, f"an integer >= {least}{why}")
    return number


def _tokenizer_and_limits(given: Any) -> tuple[PreTrainedTokenizerBase, int, int | None]:
    """Return (tokenizer, longest context, size of a model's vocabulary; None for a tokenizer)."""
    from transformers import PreTrainedTokenizerBase

    if isinstance(given, PreTrainedTokenizerBase):
        return given, int(given.model_max_length), None
    if not isinstance(given, torch.nn.Module):
        raise OptionError(
            f"{type(given).__name__} is not allowed here; give a model (load_model(...)) or a Hugging Face "
            "tokenizer"
        )
    from asi_lens.inputs import models

    info = models.model_info(given, fingerprint=False)
    return models.tokenizer_of(given), info.n_ctx, info.d_vocab


def _pieces(document: str) -> Iterator[str]:
    """Yield the document in pieces of bounded length, cut after a line end or before a space if possible."""
    start = 0
    while len(document) - start > _PIECE:
        stop = start + _PIECE
        line = document.rfind("\n", start + _PIECE // 2, stop)
        space = document.rfind(" ", start + _PIECE // 2, stop)
        cut = line + 1 if line >= 0 else space if space >= 0 else stop
        yield document[start:cut]
        start = cut
    yield document[start:]


def _pack(corpus: Corpus, packing: Packing, rows: int, offset: int, seed: int | None) -> np.ndarray:
    """Return int32 ids [rows context] from as many documents as needed."""
    from tqdm import tqdm

    needed = (offset + rows) * packing.text
    parts: list[np.ndarray] = []
    total = n_documents = 0
    with tqdm(total=needed, unit="tok", unit_scale=True, desc=f"tokenizing {corpus.name}", delay=2) as bar:
        for texts, ends in _batches(corpus.documents(seed)):
            for ids, end in zip(packing.encode(texts), ends, strict=True):
                parts.append(np.asarray([*ids, packing.end] if end else ids, dtype=np.int32))
                total += len(parts[-1])
                n_documents += end
            bar.update(min(total, needed) - int(bar.n))
            if total >= needed:
                break
    if not total:
        raise DataError(f"{corpus.name} holds no text")
    if total < needed:
        there = total // packing.text
        raise DataError(
            f"{corpus.name} has {n_documents:,} documents, {total:,} tokens with this tokenizer: {there:,} "
            f"sequences of {packing.context}, that is n_tokens={there * packing.context:,} at most; asked "
            f"for {rows:,} sequences (n_tokens={rows * packing.context:,})"
            + (f" after skipping {offset:,}" if offset else "")
            + ". Text is never repeated."
        )
    stream = np.concatenate(parts)[offset * packing.text : needed].reshape(rows, packing.text)
    if packing.start is None:
        return stream
    return np.concatenate([np.full((rows, 1), packing.start, np.int32), stream], axis=1)


def _batches(documents: Iterator[str]) -> Iterator[tuple[list[str], list[bool]]]:
    """Yield (texts, whether each text ends its document), about `_BATCH` characters at a time."""
    texts: list[str] = []
    ends: list[bool] = []
    size = 0
    for document in documents:
        pieces = list(_pieces(document))
        for number, piece in enumerate(pieces, 1):
            texts.append(piece)
            ends.append(number == len(pieces))
            size += len(piece)
            if size >= _BATCH:
                yield texts, ends
                texts, ends, size = [], [], 0
    if texts:
        yield texts, ends


def _cached(path: Path, key: str, pack: Callable[[], np.ndarray]) -> np.ndarray:
    """Return the cached ids; the first call caches the ids that `pack` returns."""
    about = {"format": _FORMAT, "key": key}
    if not path.exists():  # checked before the lock, as the cache may be read-only
        with locked(path):
            if not path.exists():
                ids = pack()
                save_tensors(path, {"ids": torch.from_numpy(ids)}, {**about, "sha256": _sha256(ids)})
    repair = "delete the file and run again to tokenise anew"
    tensors, found = read_tensors(path, CacheError, repair, ["ids"], about)
    ids = tensors["ids"].numpy()
    if _sha256(ids) != found.get("sha256"):
        raise CacheError(f"{path} was changed since it was written; {repair}")
    return ids


def _sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()
