"""readers.py: CSV rows that do not fit their header, and which files of a folder are text."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.inputs.documents import open_corpus
from asi_lens.inputs.readers import listing


def _documents(source: Any, **options: Any) -> list[str]:
    return list(open_corpus(source, **options).documents())


def _csv(folder: Path, text: str) -> Path:
    path = folder / "a.csv"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "text,label\nalpha beta,1,\ngamma delta,2,\n",  # a delimiter at the end of a line
        "text,label,\nalpha beta,1,\ngamma delta,2,\n",
        "text,label\nalpha beta,1,,,\ngamma delta,2\n",
        "text,label\r\n\r\nalpha beta,1\r\n \r\ngamma delta\r\n",  # blank lines; a short row with its text
        'label,text\n1,"alpha beta"\n2,gamma delta',
        "\ufefftext,label\nalpha beta,1\rgamma delta,2\r",
        ",text\n0,alpha beta\n1,gamma delta\n",  # the index of a pandas frame
    ],
)
def test_a_column_is_found_by_its_name_alone(tmp_path: Path, text: str) -> None:
    assert _documents(_csv(tmp_path, text)) == ["alpha beta", "gamma delta"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("text,label\nalpha,1\nbeta, gamma,2\n", r"line 3: 3 fields, but the header has 2.*in quotes"),
        ("text,label\n1,alpha,0\n2,beta,0\n", "line 2: 3 fields, but the header has 2"),  # R's row names
        ("text,label\nalpha,1\nbeta,2,,x\n", "line 3: 4 fields"),
        ("text\nHello, world\n", "line 2: 2 fields, but the header has 1"),
        ('text,label\n"two\nlines",1\nbeta,2,3\n', "line 4: 3 fields"),
        ("label,text\n1,first line\nsecond line\n", "line 3: 1 fields, none for the column 'text'"),
        ('text,label\n"alpha,1\nbeta,2\n', r"line 3: not a readable CSV \(unexpected end of data\)"),
        ('text,label\n"He said "no" twice",1\n', "line 2: not a readable CSV"),
        ("text,text\na,b\n", "2 columns named 'text'"),
        ("\n\n", "not a readable CSV: it has no header"),
    ],
)
def test_rows_that_do_not_fit_the_header_are_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises((DataError, UnknownNameError), match=told):
        _documents(_csv(tmp_path, text))


def test_a_long_text_is_one_field(tmp_path: Path) -> None:
    text = 'x, "y"\r\n' * 100_000
    path = _csv(tmp_path, 'id,text\n1,"' + text.replace('"', '""') + '"\n')
    assert _documents(path) == [text]


def test_invalid_text_in_parquet_names_the_file(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
    pq.write_table(pa.table({"text": broken}), path)
    with pytest.raises(DataError, match=r"a\.parquet is not a readable Parquet file"):
        _documents(path)


@pytest.mark.parametrize(
    "line",
    [
        r'{"text": "x\ud83d"}',  # half an emoji
        r'{"text": "\ude00\ud83d"}',  # halves in the wrong order
        r'{"text": "a\udcff"}',  # a byte that a reader has kept as a surrogate
    ],
)
def test_half_a_surrogate_pair_is_told_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"document 1 of a\.jsonl is not valid text: character \d is '\\u"):
        _documents(path)
    path.write_text(path.read_text().splitlines()[0])
    assert _documents(path) == ["😀"]


def test_half_a_surrogate_pair_in_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in ("a", "b\ud83d")))
    with pytest.raises(DataError, match=r"document 1 of .* is not valid text: character 1"):
        _documents(stream)


def _write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


TABLE = "text\none\n"
CARD = "---\nlanguage: en\ndataset_info:\n  x: 1\n---\n# A data set\n"


@pytest.mark.parametrize(
    ("files", "read", "left_out"),
    [
        ({"README.md": "# Card", "data/train.csv": TABLE}, ["data/train.csv"], "README.md, which describes"),
        (
            {"README.md": CARD, "train.arrow": "x", "a.txt": "one"},
            ["a.txt"],
            "README.md, which describes tables; 1 files of kind .arrow",
        ),
        ({"LICENSE.txt": "MIT", "a.jsonl": "{}"}, ["a.jsonl"], "LICENSE.txt"),
        ({"a/readme.md": "x", "b/t.csv": TABLE}, ["a/readme.md", "b/t.csv"], ""),  # of another folder
        ({"README.md": "# Docs", "guide.md": "one"}, ["README.md", "guide.md"], ""),
        ({"README.md": "---\nrule\n---\nlicense: no", "b.md": "x"}, ["README.md", "b.md"], ""),
        ({".venv/lib/a.py": "x", "b.py": "one"}, ["b.py"], "folder .venv"),
        ({"my-env/pyvenv.cfg": "", "my-env/lib/a.py": "x", "b.py": "one"}, ["b.py"], "folder my-env"),
        ({".ipynb_checkpoints/b-checkpoint.py": "x", "b.py": "one"}, ["b.py"], "folder .ipynb_checkpoints"),
        ({"sub/.git/x.txt": "x", "sub/node_modules/r/README.md": "x", "b.md": "1"}, ["b.md"], "sub/node_mod"),
        (
            {".b.txt": "x", "a.pdf": "x", "c.pdf": "x", "b.txt": "1"},
            ["b.txt"],
            "2 files of kind .pdf; 1 hidden",
        ),
    ],
)
def test_a_folder_gives_its_texts_and_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str], read: list[str], left_out: str
) -> None:
    found, told = listing(_write(tmp_path, files))
    assert [name for name, _ in found] == read
    assert re.search(left_out, told)
    assert bool(told) == bool(left_out)
    open_corpus(tmp_path)
    said = capsys.readouterr().err
    assert (f"{len(read)} files are read as text; left out: {told}" in said) == bool(left_out)


def test_a_script_that_loads_tables_is_no_text(tmp_path: Path) -> None:
    folder = _write(tmp_path / "news", {"news.py": "import datasets", "a.csv": TABLE, "b.py": "one"})
    assert [name for name, _ in listing(folder)[0]] == ["a.csv", "b.py"]


def test_a_folder_below_a_hidden_folder_is_read(tmp_path: Path) -> None:
    assert _documents(_write(tmp_path / ".cache" / "venv", {"a.txt": "one"})) == ["one"]


def test_nothing_and_everything_are_no_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _write(tmp_path, {"a.txt": "one"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match="unknown corpus"):
        open_corpus("")  # not the working folder
    with pytest.raises(OptionError, match="not the whole file system"):
        open_corpus("/")
    assert _documents(".") == ["one"]
    assert open_corpus(".").name == tmp_path.name


@pytest.mark.parametrize(
    "text", ["A whole text, not a list. " * 300, "zero\0byte", "half \ud83d", "~nobody-x"]
)
def test_a_text_that_is_no_path_is_told_shortly(text: str) -> None:
    with pytest.raises((DataError, UnknownNameError)) as caught:
        open_corpus(text)
    assert len(str(caught.value)) < 600


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes")
def test_a_name_that_is_not_utf8_names_a_corpus(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("one")
    assert open_corpus(path).name.encode() == rb"caf\udce9.txt"
