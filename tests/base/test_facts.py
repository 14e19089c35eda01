"""Tables of facts for notebooks: escaped, short, without colors of their own."""

from __future__ import annotations

import pytest

from asi_lens.base.errors import OptionError
from asi_lens.base.facts import MOST_FACTS, facts_html


def test_all_text_is_escaped() -> None:
    html = facts_html("<b>t</b>", {"<i>": "a & <script>"})
    assert "<b>t" not in html
    assert "<script" not in html
    assert "&lt;b&gt;t&lt;/b&gt;" in html
    assert "&lt;i&gt;" in html
    assert "a &amp; &lt;script&gt;" in html


def test_numbers_are_written_for_readers_and_none_has_no_row() -> None:
    html = facts_html("t", {"n": 65_536, "share": 0.123456, "yes": True, "absent": None})
    for text in (">65,536<", ">0.1235<", ">yes<"):
        assert text in html
    assert html.count("<tr>") == 3


def test_a_table_follows_the_theme_of_the_page() -> None:
    assert "color" not in facts_html("t", {"a": 1})
    assert "background" not in facts_html("t", {"a": 1})


def test_long_values_are_cut_and_many_rows_refused() -> None:
    assert len(facts_html("t", {"a": "x" * 10_000})) < 700
    assert facts_html("t", {str(i): i for i in range(MOST_FACTS)}).count("<tr>") == MOST_FACTS
    with pytest.raises(OptionError, match="at most 12"):
        facts_html("t", {str(i): i for i in range(MOST_FACTS + 1)})
