"""Recipes: what they refuse, and those that notebooks make."""

from __future__ import annotations

from typing import Any

import pytest

from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.experiments.recipes import RECIPES, Recipe


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"init": "asii"}, UnknownNameError, "unknown initialization method 'asii'; did you mean 'asi'"),
        ({"optimizer": "sgd"}, UnknownNameError, "unknown optimizer 'sgd'; .*Known: adam, sparse_adam"),
        ({"aux_k": -1}, OptionError, "aux_k=-1 .* 'auto' or a whole number of at least 0"),
        ({"inside": True}, OptionError, "inside=True .* False, except for init='asi' with a d_init"),
        ({"reader": "randm"}, UnknownNameError, "unknown reader 'randm'; did you mean 'random'"),
        (
            {"init": "orthogonal", "reader": "random"},
            OptionError,
            "reader='random' .* None, except for init='asi' or 'random' with center=True",
        ),
        (
            {"center": False, "reader": "random"},
            OptionError,
            "reader='random' .* center=True and inside=False",
        ),
        ({"subspace_of": "x"}, OptionError, "subspace_of='x' .* None, except for a start in a subspace"),
        ({"aligned": "begin"}, UnknownNameError, "unknown aligned 'begin'.*Known: start, training"),
        ({"aligned": "start", "activation": "jumprelu"}, OptionError, "aligned='start' .*None, except for"),
        ({"aligned": "start", "init": "asi_authors", "d_init": 4}, OptionError, "no norm of its own"),
        ({"aligned": "training", "search": "subspace"}, OptionError, "search='subspace' .* 'exact'"),
        ({"overshoot": 0}, OptionError, "overshoot=0 .* finite and above 0"),
        ({"encoder_lr": -1}, OptionError, "encoder_lr=-1.0 .* above 0"),
        ({"aligned": "start", "overshoot": 2.0}, OptionError, "aligned='start' .* with overshoot=1"),
        ({"search": "subspac"}, UnknownNameError, "unknown search 'subspac'; did you mean 'subspace'"),
        *(
            ({"search": "subspace", **other}, OptionError, "search='subspace' .* 'exact', except for 'topk'")
            for other in (
                {"activation": "batchtopk"},
                {"reader": "random"},
                {"init": "asi", "d_init": 6, "inside": True},
            )
        ),
    ],
)
def test_bad_recipes_name_key_value_and_what_is_allowed(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Recipe("x", **options)


def test_the_first_recipes_are_the_papers() -> None:
    assert list(RECIPES)[:4] == ["random", "random + AuxK", "ASI", "ASI + sparse Adam"]
