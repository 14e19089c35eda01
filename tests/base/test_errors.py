"""Errors say what was given, what is allowed, and what probably was meant."""

from __future__ import annotations

from typing import Any

import pytest

from asi_lens.base import errors


def test_unknown_name_offers_the_nearest() -> None:
    error = errors.unknown_name("site", "atn_out", ["mlp_out", "attn_out"])
    assert str(error).startswith("unknown site 'atn_out'; did you mean 'attn_out'")
    assert str(error).endswith("Known: attn_out, mlp_out")
    assert isinstance(error, ValueError)
    assert "Known: none" in str(errors.unknown_name("site", "x", []))
    assert "(50 in all)" in str(errors.unknown_name("site", "zzz", [f"{i:02}" for i in range(50)]))


def test_require_names_key_value_and_what_is_allowed() -> None:
    errors.require(True, "k", 3, "anything")
    with pytest.raises(errors.OptionError, match="k=0 is not allowed; k must be at least 1"):
        errors.require(False, "k", 0, "at least 1")


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", None])
def test_a_whole_number_is_required(value: Any) -> None:
    errors.require_whole("n", 1, 1)
    with pytest.raises(errors.OptionError, match=f"n={value!r} .* must be a whole number of at least 1"):
        errors.require_whole("n", value, 1)


def test_two_options_that_belong_together() -> None:
    errors.require_both(a=None, b=None)
    errors.require_both(a=0, b=1)
    with pytest.raises(errors.OptionError, match="a and b belong together"):
        errors.require_both(a=0, b=None)


def test_the_first_unknown_key_is_named() -> None:
    errors.require_known(["k", "seed"], ["seed", "k"], "option")
    with pytest.raises(errors.UnknownNameError, match="unknown option 'sed'; did you mean 'seed'"):
        errors.require_known(["k", "sed", "x"], ["seed", "k"], "option")
