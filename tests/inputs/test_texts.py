"""Larger packaged texts: strings out of JSON without tags, nothing twice, mixtures in their shares."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asi_lens.base.errors import DataError, OptionError
from asi_lens.inputs.documents import open_corpus
from asi_lens.inputs.sources import SOURCES
from asi_lens.inputs.texts import MIXTURES, distinct, interleaved, texts_of, without_tags

SERVICE = {
    "metadata": {"description": 7},
    "operations": {"Get": {"documentation": "<p>Gets &lt;it&gt; <b>now</b>.</p>", "name": "Get"}},
    "shapes": {"description": {"type": "string", "documentation": "<p>A name.</p>"}},
    "documentation": "<p>A service.</p>",
}


def put(name: str, files: dict[str, bytes]) -> None:
    """Put files where the download of a source would be."""
    folder = SOURCES[name].folder
    for file, data in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(data)
    about: dict[str, Any] = {"format": 1, "source": name}
    about["files"] = {file: {"size": len(data), "sha256": ""} for file, data in files.items()}
    (folder / "manifest.json").write_text(json.dumps(about))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))


@pytest.mark.parametrize("packed", [True, False])
def test_strings_under_a_key_at_any_depth_in_the_order_of_the_file(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("a.json.gz" if packed else "a.json")
    data = json.dumps(SERVICE).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    found = list(texts_of(path, SOURCES["docs-en"]))
    # A number and an object under such a key are no text; the object is looked into.
    assert found == ["Gets <it> now.", "A name.", "A service."]


def test_only_strings_in_html_lose_what_looks_like_tags(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"description": "projects/<id>"}, {"documentation": "projects/<id>"}]))
    assert list(texts_of(path, SOURCES["docs-en"])) == ["projects/<id>", "projects/"]


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe{", b""])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name} is not readable JSON"):
        list(texts_of(tmp_path / name, SOURCES["docs-en"]))


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("plain", "plain"),
        ("<p>One   two\n three.</p> <p>Four.</p>", "One two three.\nFour."),
        ("<ul> <li> <p>a</p> </li> <li>b</li></ul>c", "a\nb\nc"),
        ('see <a href="x"><code>f</code></a>(1 &lt; 2)', "see f(1 < 2)"),
        ("a < b and b > c", "a < b and b > c"),
        ("x<br/>y", "x\ny"),
        ("<p></p>", ""),
    ],
)
def test_tags_are_stripped(html: str, text: str) -> None:
    assert without_tags(html) == text


def test_a_string_comes_once_in_all_files_of_a_source(own_cache: None) -> None:
    again = {"documentation": "<p>A name.</p>", "x": [{"documentation": "<b>New.</b>"}]}
    put(
        "docs-en",
        {
            "botocore/data/a/1/service-2.json.gz": gzip.compress(json.dumps(SERVICE).encode()),
            "botocore/data/b/1/service-2.json.gz": gzip.compress(json.dumps(again).encode()),
            "googleapiclient/discovery_cache/documents/c.json": b'{"description": "A name."}',
        },
    )
    found = list(open_corpus("docs-en").documents())
    assert found == ["Gets <it> now.\n\nA name.\n\nA service.", "New."]


def test_articles_are_documents(own_cache: None) -> None:
    articles = {t: {"title": t, "extract": text} for t, text in (("A", "One."), ("B", "Two."), ("C", "One."))}
    put("wiki-fr", {"summaries_fr-fr.json": json.dumps(articles).encode()})
    assert list(open_corpus("wiki-fr").documents()) == ["One.", "Two."]
    with pytest.raises(OptionError, match="wiki-fr has no columns"):
        open_corpus("wiki-fr", column="title")


def test_files_of_code_come_once(own_cache: None) -> None:
    put("code-python-large", {"b/x.py": b"import a", "a/x.py": b"import a", "a/y.py": b"y", "LICENSE": b"no"})
    assert list(open_corpus("code-python-large").documents()) == ["import a", "y"]


@given(st.lists(st.text(max_size=3), max_size=30))
def test_distinct_keeps_first_occurrences(texts: list[str]) -> None:
    seen: set[bytes] = set()
    assert list(distinct(texts, seen)) == list(dict.fromkeys(texts))
    assert list(distinct(texts, seen)) == []


def test_every_stretch_of_a_mixture_has_the_shares() -> None:
    shares = {"long": 6, "short": 3, "tiny": 1}
    parts = {name: [name[0] * length] * 5_000 for name, length in (("long", 90), ("short", 11), ("tiny", 2))}
    text = "".join(itertools.islice(interleaved(parts, shares), 2_000))
    for start in range(0, len(text) - 2_000, 997):
        stretch = text[start : start + 2_000]
        for name, share in shares.items():
            assert stretch.count(name[0]) == pytest.approx(200 * share, abs=200)


def test_a_mixture_ends_with_its_first_part_that_ends() -> None:
    found = list(interleaved({"a": ["x"] * 3, "b": ["y"] * 100}, {"a": 1, "b": 2}))
    assert found.count("x") == 3
    assert found.count("y") in (6, 7, 8)


def test_a_mixture_is_read_from_its_parts(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXTURES, "mixture-en", {"code-python-large": 2, "wiki-en": 1})
    put("code-python-large", {f"{n}.py": b"code%d" % n for n in range(4)})
    articles = [{"extract": f"text{n}"} for n in range(9)]
    put("wiki-en", {"summaries_en-us.json": json.dumps(articles).encode()})
    corpus = open_corpus("mixture-en")
    assert list(corpus.documents()) == ["code0", "text0", "code1", "code2", "text1", "code3"]
    assert sorted(corpus.documents(3)) == sorted(corpus.documents())
    monkeypatch.setitem(MIXTURES, "mixture-en", {"code-python-large": 2, "wiki-en": 2})
    assert open_corpus("mixture-en").fingerprint != corpus.fingerprint
    changed = dataclasses.replace(SOURCES["wiki-en"], distinct=False)
    monkeypatch.setitem(SOURCES, "wiki-en", changed)
    monkeypatch.setitem(MIXTURES, "mixture-en", {"code-python-large": 2, "wiki-en": 1})
    assert open_corpus("mixture-en").fingerprint != corpus.fingerprint


def test_mixtures_name_packaged_texts() -> None:
    for name, shares in MIXTURES.items():
        assert name not in SOURCES
        for part, share in shares.items():
            assert SOURCES[part].kind == "corpus"
            assert share >= 1
