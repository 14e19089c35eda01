"""Recipes: what they refuse, and those that notebooks make."""

from __future__ import annotations

import pytest

from asi_lens.errors import OptionError, UnknownNameError
from asi_lens.recipes import RECIPES, Recipe, variants


def test_variants_of_a_recipe_say_in_their_name_what_they_change() -> None:
    wide, slow, asi = variants(d_init=[6], lr=[3e-4])
    assert wide == Recipe("ASI, d_init 6", "asi", 6)
    assert slow == Recipe("random, lr 0.0003", lr=3e-4)
    assert asi == Recipe("ASI, lr 0.0003", "asi", "auto", lr=3e-4)
    assert variants() == []


def test_bad_recipes_are_named() -> None:
    with pytest.raises(UnknownNameError, match="asii"):
        Recipe("x", "asii")
    with pytest.raises(UnknownNameError, match="sgd"):
        Recipe("x", optimizer="sgd")
    with pytest.raises(OptionError, match="aux_k"):
        Recipe("x", aux_k=-1)
    with pytest.raises(OptionError, match="inside"):
        Recipe("x", inside=True)
    with pytest.raises(OptionError, match=r"lr=0\.0"):
        Recipe("x", lr=0.0)
    with pytest.raises(UnknownNameError, match="subspac"):
        Recipe("x", search="subspac")
    for other in ({"activation": "batchtopk"}, {"reader": "random"}, dict(init="asi", d_init=6, inside=True)):
        with pytest.raises(OptionError, match="search"):
            Recipe("x", search="subspace", **other)
    assert list(RECIPES)[:4] == ["random", "random + AuxK", "ASI", "ASI + sparse Adam"]
