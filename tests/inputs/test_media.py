"""media.py: packaged pictures, speech and sequences item by item; the real packages are behind a marker."""

from __future__ import annotations

import dataclasses
import gzip
import wave
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_plain import write_wav

from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.inputs import media
from asi_lens.inputs.sources import SOURCES


def test_crops_cover_the_middle_once() -> None:
    picture = np.arange(7 * 9 * 3, dtype=np.uint8).reshape(7, 9, 3)
    found = list(media.crops(picture, 3))
    assert len(found) == 6
    rebuilt = np.block([[[found[3 * row + column]] for column in range(3)] for row in range(2)])
    np.testing.assert_array_equal(rebuilt, picture[:6])  # one row is left over: (7 - 6) // 2 = 0 above
    np.testing.assert_array_equal(next(media.crops(picture, 5)), picture[1:6, 2:7])
    assert list(media.crops(picture, 8)) == []
    with pytest.raises(OptionError, match="side=0"):
        list(media.crops(picture, 0))


def test_chains_alternate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "fetch", lambda name: tmp_path)
    (tmp_path / "vh.csv").write_text("seq_id,input_seq\n1,EVQ\n2,QVQ\n")
    (tmp_path / "vl.csv").write_text("input_seq,seq_id\nDIV,1\nDIQ,2\n")
    (tmp_path / "manifest.json").write_text("{}")
    assert list(media.items_of("antibodies")) == ["EVQ", "DIV", "QVQ", "DIQ"]
    (tmp_path / "vl.csv").write_text("sequence\nDIV\n")
    with pytest.raises(UnknownNameError, match="unknown column 'input_seq'; Known: sequence"):
        list(media.items_of("antibodies"))
    for path in tmp_path.glob("*.csv"):
        path.unlink()
    with pytest.raises(DataError, match="no files of antibodies"):
        list(media.items_of("antibodies"))


@pytest.fixture
def transcribed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Returns the items of two languages; each clip lasts a second, or as long as told."""
    monkeypatch.setattr(media, "fetch", lambda name: tmp_path)
    told = (("en", "a/en", "en.gz"), ("fr", "a/fr", "fr.gz"))
    source = dataclasses.replace(SOURCES["speech-transcribed"], transcripts=told)
    monkeypatch.setitem(media.SOURCES, "speech-transcribed", source)

    def one(english: str, french: str, clips: dict[str, float]) -> list[Any]:
        for file, lines in (("en.gz", english), ("fr.gz", french)):
            (tmp_path / file).write_bytes(gzip.compress(lines.encode()))
        for name, seconds in clips.items():
            path = tmp_path / "a" / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_wav(path, np.zeros(round(100 * seconds), np.int16), 100)
        found = media.items_of("speech-transcribed")
        return [(path.relative_to(tmp_path / "a").as_posix(), *more) for path, *more in found]

    return one


def test_clips_with_transcripts_come_a_language_in_turn(transcribed: Callable[..., list[Any]]) -> None:
    english = "\ufeff; a comment\n\nb: Two: words. \ndigits/1: one\nnowhere: no clip\na: First.\n"
    clips = dict.fromkeys(["en/a", "en/b", "en/digits/1", "en/without", "fr/a"], 1.0)
    assert transcribed(english, "a: un\n", clips) == [
        ("en/a.wav", "First.", "en"),
        ("fr/a.wav", "un", "fr"),
        ("en/b.wav", "Two: words.", "en"),
        ("en/digits/1.wav", "one", "en"),
    ]


def test_clips_that_are_no_speech_or_too_long_are_left_out(transcribed: Callable[..., list[Any]]) -> None:
    sounds = "a: [tones]\nb: <beep>\nc: (noise)\nd: yes. e-f: no\ne:\nf: long\ng: well-known\nh: at 5:00"
    clips = {f"en/{name}": 30.0 if name == "g" else 1.0 for name in "abcdegh"} | {"en/f": 30.5}
    assert transcribed(sounds, "", clips) == [
        ("en/g.wav", "well-known", "en"),
        ("en/h.wav", "at 5:00", "en"),
    ]


@pytest.mark.parametrize("line", ["no colon", "a: again"])
def test_a_list_of_another_form_is_an_error(transcribed: Callable[..., list[Any]], line: str) -> None:
    with pytest.raises(DataError, match=f"en.gz has the line '{line}'; each clip has one line"):
        transcribed(f"a: one\n{line}\n", "", {"en/a": 1.0})


@pytest.mark.packaged
def test_the_packaged_ones() -> None:
    """Counts that docs/models_and_texts.md states."""
    pictures = list(media.items_of("pictures-skimage"))
    assert len(pictures) == 94
    assert {(picture.shape, picture.dtype.name) for picture in pictures} == {((224, 224, 3), "uint8")}
    assert min(picture.std() for picture in pictures) > 0  # none is blank

    seconds, formats = 0.0, set()
    for path in media.items_of("speech-prompts"):
        with wave.open(str(path)) as clip:
            seconds += clip.getnframes() / clip.getframerate()
            formats.add((clip.getframerate(), clip.getsampwidth(), clip.getnchannels()))
        assert "silence" not in path.parts
    assert formats == {(8000, 2, 1)}
    assert round(seconds) == 1474

    told = list(media.items_of("speech-transcribed"))
    assert Counter(language for _, _, language in told) == {"en": 537, "fr": 504, "it": 554, "ru": 540}
    assert {path.name: text for path, text, language in told if language == "en"}[
        "all-circuits-busy-now.wav"
    ] == "All circuits are busy now."

    sequences = list(media.items_of("antibodies"))
    assert len(sequences) == len(set(sequences)) == 100_000
    assert set("".join(sequences)) == set("ACDEFGHIKLMNPQRSTVWY")
    assert sum(map(len, sequences)) == 11_551_626
