"""Speech to log-mel frames, and to a decoder's ids: what Whisper takes, made by its own feature extractor."""

from __future__ import annotations

import itertools
import math
import wave
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from asi_lens.base.errors import DataError, UnsupportedModelError
from asi_lens.inputs.media_items import Made, label

if TYPE_CHECKING:
    from asi_lens.inputs.plain import PlainModel

# Zero crossings of the resampling filter on each side, and the shape of its Kaiser window (-90 dB).
_CROSSINGS, _BETA = 32, 9.0
# Share of the lower rate's band that passes.
_PASSED = 0.95
# A text that a decoder writes ends this many tokens before its context, or not at all (its prefix is cut).
_ROOM = 8
_SCALES = {np.dtype(np.int16): 2.0**15, np.dtype(np.int32): 2.0**31}


class Clip(NamedTuple):
    """A piece of speech at the model's rate."""

    samples: Float[Tensor, " n"]
    text: str | None
    name: str
    language: str | None = None
    """Code of the text's language, as Whisper's marks have it: "en"."""


def open_clip(item: Any, rate: int, name: str) -> Clip:
    """Return a clip at `rate` samples a second, resampled if it has another rate.

    `item`: a `.wav` file of PCM samples (channels are averaged), (file, text) or (file, text, language), or
    (samples [n], rate), (samples, rate, text) or (samples, rate, text, language). Samples are int16, int32,
    or float from -1 to 1; `language` is a code ("en"). Raises DataError for anything else, and for a clip
    without samples.
    """
    given = list(item) if isinstance(item, tuple | list) else [item]
    if given and isinstance(given[0], str | Path) and len(given) <= 3:
        samples, own = _read_wav(Path(given[0]), name)
        told = given[1:]
    elif 2 <= len(given) <= 4:
        samples, own = _floats(given[0], name), given[1]
        told = given[2:]
    else:
        raise DataError(f"{name} is no speech: a {type(item).__name__}, not (samples, rate)")
    text, language = [*told, None, None][:2]
    if isinstance(own, bool) or not isinstance(own, int | np.integer) or own < 1:
        raise DataError(f"{name} has a rate of {own!r}; a rate is a whole number of samples a second")
    for key, value, allowed in (
        ("text", text, "a string with words"),
        ("language", language, "a code: 'en'"),
    ):
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise DataError(f"{name} has the {key} {value!r}; a {key} is {allowed}")
    if not len(samples):
        raise DataError(f"{name} has no samples")
    return Clip(resampled(samples, int(own), rate), text, name, language)


def _read_wav(path: Path, name: str) -> tuple[Tensor, int]:
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise DataError(f"{name} is no speech that can be read: {error or 'it is cut off'}") from error
    if len(data) % (width * channels):
        raise DataError(f"{name} is cut off")
    if width == 1:
        values = (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    elif width in (2, 4):
        values = np.frombuffer(data, f"<i{width}").astype(np.float64) / 2.0 ** (8 * width - 1)
    else:
        raise DataError(f"{name} has samples of {8 * width} bits; 8, 16 and 32 bits are read")
    return torch.from_numpy(values.reshape(-1, channels).mean(1)), rate


def _floats(samples: Any, name: str) -> Tensor:
    """Return samples from -1 to 1 in float64."""
    values = samples.cpu().numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    if values.ndim != 1:
        raise DataError(f"{name} has samples of shape {values.shape}; one channel [n] is taken")
    if values.dtype in _SCALES:
        return torch.from_numpy(values / _SCALES[values.dtype])
    if len(values) and values.dtype.kind != "f":
        raise DataError(f"{name} has samples of {values.dtype}; int16, int32 and floats are taken")
    values = values.astype(np.float64)
    if not np.isfinite(values).all() or np.abs(values).max(initial=0.0) > 1:
        raise DataError(f"{name} has samples that are not from -1 to 1")
    return torch.from_numpy(values)


def resampled(samples: Float[Tensor, " n"], rate: int, wanted: int) -> Float[Tensor, " m"]:
    """Return samples at another rate, by a windowed sinc (Smith, Digital Audio Resampling, 2002).

    Frequencies above 0.95 of the lower rate's half are removed; others pass. Returns ceil(n wanted / rate)
    samples, float64. Sample 0 is at the same time in both.
    """
    samples = samples.double()
    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    down, up = rate // divisor, wanted // divisor
    cutoff = _PASSED * min(1.0, wanted / rate)  # in halves of the own rate
    half = math.ceil(_CROSSINGS / cutoff)
    # Output k * up + phase is at input k * down + phase * down / up.
    taps = torch.arange(-half, half + down).double()
    at = taps - torch.arange(up).double()[:, None] * down / up
    window = torch.special.i0(_BETA * (1 - (at / half).square()).clamp_min(0).sqrt())
    kernel = torch.sinc(cutoff * at) * torch.where(at.abs() <= half, window, 0.0)
    kernel = kernel / kernel.sum(1, keepdim=True)
    padded = functional.pad(samples[None, None], (half, half + down))
    out = functional.conv1d(padded, kernel[:, None], stride=down)[0]
    return out.T.flatten()[: -(-len(samples) * up // down)]


def made(model: PlainModel, items: Iterable[Any], offset: int = 0, join: bool = False) -> Iterator[Made]:
    """Return the log-mel frames [mel frame] of each clip, and which of the model's positions are rows.

    The encoder's input is always 30 s. Rows are the positions whose 20 ms are all real audio. A longer clip
    is cut into pieces of 30 s, which have no text; with `join`, whole clips of one language are laid end to
    end until no more fit. A decoder's rows are the tokens of the text: the clip's own, else those that the
    model writes; a text of the model's that does not end is a DataError.
    """
    extractor = model.processor
    if extractor is None or not hasattr(extractor, "hop_length"):
        raise UnsupportedModelError(
            f"the folder of {model.cfg.model_name!r} has no feature extractor of log-mel frames"
        )
    longest = int(extractor.n_samples)
    clips = (
        open_clip(item, int(extractor.sampling_rate), label("clip", number, item))
        for number, item in enumerate(items)
    )
    pieces = _pieces(_joined(clips, longest) if join else clips, longest)
    return (_made(model, clip) for clip in itertools.islice(pieces, offset, None))


def _pieces(clips: Iterable[Clip], longest: int) -> Iterator[Clip]:
    """Yield clips of at most `longest` samples; the text of a clip that is cut belongs to no piece."""
    for clip in clips:
        whole = len(clip.samples) <= longest
        for piece in clip.samples.split(longest):
            yield clip._replace(samples=piece, text=clip.text if whole else None)


def _joined(clips: Iterator[Clip], longest: int) -> Iterator[Clip]:
    """Yield clips of the same language laid end to end, each as long as whole clips allow."""
    groups: dict[str | None, list[Clip]] = {}
    for clip in clips:
        group = groups.setdefault(clip.language, [])
        if group and sum(len(one.samples) for one in group) + len(clip.samples) > longest:
            yield _together(group)
            group.clear()
        group.append(clip)
    yield from (_together(group) for group in groups.values())


def _together(group: list[Clip]) -> Clip:
    texts = [clip.text for clip in group if clip.text is not None]
    return Clip(
        torch.cat([clip.samples for clip in group]),
        " ".join(texts) if len(texts) == len(group) else None,
        f"{group[0].name} to {group[-1].name}",
        group[0].language,
    )


def _made(model: PlainModel, clip: Clip) -> Made:
    extractor = model.processor
    found = extractor(
        clip.samples.float().numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt"
    )
    frames = found["input_features"][0]
    wanted = (model.source.config.num_mel_bins, model.frames)
    if tuple(frames.shape) != wanted:
        raise DataError(
            f"the folder's feature extractor gives {tuple(frames.shape)}, the model takes {wanted}"
        )
    if model.part == "decoder":
        ids = _decoder_ids(model, frames, clip)
        return Made({"input_features": frames, "decoder_input_ids": ids}, _is_text(model.tokenizer, ids))
    # Two frames make a position, by the stride of the encoder's second convolution.
    each = 2 * int(extractor.hop_length)
    real = len(clip.samples) // each
    if not real:
        raise DataError(
            f"{clip.name} has {len(clip.samples)} samples; a position of the encoder takes {each}"
        )
    return Made({"input_features": frames}, torch.arange(model.frames // 2) < real)


def _decoder_ids(model: PlainModel, frames: Tensor, clip: Clip) -> Tensor:
    """Return the decoder's ids [position]: the clip's text with its prefix, or what the model writes."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UnsupportedModelError(
            f"the folder of {model.cfg.model_name!r} has no tokenizer for its decoder"
        )
    if clip.text is not None:
        ids = torch.tensor(_told_ids(model, clip))
    else:
        options = {} if clip.language is None else {"language": _mark(model, clip), "task": "transcribe"}
        with torch.inference_mode():
            found = model.source.generate(
                model.placed(frames[None]),
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,  # with the prefix that the decoder read
                **options,
            )
        ids = found["sequences"][0].cpu().clone()
        if len(ids) > model.cfg.n_ctx - _ROOM:
            raise DataError(
                f"{clip.name}: the model writes to the end of its context, as Whisper does where it repeats "
                "a word; give a text: (samples, rate, text)"
            )
    if len(ids) > model.cfg.n_ctx:
        raise DataError(f"{clip.name} has a text of {len(ids)} tokens; the decoder takes {model.cfg.n_ctx}")
    if not bool(_is_text(tokenizer, ids).any()):
        raise DataError(f"{clip.name} has no words: its text is {tokenizer.decode(ids.tolist())!r}")
    return ids


def _told_ids(model: PlainModel, clip: Clip) -> list[int]:
    """Return ids of a clip's own text: after marks of its language and of transcription, if it has a language
    (how Whisper was trained), else as the tokenizer makes them."""
    tokenizer, text = model.tokenizer, str(clip.text)
    if clip.language is None:
        return list(tokenizer(text)["input_ids"])
    mark, has = _mark(model, clip), model.source.generation_config
    before = (has.decoder_start_token_id, has.lang_to_id[mark], has.task_to_id["transcribe"])
    words = tokenizer(f" {text.strip()}", add_special_tokens=False)["input_ids"]
    return [*before, has.no_timestamps_token_id, *words, has.eos_token_id]


def _mark(model: PlainModel, clip: Clip) -> str:
    """Return the mark of a clip's language. Raises DataError for a language that the model does not name."""
    known = getattr(getattr(model.source, "generation_config", None), "lang_to_id", None) or {}
    mark = f"<|{clip.language}|>"
    if mark not in known:
        names = ", ".join(sorted(name.strip("<|>") for name in known)) or "none"
        raise DataError(f"{clip.name} is of the language {clip.language!r}; the model names {names}")
    return mark


def _is_text(tokenizer: Any, ids: Tensor) -> Tensor:
    """Return which ids are text: not special, not a task, a language or a time (`<|...|>`)."""
    special = set(tokenizer.all_special_ids)
    words = tokenizer.convert_ids_to_tokens(ids.tolist())
    marked = [str(word).startswith("<|") and str(word).endswith("|>") for word in words]
    flags = [number in special or mark for number, mark in zip(ids.tolist(), marked, strict=True)]
    return ~torch.tensor(flags)
