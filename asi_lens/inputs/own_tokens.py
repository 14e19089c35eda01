"""Tokens and inputs belong to the model whose tokenizer or processor made them."""

from __future__ import annotations

from torch import nn

from asi_lens.base.errors import OptionError
from asi_lens.inputs import corpora
from asi_lens.inputs.media_inputs import Inputs, kind_of_inputs, maker_name
from asi_lens.inputs.plain import PlainModel, wrong_inputs
from asi_lens.inputs.tokenizing import fingerprint


def require_own_tokens(model: nn.Module, tokens: corpora.Tokens | Inputs) -> None:
    """Raise OptionError for tokens or inputs that another tokenizer or processor than the model's made, where
    both are known, and for data of another kind than the model takes.

    Ids of another vocabulary would be read as other words, and the numbers would look like numbers.
    """
    if isinstance(tokens, Inputs):
        _require_own_inputs(model, tokens)
        return
    if isinstance(model, PlainModel) and model.takes != "sequences":
        raise wrong_inputs(model)
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


def _require_own_inputs(model: nn.Module, inputs: Inputs) -> None:
    takes = kind_of_inputs(model)
    if inputs.kind != takes:
        raise OptionError(f"{inputs.kind} of {inputs.corpus} are not allowed here; the model takes {takes}")
    decoder = isinstance(model, PlainModel) and model.part == "decoder"
    if decoder != ("decoder_input_ids" in inputs.arrays):
        part = "decoder" if decoder else "encoder"
        raise OptionError(
            f"these inputs of {inputs.corpus} were not made for a {part}: {', '.join(inputs.arrays)}; make "
            "them with load_inputs(data, model)"
        )
    if inputs.tokenizer and inputs.tokenizer != maker_name(model):
        raise OptionError(
            f"these inputs of {inputs.corpus} were made by {inputs.tokenizer}, the model's are made by "
            f"{maker_name(model)}; make them with load_inputs(data, model), or, if both give the same, say "
            "so: dataclasses.replace(inputs, tokenizer='')"
        )
