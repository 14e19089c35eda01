"""media.py: packaged pictures, speech and sequences item by item; the real packages are behind a marker."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

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


def test_names_and_what_they_hold() -> None:
    for name in media.media_names():
        found = media.open_media(name)
        assert (found.name, found.kind) == (name, SOURCES[name].kind)
        assert len(found.fingerprint) == 16
    with pytest.raises(UnknownNameError, match="did you mean 'antibodies'"):
        media.open_media("antibody")
    with pytest.raises(UnknownNameError, match="news-en"):
        media.open_media("news-en")  # a text: `load_tokens` reads it


def test_chains_alternate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "fetch", lambda name: tmp_path)
    (tmp_path / "vh.csv").write_text("seq_id,input_seq\n1,EVQ\n2,QVQ\n")
    (tmp_path / "vl.csv").write_text("input_seq,seq_id\nDIV,1\nDIQ,2\n")
    (tmp_path / "manifest.json").write_text("{}")
    assert list(media.open_media("antibodies").items()) == ["EVQ", "DIV", "QVQ", "DIQ"]
    (tmp_path / "vl.csv").write_text("sequence\nDIV\n")
    with pytest.raises(DataError, match=r"vl\.csv has no column 'input_seq'"):
        list(media.open_media("antibodies").items())
    for path in tmp_path.glob("*.csv"):
        path.unlink()
    with pytest.raises(DataError, match="no files of antibodies"):
        list(media.open_media("antibodies").items())


@pytest.mark.packaged
def test_the_packaged_ones() -> None:
    """Counts that docs/models_and_texts.md states."""
    pictures = list(media.open_media("pictures-skimage").items())
    assert len(pictures) == 94
    assert {(picture.shape, picture.dtype.name) for picture in pictures} == {((224, 224, 3), "uint8")}
    assert min(picture.std() for picture in pictures) > 0  # none is blank

    seconds, formats = 0.0, set()
    for path in media.open_media("speech-prompts").items():
        with wave.open(str(path)) as clip:
            seconds += clip.getnframes() / clip.getframerate()
            formats.add((clip.getframerate(), clip.getsampwidth(), clip.getnchannels()))
        assert "silence" not in path.parts
    assert formats == {(8000, 2, 1)}
    assert round(seconds) == 1474

    sequences = list(media.open_media("antibodies").items())
    assert len(sequences) == len(set(sequences)) == 100_000
    assert set("".join(sequences)) == set("ACDEFGHIKLMNPQRSTVWY")
    assert sum(map(len, sequences)) == 11_551_626
