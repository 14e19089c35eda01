"""Recipes: what they refuse, and those that notebooks make."""

from __future__ import annotations

import pytest

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.experiments.recipes import RECIPES, Recipe


def test_bad_recipes_are_named() -> None:
    with pytest.raises(UnknownNameError, match="asii"):
        Recipe("x", "asii")
    with pytest.raises(UnknownNameError, match="sgd"):
        Recipe("x", optimizer="sgd")
    with pytest.raises(OptionError, match="aux_k"):
        Recipe("x", aux_k=-1)
    with pytest.raises(OptionError, match="inside"):
        Recipe("x", inside=True)
    with pytest.raises(UnknownNameError, match="subspac"):
        Recipe("x", search="subspac")
    for other in ({"activation": "batchtopk"}, {"reader": "random"}, dict(init="asi", d_init=6, inside=True)):
        with pytest.raises(OptionError, match="search"):
            Recipe("x", search="subspace", **other)
    assert list(RECIPES)[:4] == ["random", "random + AuxK", "ASI", "ASI + sparse Adam"]
