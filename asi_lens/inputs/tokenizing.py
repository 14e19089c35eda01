"""How text becomes token ids: a tokenizer, its first and separating tokens, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asi_lens.base.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# TransformerLens gives this end-of-sequence token to a tokenizer that has none, and takes it as the beginning
# of a sequence, too. The id is then the unknown token's, or a new one that no model was trained on.
_INVENTED = "<|endoftext|>"
# Text of many kinds. Its ids belong to the fingerprint: they change with Python code in a tokenizer, too.
_PROBE = "The QUICK brown fox's  naïve\tÄpfel 12,345.67\r\n\n  def f(x): 東京 ﬁ 🙂 <s></s><|endoftext|>[CLS] ​"
# Attributes of tokenizers without a Rust backend on which the ids of a text do not depend, or which change
# with use.
_NOT_HASHED = (
    "cache",
    "chat_template",
    "deprecation_warnings",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "truncation_side",
    "verbose",
)


class Packing:
    """Options of packing: the tokenizer, the first and separating tokens of rows, the row length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, prepend_bos: bool) -> None:
        """Raises DataError for a tokenizer without a token to begin a row, or to put between documents."""

        def first(*names: str) -> int | None:
            ids = (special_id(tokenizer, name) for name in names)
            return next((i for i in ids if i is not None), None)

        self.tokenizer = tokenizer
        self.start = first("bos", "eos", "cls") if prepend_bos else None
        end = first("eos", "sep", "bos")
        if end is None:
            raise DataError("the tokenizer has no token to put between documents; set its eos_token")
        if prepend_bos and self.start is None:
            raise DataError(
                "the tokenizer has no token to begin a sequence with; set its bos_token, or prepend_bos=False"
            )
        self.end = end
        self.context = context
        self.text = context - prepend_bos
        self.tokenizer_name = f"{type(tokenizer).__name__}:{fingerprint(tokenizer)}"

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text, without special tokens."""
        return encode(self.tokenizer, texts)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens."""
    # split_special_tokens: "<|endoftext|>" in a document is text, not a special token.
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """Return the id of the special token `name` ("bos", "eos", "sep", "cls"), or None.

    None also stands for a token that is not in the vocabulary (its id would be the unknown token's), and for
    the token that TransformerLens adds to a vocabulary where the tokenizer was released without one.
    """
    token = getattr(tokenizer, f"{name}_token", None)
    number = getattr(tokenizer, f"{name}_token_id", None)
    if token is None or number is None:
        return None
    if number == tokenizer.unk_token_id and str(token) != str(tokenizer.unk_token):
        return None
    options = getattr(tokenizer, "init_kwargs", {})
    released = {str(value) for key, value in options.items() if key.endswith("_token")}
    # It sets the others, too: where they are not set, the user has named this one.
    all_set = tokenizer.bos_token is not None and tokenizer.pad_token is not None
    new = all_set and number >= tokenizer.vocab_size
    return None if str(token) == _INVENTED and _INVENTED not in released and new else number


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 16 hex digits that change with anything that changes the ids of a text.

    Nothing is remembered between calls, because every part of a tokenizer can be changed in place.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
        # Truncation and padding come first in the text; they depend on the last caller and are not used here.
        text = text[text.index('"added_tokens"') :]
    else:
        state = {key: value for key, value in vars(tokenizer).items() if key not in _NOT_HASHED}
        text = json.dumps([type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())])
        text += json.dumps(_plain(state, []), sort_keys=True)
    words = sorted(tokenizer.get_vocab())
    some = " ".join(words[:: max(1, len(words) // 64)])
    probe = encode(tokenizer, [_PROBE, some, some.upper()])
    return hashlib.sha256(f"{text}{probe}".encode("utf-8", "backslashreplace")).hexdigest()[:16]


def _plain(value: Any, outer: list[Any]) -> Any:
    """Return the state of an object as JSON values, the same in every process. `outer`: objects around it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if any(value is one for one in outer):
        return "itself"
    outer = [*outer, value]
    if isinstance(value, Mapping):
        return sorted([[repr(key), _plain(one, outer)] for key, one in value.items()], key=repr)
    if isinstance(value, list | tuple):
        return [_plain(one, outer) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(one, outer) for one in value), key=repr)
    name = type(value).__qualname__
    if hasattr(value, "serialized_model_proto"):  # of SentencePiece
        return [name, hashlib.sha256(value.serialized_model_proto()).hexdigest()]
    if hasattr(value, "pattern"):  # a regular expression
        return [name, value.pattern, getattr(value, "flags", 0)]
    return [name, _plain(getattr(value, "__dict__", None), outer)]
