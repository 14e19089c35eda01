"""Small tokenizers of one text: any text goes through, the same text gives the same tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.inputs import small_tokenizer as module
from asi_lens.inputs.corpora import load_tokens
from asi_lens.inputs.small_tokenizer import small_tokenizer

TEXTS = [f"the cat number {i} sat on the mat, the dog on the log; naïve № {i * 7}\n" * 3 for i in range(40)]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))


def test_any_text_goes_through() -> None:
    tokenizer = small_tokenizer(TEXTS, 300)
    assert len(tokenizer) == 300
    for text in ("the cat sat", "東京 🙂\t\x00 <|end|> ÿ", TEXTS[3]):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    assert len(tokenizer("the cat the mat")["input_ids"]) < 8, "merges were learned"


def test_sequences_begin_with_the_token_that_ends_documents() -> None:
    tokenizer = small_tokenizer(TEXTS, 300)
    tokens = load_tokens(TEXTS, tokenizer, 640, context=32)
    assert (tokens.ids[:, 0] == tokenizer.eos_token_id).all()
    assert (tokens.ids[:, 1:] == tokenizer.eos_token_id).any(), "documents end"
    assert int(tokens.ids.max()) < 300


def test_it_is_learned_once_from_the_beginning_of_the_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "_CHARACTERS", 2_000)
    vocab = small_tokenizer(TEXTS, 300).get_vocab()
    assert small_tokenizer([*TEXTS[:20], "zzzz " * 500], 300).get_vocab() == vocab, "the rest is not read"
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "other"))
    assert small_tokenizer(TEXTS, 300).get_vocab() == vocab, "learned anew, the same"
    monkeypatch.setattr(module, "_fill", None)
    assert small_tokenizer(TEXTS, 300).get_vocab() == vocab, "from the cache"


def test_streams_do_not_share_a_tokenizer() -> None:
    from datasets import IterableDataset

    texts = [TEXTS, [text.replace("cat", "unicorn").replace("mat", "cloud") for text in TEXTS]]
    streams = [
        IterableDataset.from_generator(lambda one=one: ({"text": text} for text in one)) for one in texts
    ]
    first, second = (small_tokenizer(stream, 300).get_vocab() for stream in streams)
    assert first != second
    assert [first, second] == [small_tokenizer(one, 300).get_vocab() for one in texts]


def test_bad_options_and_short_texts() -> None:
    with pytest.raises(OptionError, match=r"vocab=256 .* at least 257"):
        small_tokenizer(TEXTS, 256)
    with pytest.raises(DataError, match=r"too short for vocab=400: .* merges for 2\d\d tokens"):
        small_tokenizer(["ab ab"], 400)
    with pytest.raises(UnknownNameError, match="unknown corpus"):
        small_tokenizer("news-xx", 300)
