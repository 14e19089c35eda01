"""Metadata is what files give back, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asi_lens.base.errors import OptionError
from asi_lens.base.metadata import plain_metadata


def test_a_copy_in_the_form_of_a_file() -> None:
    given = {"site": "attn_out", "layers": (1, 2), "more": {"bos": True, "none": None}}
    plain = plain_metadata(given)
    assert plain == {"site": "attn_out", "layers": [1, 2], "more": {"bos": True, "none": None}}
    plain["more"]["bos"] = False
    assert given["more"] == {"bos": True, "none": None}


@pytest.mark.parametrize("value", [Path("x"), {1, 2}, b"bytes", object])
def test_what_json_does_not_have_is_refused(value: Any) -> None:
    with pytest.raises(OptionError, match=r"metadata=\{'a': .*not JSON serializable"):
        plain_metadata({"a": value})
