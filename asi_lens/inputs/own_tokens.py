"""Tokens belong to the model whose tokenizer made them."""

from __future__ import annotations

from torch import nn

from asi_lens.base.errors import OptionError
from asi_lens.inputs import corpora
from asi_lens.inputs.tokenizing import fingerprint


def require_own_tokens(model: nn.Module, tokens: corpora.Tokens) -> None:
    """Raise OptionError for tokens of another tokenizer than the model's, where both are known.

    Ids of another vocabulary would be read as other words, and the numbers would look like numbers.
    """
    tokenizer = getattr(model, "tokenizer", None)
    digest = tokens.tokenizer.partition(":")[2]
    if tokenizer is None or not digest:
        return
    own = fingerprint(tokenizer)
    if digest != own:
        raise OptionError(
            f"these tokens of {tokens.corpus} were made by another tokenizer ({tokens.tokenizer}) than the "
            f"model's ({type(tokenizer).__name__}:{own}); make them with load_tokens(..., model), or, if "
            "both give the same ids, say so: dataclasses.replace(tokens, tokenizer='')"
        )
