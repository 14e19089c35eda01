"""Evaluations of cached runs, each cached under a key of the run and the held-out data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.fingerprint import cached_numbers, number_key
from asi_lens.inputs.float32 import loss_dtype
from asi_lens.inputs.models import model_info
from asi_lens.results.rows import LOSSES
from asi_lens.sae.evaluate import Evaluation

_FORMAT = 2  # part of the keys: raise it when the code gives other bits, also by a product in other tiles
TWO_SITES: Mapping[str, Any] = {"left_alone": "rows massive on either side"}
"""Option of evaluations of coders that read one site and write another."""
NO_LOSSES: Mapping[str, None] = dict.fromkeys(LOSSES)
"""Columns of the language-model losses, for rows without that measurement."""


@runtime_checkable
class _Finished(Protocol):
    """A run in the cache."""

    @property
    def folder(self) -> Path: ...


AnyRun = TypeVar("AnyRun", bound=_Finished)


def held_out_numbers(
    runs: Sequence[AnyRun],
    held_out: str,
    model: nn.Module | None,
    tokens: Tokens | None,
    evaluate: Callable[[list[AnyRun]], Sequence[Evaluation]],
    **options: Any,
) -> list[dict[str, Any]]:
    """Return the evaluated fields of `held_out` rows, a mapping for each run, from the cache or `evaluate`.

    Args:
        held_out: fingerprint of the evaluated data.
        model, tokens: used for the language-model losses; None to skip them.
        evaluate: evaluates, together, the runs that are not in the cache.
        options: JSON values of the evaluation that belong to the keys too.
    """
    info = None if model is None else model_info(model)
    judged = {"format": _FORMAT, "losses": list(LOSSES), "held_out": held_out, **options}
    if info is not None:
        text = None if tokens is None else tokens.fingerprint
        judged = number_key(info.fingerprint, loss_dtype(info.dtype), text, **judged)

    def measure(missing: list[int]) -> list[dict[str, Any]]:
        return [
            {
                "dead_window_tokens": one.n_tokens,
                "dead_fraction": one.dead_fraction,
                "fvu": one.fvu,
                "l0": one.l0,
                **(NO_LOSSES if one.losses is None else {name: getattr(one.losses, name) for name in LOSSES}),
            }
            for one in evaluate([runs[position] for position in missing])
        ]

    return cached_numbers("evaluations", [{**judged, "run": run.folder.name} for run in runs], measure)
