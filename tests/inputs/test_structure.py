"""What a model's numbers depend on besides its tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from asi_lens.inputs.structure import in_evaluation, state_of

PLAIN = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
VALUES = st.recursive(
    PLAIN, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=2), one, max_size=3)
)


class Config(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        raise AssertionError("copies a whole configuration at every forward pass")


def model_with(**attributes: Any) -> nn.Module:
    model = nn.Linear(2, 2)
    vars(model).update(attributes)
    return model


@given(VALUES, VALUES)
def test_attributes_differ_where_their_values_do(first: Any, second: Any) -> None:
    model = model_with(some=first)
    before = state_of(model)
    assert state_of(model) == before
    vars(model)["some"] = second
    assert (state_of(model) == before) == (first == second)


@pytest.mark.parametrize("second", [[1, [5]], [1, 5], [[1, 5]], {"0": [1], "1": 5}])
def test_the_nesting_counts(second: Any) -> None:
    model = model_with(config=Config(some=[[1], 5]))
    before = state_of(model)
    model.config.some = second
    assert state_of(model) != before


def test_a_configuration_that_holds_itself_is_read_once() -> None:
    config = Config(size=3)
    config.whole = [config]
    model = model_with(config=config)
    before = state_of(model)
    assert state_of(model) == before
    config.size = 4
    assert state_of(model) != before


def test_what_a_forward_pass_leaves_behind_does_not_count() -> None:
    model = model_with(config=Config(use_cache=False, size=3))
    before = state_of(model)
    model.config.use_cache = True
    model.eval()
    assert state_of(model) == before


def test_evaluation_is_for_a_while_and_of_each_module() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[0].eval()
    before = [module.training for module in model.modules()]
    with in_evaluation(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before == [True, False, True, True]
