"""Evaluations of cached runs, kept under a key of the runs and of what they were judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from asi_lens.cache import cached_json
from asi_lens.corpora import Tokens
from asi_lens.models import model_info
from asi_lens.sae.evaluate import Evaluation


def held_out_numbers(
    folders: Iterable[Path],
    format_number: int,
    held_out: str,
    model: nn.Module | None,
    tokens: Tokens | None,
    evaluate: Callable[[], Sequence[Evaluation]],
) -> list[dict[str, Any]]:
    """The fields of `held_out` rows that come from evaluating runs: of the cache, or of `evaluate()`.

    Args:
        folders: of the runs, in the order of `evaluate`. format_number: what raises it makes others.
        held_out: fingerprint of the data. model, tokens: of the losses, if there are any.
    """
    key = {
        "format": format_number,
        "runs": [folder.name for folder in folders],
        "held_out": held_out,
        "model": None if model is None else model_info(model).fingerprint,
        "tokens": None if tokens is None else tokens.fingerprint,
    }

    def measure() -> list[dict[str, Any]]:
        return [
            {
                "dead_window_tokens": one.n_tokens,
                "dead_fraction": one.dead_fraction,
                "fvu": one.fvu,
                "l0": one.l0,
                "cross_entropy_delta": one.losses.cross_entropy_delta if one.losses else None,
            }
            for one in evaluate()
        ]

    return cached_json("evaluations", key, measure)
