"""Answers on stability on made-up tables: yes, no by one layer or seed, and what is missing."""

from __future__ import annotations

from typing import Any

import pytest
from made_up_stability import matches, overlaps, transfer

from asi_lens.base.errors import DataError
from asi_lens.results.stability_verdicts import subspace_stability

KERNELS = {"half": 0.9, "text": 0.7, "layer": 0.4}
FVUS = {"as they are": 0.5, "its own mean": 0.4, "rotated": 0.35}


def stays(kernel: Any = None, fvu: Any = None, matched: Any = None, **of_matches: Any) -> list[str]:
    """Answers; by default all of them are yes."""
    kernel = kernel or (lambda against, layer: KERNELS[against])
    fvu = fvu or (lambda text, inputs, seed: 0.2 if text == "news" else FVUS[inputs])
    matched = matched or (lambda method, tokens, i: 0.1 + (tokens > 0) * (0.2 if method == "random" else 0.4))
    tables = (overlaps(kernel), transfer(fvu), matches(matched, **of_matches))
    return [one.answer for one in subspace_stability(*tables)]


def test_subspaces_are_held_against_the_floor_and_against_random_ones() -> None:
    assert stays() == ["yes"] * 10
    assert stays(lambda against, layer: 0.26)[:3] == ["no", "no", "no"], "within two deviations of random"
    assert stays(lambda against, layer: 0.28)[:3] == ["yes", "no", "yes"], "as far apart as two samples"
    # One layer is enough against a yes.
    once = stays(lambda against, layer: 0.95 if (against, layer) == ("text", 1) else KERNELS[against])
    assert once[:3] == ["yes", "no", "yes"]


def test_dictionaries_off_their_text() -> None:
    assert stays(fvu=lambda text, inputs, seed: 0.2)[3:6] == ["no"] * 3

    # A rotation that helps under one seed of two is not one that helps.
    def half(text: str, inputs: str, seed: int) -> float:
        return 0.2 if text == "news" else FVUS[inputs] + 0.1 * seed * (inputs == "rotated")

    assert stays(fvu=half)[3:6] == ["yes", "yes", "no"]


def test_seeds_agree_by_more_than_a_matching_may_miss() -> None:
    assert stays(matched=lambda method, tokens, i: 0.3)[6:] == ["no"] * 4
    assert stays(gap=0.25)[6:] == ["no", "yes", "no", "no"]

    # A head start of the smaller subspace is not what training adds.
    def ahead(method: str, tokens: int, i: int) -> float:
        return 0.1 + 0.2 * (method == "ASI") + 0.1 * (tokens > 0)

    def but_one(method: str, tokens: int, i: int) -> float:
        return 0.1 + 0.3 * (tokens > 0) * (method == "ASI" and i > 0)

    assert stays(matched=ahead)[6:] == ["yes", "yes", "yes", "no"]
    assert stays(matched=but_one)[6:] == ["no"] * 4, "all pairs of seeds but one"


def test_what_is_missing_is_not_judged() -> None:
    assert stays(methods=("ASI",))[6:] == ["yes", "not testable here", "not testable here"]
    good = overlaps(lambda against, layer: KERNELS[against])
    fvus = transfer(lambda text, inputs, seed: FVUS[inputs], texts=())
    seeds = matches(lambda method, tokens, i: 0.1)
    found = subspace_stability(good[good.against == "half"], fvus, seeds[seeds.tokens == 0])
    assert [one.answer for one in found] == ["not testable here"] * 10
    with pytest.raises(DataError, match="has no column kernel"):
        subspace_stability(good.drop(columns="kernel"), fvus, seeds)
