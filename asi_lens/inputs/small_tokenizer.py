"""A small byte-pair tokenizer trained on one text, for models that are trained from nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from asi_lens.base.cache import cached_folder
from asi_lens.base.errors import DataError, require_whole
from asi_lens.base.files import cache_key, file_name
from asi_lens.base.paths import cached
from asi_lens.inputs.documents import Corpus, open_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 1
_FILE = "tokenizer.json"
# The only special token: it ends a document, and begins a sequence.
_END = "<|end|>"
# The first characters of a text, which the vocabulary is learned from.
_CHARACTERS = 1_000_000


def small_tokenizer(source: Any, vocab: int) -> PreTrainedTokenizerFast:
    """Return a byte-level byte-pair tokenizer of `vocab` tokens for `load_tokens`.

    Its merges are learned from the first million characters of `source` (as `load_tokens` takes it). The 256
    bytes are tokens, so any text can be written. The tokenizer is cached, unless the text is a stream, whose
    content is not known before it is read.

    Raises OptionError for fewer than 257 tokens, DataError for a text that is too short for as many merges,
    and the errors of `open_corpus`.
    """
    require_whole("vocab", vocab, 257)
    corpus = open_corpus(source)
    if corpus.fingerprint is None:
        with TemporaryDirectory() as once:
            _fill(Path(once), corpus, vocab)
            return _read(Path(once))
    about = {"format": _FORMAT, "corpus": corpus.fingerprint, "vocab": vocab, "characters": _CHARACTERS}
    folder = cached("tokenizers", file_name(corpus.name[:60], vocab, key=cache_key(**about)))
    cached_folder(folder, about, lambda path: _fill(path, corpus, vocab), f"Delete {folder} and run again.")
    return _read(folder)


def _read(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(folder / _FILE), eos_token=_END)


def _fill(folder: Path, corpus: Corpus, vocab: int) -> dict[str, Any]:
    """Learn the merges and write `tokenizer.json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(corpus), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab:
        raise DataError(
            f"{corpus.name} is too short for vocab={vocab:,}: its first {_CHARACTERS:,} characters have "
            f"merges for {found:,} tokens"
        )
    tokenizer.save(str(folder / _FILE))
    return {}


def _first(corpus: Corpus) -> Iterator[str]:
    """Yield documents up to the number of characters that the vocabulary is learned from."""
    left = _CHARACTERS
    for document in corpus.documents():
        yield document[:left]
        left -= len(document)
        if left <= 0:
            return
