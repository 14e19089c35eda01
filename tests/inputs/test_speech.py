"""Speech: real audio positions only, resampling, joined and cut clips, a decoder's text, wrong data."""

from __future__ import annotations

import copy
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_plain
import torch
from small_plain import HOP, POSITIONS, RATE, write_wav

import asi_lens as al
from asi_lens.base.errors import DataError, UnsupportedModelError
from asi_lens.inputs import media, models, speech

EXPECTED = 0.50

pytestmark = pytest.mark.model_facing


def sine(hertz: float, rate: int, seconds: float = 0.5) -> torch.Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(round(rate * seconds)).double() / rate)


@pytest.mark.parametrize(
    ("rate", "wanted"), [(8000, 16_000), (44_100, 16_000), (48_000, 16_000), (16_000, 22_050)]
)
def test_a_tone_is_the_same_tone_at_another_rate(rate: int, wanted: int) -> None:
    for hertz in (100.0, 1234.5, 3000.0):
        found = speech.resampled(sine(hertz, rate), rate, wanted)
        assert len(found) == math.ceil(rate * 0.5 * wanted / rate)
        middle = slice(wanted // 10, -wanted // 10)  # the ends lack samples on one side
        assert float((found - sine(hertz, wanted))[middle].abs().max()) < 1e-4


def test_what_the_lower_rate_cannot_hold_is_removed() -> None:
    found = speech.resampled(sine(10_000, 44_100), 44_100, 16_000)
    assert float(found[1600:-1600].abs().max()) < 1e-4
    constant = speech.resampled(torch.full((4000,), 0.5), 8000, 16_000)
    torch.testing.assert_close(constant[400:-400], torch.full((7200,), 0.5).double())
    same = sine(100, 16_000)
    assert speech.resampled(same, 16_000, 16_000) is same


def test_positions_of_real_audio_are_rows(plain: Any) -> None:
    model = plain("whisper")
    inputs = al.load_inputs(small_plain.clips((1.0, 0.5, 0.25, 0.0299)), model)
    assert inputs.context == POSITIONS
    assert inputs.kept.sum(1).tolist() == [50, 25, 12, 1], "50 a second, each of them all real audio"
    assert inputs.kept[1].tolist() == [True] * 25 + [False] * 25
    frames = inputs.arrays["input_features"]
    assert frames.shape == (4, 8, 100)
    own = model.processor(small_plain.clips()[1][0], sampling_rate=RATE, return_tensors="pt")[
        "input_features"
    ][0]
    assert torch.equal(frames[1], own)


def test_each_position_sees_its_own_time(plain: Any) -> None:
    """Before any attention, a change of the audio changes the rows of that time and no others."""
    model = plain("whisper")
    frames = al.load_inputs(small_plain.clips((1.0,)), model).arrays["input_features"]
    other = frames.clone()
    other[..., 40:42] += 1  # the two frames of position 20
    streams: list[torch.Tensor] = []
    for values in (frames, other):
        hooks = {"blocks.0.hook_resid_pre": lambda x: streams.append(x[0].clone())}
        models.forward(model, {"input_features": values}, hooks)
    changed = (streams[0] != streams[1]).any(1).nonzero().flatten().tolist()
    assert 20 in changed
    assert set(changed) <= {19, 20, 21}


def test_clips_are_cut_and_joined(plain: Any) -> None:
    model = plain("whisper")
    long = al.load_inputs(small_plain.clips((2.5,)), model)
    assert long.kept.sum(1).tolist() == [50, 50, 25]
    clips = small_plain.clips((0.4, 0.5, 0.3, 1.2))
    joined = al.load_inputs(clips, model, join=True)
    assert joined.kept.sum(1).tolist() == [45, 15, 50, 10]
    whole = np.concatenate([clips[0][0], clips[1][0]])
    alone = al.load_inputs([(whole, RATE)], model)
    assert torch.equal(joined.arrays["input_features"][0], alone.arrays["input_features"][0])
    assert al.load_inputs(clips, model, join=True, offset=2).n_rows == 60


def test_files_of_every_kind_of_pcm_are_the_same_sound(tmp_path: Path) -> None:
    whole = (sine(440, RATE) * 2**14).numpy().round()
    as_16 = write_wav(tmp_path / "16.wav", whole.astype("<i2"), RATE)
    as_32 = write_wav(tmp_path / "32.wav", (whole * 2**16).astype("<i4"), RATE, width=4)
    as_8 = write_wav(tmp_path / "8.wav", (np.round(whole / 256) + 128).astype(np.uint8), RATE, width=1)
    both = np.stack([whole, -whole + 2], axis=1).astype("<i2")
    stereo = write_wav(tmp_path / "stereo.wav", both, RATE)
    first, second, coarse, mean = (
        speech.open_clip(path, RATE, "x").samples for path in (as_16, as_32, as_8, stereo)
    )
    torch.testing.assert_close(first, torch.from_numpy(whole / 2**15))
    torch.testing.assert_close(first, second)
    assert float((first - coarse).abs().max()) <= 0.5 / 128 + 1e-9
    torch.testing.assert_close(mean, torch.full_like(mean, 1 / 2**15))
    given = speech.open_clip((whole.astype(np.int16), RATE), RATE, "x").samples
    torch.testing.assert_close(given, first)


def test_another_rate_gives_about_the_same_frames(plain: Any) -> None:
    model = plain("whisper")
    tone = sine(440, 8000, 1.0) * 0.5
    at_8000 = al.load_inputs([(tone.numpy(), 8000)], model).arrays["input_features"]
    own = al.load_inputs([((sine(440, RATE, 1.0) * 0.5).numpy(), RATE)], model).arrays["input_features"]
    loud = own > own.max() - 0.5
    torch.testing.assert_close(at_8000[loud], own[loud], rtol=0, atol=1e-2)


def test_what_is_no_speech(plain: Any, tmp_path: Path) -> None:
    silent = write_wav(tmp_path / "empty.wav", np.zeros(0, "<i2"), RATE)
    cut = tmp_path / "cut.wav"
    cut.write_bytes(write_wav(tmp_path / "w.wav", np.zeros(99, "<i2"), RATE).read_bytes()[:30])
    (tmp_path / "text.wav").write_text("no sound")
    deep = write_wav(tmp_path / "24.wav", np.zeros(99, np.uint8), RATE, width=3)
    samples = np.zeros(99, np.float32)
    wrong: list[Any] = [silent, cut, tmp_path / "text.wav", tmp_path / "absent.wav", deep]
    wrong += [(samples[:0], RATE), (samples, 0), (samples, 16_000.5), (samples, True), (samples, "16000")]
    wrong += [
        (samples + 2, RATE),
        (samples * np.nan, RATE),
        (samples[None], RATE),
        (samples.astype(np.int64), RATE),
    ]
    wrong += [(samples, RATE, " "), (samples, RATE, 3), samples, None, (samples,), ()]
    wrong += [(samples, RATE, "a", 3), (samples, RATE, "a", "en", 1), (silent, "a", "en", 1), (deep, 16_000)]
    for one in wrong:
        with pytest.raises(DataError, match="the clip"):
            speech.open_clip(one, RATE, "the clip")
    with pytest.raises(
        DataError, match=rf"clip 0 has {2 * HOP - 1} samples; a position of the encoder takes {2 * HOP}"
    ):
        al.load_inputs([(np.zeros(2 * HOP - 1), RATE)], plain("whisper"))


def test_a_decoders_rows_are_the_words_of_the_text(plain: Any) -> None:
    model = plain("whisper", "decoder")
    clips = [
        (*clip, text) for clip, text in zip(small_plain.clips(), ("abc de", "fg", "hello you"), strict=True)
    ]
    inputs = al.load_inputs(clips * 3, model)
    ids = inputs.arrays["decoder_input_ids"]
    assert inputs.kept[:3].sum(1).tolist() == [6, 2, 9]
    assert model.tokenizer.decode(ids[2][inputs.kept[2]].tolist()) == "hello you"
    special = model.tokenizer.convert_tokens_to_ids(["<bos>", "<eos>"])
    found = speech._is_text(model.tokenizer, torch.tensor([*special, 7, 8]))
    assert found.tolist() == [False, False, True, True]
    joined = al.load_inputs(clips * 3, model, join=True)
    assert joined.kept[0].sum() == len("abc de"), "0.5 s more do not fit into one second"
    assert joined.kept[1].sum() == len("fg hello you")


def test_a_language_is_told_to_the_decoder_as_in_whispers_training(
    plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain("whisper", "decoder")
    has = copy.deepcopy(model.source.generation_config)
    monkeypatch.setattr(model.source, "generation_config", has)
    has.lang_to_id, has.task_to_id = {"<|en|>": 20, "<|fr|>": 21}, {"transcribe": 22, "translate": 23}
    has.no_timestamps_token_id = 24
    languages = ("en", "fr", "en", "fr")
    clips = [
        (*clip, text, language)
        for clip, text, language in zip(
            small_plain.clips((0.4, 0.5, 0.5, 0.3)), ("abc", "de", "fg", "hij"), languages, strict=True
        )
    ]
    ids = al.load_inputs(clips * 4, model).arrays["decoder_input_ids"]
    assert ids[0, :4].tolist() == [has.decoder_start_token_id, 20, 22, 24]
    assert ids[1, :4].tolist() == [has.decoder_start_token_id, 21, 22, 24]
    words = model.tokenizer(" fg", add_special_tokens=False)["input_ids"]
    assert ids[2, 4 : 5 + len(words)].tolist() == [*words, has.eos_token_id]
    joined = al.load_inputs(clips * 4, model, join=True)
    texts = [model.tokenizer.decode(one.tolist()[4:]) for one in joined.arrays["decoder_input_ids"]]
    assert all(("abc" in text or "fg" in text) != ("de" in text or "hij" in text) for text in texts)
    assert texts[0].split("<")[0] == " abc fg", (
        "clips of a language are laid end to end, whatever lies between them"
    )
    with pytest.raises(DataError, match="clip 0 is of the language 'xx'; the model names en, fr"):
        al.load_inputs([(*clips[0][:3], "xx")], model)
    del has.lang_to_id
    with pytest.raises(DataError, match="the model names none"):
        al.load_inputs(clips[:1], model)


def test_a_file_may_come_with_its_text(plain: Any, tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", (sine(440, RATE) * 2**14).numpy().astype("<i2"), RATE)
    clip = speech.open_clip((path, "words", "en"), RATE, "x")
    assert (clip.text, clip.language) == ("words", "en")
    assert torch.equal(clip.samples, speech.open_clip(path, RATE, "x").samples)
    with pytest.raises(DataError, match=r"clip 0 \(.*absent.wav\)"):
        al.load_inputs([(tmp_path / "absent.wav", "words")], plain("whisper"))


def test_without_a_text_the_model_writes_one(plain: Any) -> None:
    model = plain("whisper", "decoder")
    model.source.generation_config.max_new_tokens = 8
    inputs = al.load_inputs(small_plain.clips((1.0,) * 8), model)
    features = inputs.arrays["input_features"][:1]
    ids = [1]
    for _ in range(8):  # greedy, every step from nothing
        given = {"input_features": features, "decoder_input_ids": torch.tensor([ids])}
        with torch.no_grad():
            ids.append(int(model.source(**given).logits[0, -1].argmax()))
    assert len(set(ids)) > 2
    written = inputs.arrays["decoder_input_ids"][0].tolist()
    assert written == ids, "with the mark that the decoder began from"
    again = al.load_inputs(small_plain.clips((1.0,) * 8), model)
    assert inputs.fingerprint == again.fingerprint


def test_a_text_of_the_models_that_does_not_end_is_refused(plain: Any) -> None:
    model = plain("whisper", "decoder")
    model.source.generation_config.max_new_tokens = None
    model.source.generation_config.max_length = model.cfg.n_ctx
    with pytest.raises(DataError, match=r"clip 0.* to the end of its context"):
        al.load_inputs(small_plain.clips((1.0,) * 8), model)


def test_texts_that_do_not_fit(plain: Any, plain_folder: Any, tmp_path: Path) -> None:
    clip = small_plain.clips((1.0,))[0]
    with pytest.raises(DataError, match=r"text of 40 tokens; the decoder takes 32"):
        al.load_inputs([(*clip, "a" * 40)], plain("whisper", "decoder"))
    for file in plain_folder("whisper").iterdir():
        if "tokenizer" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model = al.load_model(tmp_path, dtype="float32", part="decoder")
    with pytest.raises(UnsupportedModelError, match="no tokenizer for its decoder"):
        al.load_inputs([(*clip, "words")], model)
    assert al.load_inputs([clip], al.load_model(tmp_path, dtype="float32")).n_rows == POSITIONS


@pytest.mark.packaged
def test_the_decoder_finds_the_transcripts_likely_after_their_own_audio() -> None:
    """Nats per token of two windows, French and Italian; with the other's audio each costs far more."""
    model = al.load_model("whisper-base", dtype="float32", device="cpu", part="decoder")
    told = media.items_of("speech-transcribed")
    inputs = al.load_inputs(itertools.islice(told, 130), model, 512, join=True)
    frames, ids = inputs.arrays["input_features"][:2], inputs.arrays["decoder_input_ids"][:2]
    marks = model.tokenizer.convert_ids_to_tokens(ids[:, 1].tolist())
    assert marks == ["<|fr|>", "<|it|>"]
    with torch.inference_mode():
        encoded = model.source.get_encoder()(frames).last_hidden_state
        right, wrong = (
            torch.nn.functional.cross_entropy(
                model.source(encoder_outputs=(states,), decoder_input_ids=ids).logits[:, :-1].mT,
                ids[:, 1:],
                reduction="none",
            )[inputs.kept[:2, 1:]]
            for states in (encoded, encoded.roll(1, 0))
        )
    assert float(right.mean()) == pytest.approx(EXPECTED, abs=0.05)
    assert float(wrong.mean()) > 5 * EXPECTED


@pytest.mark.packaged
@pytest.mark.filterwarnings("ignore")  # transformers warns of its own settings
def test_of_a_single_clip_the_decoder_writes_what_is_said() -> None:
    model = al.load_model("whisper-base", dtype="float32", device="cpu", part="decoder")
    told = media.items_of("speech-transcribed")
    path, text, _ = next(clip for clip in told if clip[0].stem == "agent-alreadyon" and clip[2] == "en")
    clip = speech.open_clip((path, text, "en"), RATE, "x")._replace(text=None)
    found = speech._made(model, clip)
    ids = found.arrays["decoder_input_ids"]
    prefix = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    assert model.tokenizer.decode(ids[~found.kept].tolist()) in (prefix, f"{prefix}<|endoftext|>")
    written = model.tokenizer.decode(ids[found.kept].tolist())
    assert re.findall(r"\w+", written) == re.findall(r"\w+", text)
