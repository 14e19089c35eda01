"""Whether text and a model are those that rows were harvested from, where a number needs both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from asi_lens.base.errors import OptionError
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.fingerprint import model_fingerprint
from asi_lens.inputs.models import model_info


def require_text_of(what: str, fingerprint: str | None, tokens: Tokens) -> None:
    """Raise OptionError unless `tokens` are those that `what` was harvested from; None says from none."""
    if fingerprint is None:
        raise OptionError(f"the rows of {what} have no text: they were not harvested from tokens")
    if fingerprint != tokens.fingerprint:
        raise OptionError(
            f"tokens={tokens.corpus!r}, fingerprint {tokens.fingerprint}, are not allowed; tokens must "
            f"be those of {what}, with fingerprint {fingerprint}"
        )


def require_model_of(what: str, about: Mapping[str, Any], model: nn.Module) -> None:
    """Raise OptionError if `about`, metadata of `what`, says that another model wrote its rows.

    The same name or the same fingerprint is the same model: its weights may lie elsewhere under another name,
    or under one name be loaded in another dtype. Rows that no harvest of asi_lens wrote are not checked.
    """
    name, weights = about.get("model"), about.get("weights_fingerprint", about.get("fingerprint"))
    given = model_info(model, fingerprint=False)
    if name is None or weights is None or name == given.name:
        return
    if weights != (found := model_fingerprint(model)):
        dtype = about.get("model_dtype", given.dtype)
        hint = "" if dtype == given.dtype else f"; if they are one model, load it in {dtype} to be recognised"
        raise OptionError(
            f"model={given.name!r}, fingerprint {found}, is not allowed; {what} is of the activations of "
            f"{name!r}, with fingerprint {weights}{hint}"
        )
