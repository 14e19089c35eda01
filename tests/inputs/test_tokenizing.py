"""tokenizing.py: first and separating tokens as the tokenizer has them; fingerprints follow changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from asi_lens.base.errors import DataError
from asi_lens.inputs.corpora import load_tokens
from asi_lens.inputs.models import load_model
from asi_lens.inputs.tokenizing import fingerprint, special_id

LETTERS = "abcdefgh"


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def words_tokenizer(*special: str, **named: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*special, *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0] if special else "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def model_with(tokenizer: Any, folder: Path, architecture: str = "llama") -> Any:
    tiny_models.build(architecture, folder)
    for path in folder.glob("*token*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    return load_model(folder, dtype="float32", device="cpu")


@pytest.mark.model_facing
def test_a_bert_begins_with_cls_and_separates_by_sep(tmp_path: Path) -> None:
    model = model_with(bert_tokenizer(), tmp_path / "bert", "bert")
    texts = ["abc def", "fgh abc"]
    found = load_tokens(texts, model, n_tokens=16, context=8).ids
    assert found.tolist() == load_tokens(texts, bert_tokenizer(), n_tokens=16, context=8).ids.tolist()
    assert found[:, 0].tolist() == [2, 2]
    assert found[0, 7] == 3
    assert 1 not in found


@pytest.mark.model_facing
@pytest.mark.parametrize(
    ("tokenizer", "start", "end"),
    [
        (lambda: words_tokenizer("<s>", bos_token="<s>"), 0, 0),  # the end is invented: as without it
        (lambda: words_tokenizer("u", "</s>", unk_token="u", eos_token="</s>"), 1, 1),
        (lambda: words_tokenizer("<|endoftext|>", eos_token="<|endoftext|>"), 0, 0),  # its own
        (lambda: words_tokenizer("u", "C", "S", unk_token="u", cls_token="C", sep_token="S"), 1, 2),
    ],
)
def test_tokens_that_a_library_invents_are_not_used(
    tmp_path: Path, tokenizer: Callable[[], Any], start: int, end: int
) -> None:
    model = model_with(tokenizer(), tmp_path / "model")
    found = load_tokens(["a b", "c"], model, n_tokens=5, context=5).ids[0]
    assert (found[0].item(), found[3].item()) == (start, end)


@pytest.mark.model_facing
@pytest.mark.parametrize("named", [{}, {"unk_token": "u"}])
def test_without_a_token_to_begin_or_separate_it_is_an_error(tmp_path: Path, named: dict[str, str]) -> None:
    model = model_with(words_tokenizer("u", "v", **named), tmp_path / "model")
    with pytest.raises(DataError, match="no token to put between documents; set its eos_token"):
        load_tokens(["a b", "c"], model, n_tokens=4, context=4)
    model.tokenizer.eos_token = "v"  # named by the user
    assert load_tokens(["a b", "c"], model, n_tokens=4, context=4).ids[0].tolist()[::3] == [1, 1]


@pytest.mark.parametrize("others", [{}, {"bos_token": "a", "pad_token": "b"}])
@pytest.mark.parametrize("added", [False, True])
def test_an_end_that_the_user_has_named_is_used(others: dict[str, str], added: bool) -> None:
    end = "<|endoftext|>"
    tokenizer = words_tokenizer("u", *([] if added else [end]), unk_token="u", **others)
    if added:
        tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.eos_token = end
    if added and others:  # as TransformerLens leaves it
        assert special_id(tokenizer, "eos") is None
        return
    found = load_tokens(["a b", "c"], tokenizer, n_tokens=5, context=5).ids[0]
    assert found[3] == tokenizer.eos_token_id == tokenizer.get_vocab()[end]
    assert found[0] == (tokenizer.bos_token_id if others else tokenizer.eos_token_id)


@pytest.mark.model_facing
def test_a_librarys_end_is_used_if_it_is_of_the_vocabulary(tmp_path: Path) -> None:
    model = model_with(words_tokenizer("u", "<|endoftext|>", unk_token="u"), tmp_path / "model")
    assert load_tokens(["a b", "c"], model, n_tokens=4, context=4).ids[0].tolist()[::3] == [1, 1]


def test_a_row_needs_a_first_token() -> None:
    tokenizer = words_tokenizer("u", "S", unk_token="u", sep_token="S")
    with pytest.raises(DataError, match="no token to begin a sequence with"):
        load_tokens(["a b"], tokenizer, n_tokens=2, context=2)
    assert load_tokens(["a b"], tokenizer, n_tokens=3, context=3, prepend_bos=False).ids[0, 2] == 1


def test_a_token_that_is_not_in_the_vocabulary_is_none() -> None:
    tokenizer = words_tokenizer("u", unk_token="u")
    tokenizer.bos_token = "<nowhere>"
    assert tokenizer.bos_token_id == 0
    assert special_id(tokenizer, "bos") is None
    tokenizer.bos_token = "u"  # some tokenizers (GPT-2's) have one token for all
    assert special_id(tokenizer, "bos") == 0


def _lowercase(tokenizer: Any) -> None:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _bytes(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("b")


def _post(tokenizer: Any) -> None:
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])


def _swapped(tokenizer: Any) -> None:
    from tokenizers import models

    vocabulary = tokenizer.get_vocab()
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token="<s>")


def _own_code(tokenizer: Any) -> None:
    own = tokenizer._encode_plus
    tokenizer._encode_plus = lambda text, **options: own([one.lower() for one in text], **options)


@pytest.mark.parametrize("change", [_lowercase, _bytes, _post, _swapped, _own_code])
def test_a_change_in_place_changes_the_fingerprint(change: Callable[[Any], None]) -> None:
    tokenizer = words_tokenizer("<s>", bos_token="<s>")
    size, before = len(tokenizer), fingerprint(tokenizer)
    assert fingerprint(tokenizer) == before == fingerprint(words_tokenizer("<s>", bos_token="<s>"))
    change(tokenizer)
    assert len(tokenizer) == size
    assert fingerprint(tokenizer) != before


def test_a_change_in_place_gives_new_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    tokenizer = words_tokenizer("<s>", bos_token="<s>")
    asked: dict[str, Any] = {"n_tokens": 3, "context": 3}
    assert load_tokens(["A b"], tokenizer, **asked).ids[0].tolist() == [0, 0, 2]
    _lowercase(tokenizer)
    assert load_tokens(["A b"], tokenizer, **asked).ids[0].tolist() == [0, 1, 2]
    tokenizer.add_tokens(["A"])
    tokenizer.backend_tokenizer.normalizer = None
    assert load_tokens(["A b"], tokenizer, **asked).ids[0].tolist() == [0, 9, 2]


def test_an_added_token_of_other_rules_changes_the_fingerprint() -> None:
    from tokenizers import AddedToken

    found = set()
    for options in ({}, {"lstrip": True}, {"single_word": True}, {"normalized": False}):
        tokenizer = words_tokenizer("<s>", bos_token="<s>")
        tokenizer.add_tokens([AddedToken("abc", **options)])
        found.add(fingerprint(tokenizer))
    assert len(found) >= 3


def test_attributes_of_a_python_tokenizer_change_the_fingerprint() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert getattr(tokenizer, "backend_tokenizer", None) is None
    before = fingerprint(tokenizer)
    tokenizer("some use")
    assert fingerprint(tokenizer) == before == fingerprint(ByT5Tokenizer())
    tokenizer.cls_token = "x"
    changed = fingerprint(tokenizer)
    assert changed != before
    tokenizer.rules = {"lower": {"b", "a"}}
    assert fingerprint(tokenizer) not in (before, changed)
