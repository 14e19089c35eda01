"""Pictures, speech and sequences to a model's inputs: `load_inputs`.

What `load_tokens` is for text, this is for everything else. The folder's own image processor, feature
extractor or tokenizer makes the inputs. Rows are real positions only: patches of a picture, 20 ms of real
audio, residues of a sequence. CLS, register and other special tokens and all padding are never rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, UnsupportedModelError, require, require_whole
from asi_lens.base.facts import facts_html
from asi_lens.base.safetensors_io import raw_bytes
from asi_lens.inputs import media_items, models, pictures, sequences, speech
from asi_lens.inputs.media_items import Made
from asi_lens.inputs.plain import PlainModel

__all__ = ["Inputs", "load_inputs"]

_TEXT_VOCABULARY = 256


@checked
@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs of a model and which of their positions are rows. `inputs[a:b]` are items a to b.

    Raises OptionError for arrays of other numbers of items than `kept`, and for an item without a row.
    """

    arrays: dict[str, Tensor]
    """Transformers' arguments by name, each [item ...], on the CPU."""
    kept: Bool[Tensor, "item position"]
    """Positions that are rows; CLS, special and padding positions are not."""
    corpus: str
    """Name of the data, for tables and figures."""
    kind: str
    """"pictures", "speech" or "sequences"."""
    tokenizer: str
    """Class and fingerprint of the processor or tokenizer that made the inputs."""

    def __post_init__(self) -> None:
        sizes = {name: len(value) for name, value in self.arrays.items()}
        require(
            set(sizes.values()) == {len(self.kept)},
            "arrays",
            sizes,
            f"as many items in each as in kept ({len(self.kept)})",
        )
        empty = (~self.kept.any(1)).nonzero().flatten().tolist()
        require(not empty, "kept", f"no position of items {empty[:8]}", "a row or more of each item")

    @property
    def fingerprint(self) -> str:
        """16 hex digits of the arrays and of which positions are rows, computed anew at every call."""
        import xxhash

        state = xxhash.xxh3_128()
        for name, value in [*sorted(self.arrays.items()), ("kept", self.kept)]:
            state.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            state.update(raw_bytes(value))
        return state.hexdigest()[:16]

    @property
    def context(self) -> int:
        """Positions of an item in the model, those that are not rows included."""
        return self.kept.shape[1]

    @property
    def n_rows(self) -> int:
        """Number of positions that are rows."""
        return int(self.kept.sum())

    def __len__(self) -> int:
        """Number of items."""
        return len(self.kept)

    def __getitem__(self, items: slice) -> Inputs:
        """Return a slice of the items, with its own fingerprint."""
        if not isinstance(items, slice):
            raise OptionError(f"inputs[{items!r}]: take items by a slice, inputs[:8], or use inputs.arrays")
        return Inputs(self.batch(items), self.kept[items], self.corpus, self.kind, self.tokenizer)

    def batch(self, items: slice) -> dict[str, Tensor]:
        """Return transformers' arguments for some items."""
        return {name: value[items] for name, value in self.arrays.items()}

    def _repr_html_(self) -> str:
        facts = {
            "items x positions": f"{len(self):,} x {self.context:,}",
            "rows": f"{self.n_rows:,} of {self.kept.numel():,} positions",
            "arrays": ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.arrays.items()),
            "made by": self.tokenizer,
            "fingerprint": self.fingerprint,
        }
        return facts_html(f"{self.kind.capitalize()} of {self.corpus}", facts)


@checked
def load_inputs(
    data: Any,
    model: nn.Module,
    n_rows: int | None = None,
    *,
    offset: int = 0,
    name: str | None = None,
    join: bool = False,
) -> Inputs:
    """Return inputs for a model of pictures or speech, or for an encoder of sequences.

    Items are taken in order until they hold `n_rows` rows; the last item is taken whole. All are kept in
    memory: 0.6 MB for a picture of 224 pixels, 1 MB for 30 s of speech.

    Args:
        data: a packaged name, a file or a folder of files, or a list of items. `pictures.open_picture`,
            `speech.open_clip` and `sequences.open_sequences` say which files and items there are.
        model: from `load_model`. What it takes decides what the data must be.
        n_rows: rows wanted; None for all of the data.
        offset: items to skip first. Items [0, n) and items from offset n on are different items, so they can
            be a training set and a held-out set.
        name: name of the data in tables and figures; by default that of the file, folder or package.
        join: speech only: lay clips end to end, so that short clips fill the model's 30 s.

    Raises:
        DataError: an item that is not what the model takes, fewer rows than asked for, fewer rows than the
            model is wide (a sample shorter than the width has no full spectrum).
        OptionError: an argument out of range, a causal language model (`load_tokens` is for text).
        UnsupportedModelError: a model whose folder has no processor or tokenizer.
    """
    require_whole("offset", offset, 0)
    if n_rows is not None:
        require_whole("n_rows", n_rows, 1)
    kind = kind_of_inputs(model)
    require(not join or kind == "speech", "join", join, f"False for {kind}")
    items = media_items.open_items(data, kind)
    made: list[Made] = []
    total = 0
    for one in _makers(join)[kind](model, items.items, offset):
        made.append(one)
        total += int(one.kept.sum())
        if n_rows is not None and total >= n_rows:
            break
    label = name or items.name
    width = models.model_info(model, fingerprint=False).d_model
    skipped = f" after skipping {offset:,}" if offset else ""
    there = f"{label} has {total:,} rows in {len(made):,} items{skipped}"
    if n_rows is not None and total < n_rows:
        raise DataError(f"{there}; asked for n_rows={n_rows:,}. Nothing is repeated")
    if total < width:
        raise DataError(f"{there}: a sample shorter than the model's width {width} has no full spectrum")
    fill = getattr(_tokenizer(model), "pad_token_id", None) or 0
    return Inputs(*_stacked(made, fill), label, kind, maker_name(model))


def _makers(join: bool) -> dict[str, Callable[[Any, Iterable[Any], int], Iterable[Made]]]:
    return {
        "pictures": pictures.made,
        "speech": lambda model, clips, offset: speech.made(model, clips, offset, join),
        "sequences": sequences.made,
    }


def kind_of_inputs(model: nn.Module) -> str:
    """Return "pictures", "speech" or "sequences". Raises OptionError for a causal language model."""
    if isinstance(model, PlainModel):
        return model.takes
    info = models.model_info(model, fingerprint=False)
    if info.causal:
        raise OptionError(
            f"model={info.name!r} is not allowed here; it is a language model: make its tokens with "
            "load_tokens(corpus, model, ...)"
        )
    return "sequences"


def data_kind(model: nn.Module) -> str:
    """Return what a model reads: "text", "pictures", "speech" or "sequences".

    Language models read text, as do encoders with a vocabulary of 256 tokens or more; encoders with a smaller
    one (residues of proteins) read sequences.
    """
    info = models.model_info(model, fingerprint=False)
    if not isinstance(model, PlainModel) and info.causal:
        return "text"
    kind = kind_of_inputs(model)
    return "text" if kind == "sequences" and info.d_vocab >= _TEXT_VOCABULARY else kind


def maker_name(model: nn.Module) -> str:
    """Return class and fingerprint of what makes a model's inputs: its processor, and its tokenizer."""
    import xxhash

    from asi_lens.inputs.tokenizing import fingerprint

    parts = []
    processor, tokenizer = getattr(model, "processor", None), _tokenizer(model)
    if processor is not None:
        digest = xxhash.xxh3_128_hexdigest(repr(sorted(_content(processor).items())).encode())[:16]
        parts.append(f"{type(processor).__name__}:{digest}")
    if tokenizer is not None:
        parts.append(f"{type(tokenizer).__name__}:{fingerprint(tokenizer)}")
    if not parts:
        name = models.model_info(model, fingerprint=False).name
        raise UnsupportedModelError(f"the folder of {name!r} has no processor and no tokenizer")
    return ", ".join(parts)


def _tokenizer(model: nn.Module) -> Any:
    """Return the tokenizer that makes a model's ids, or None for a model that takes none."""
    if isinstance(model, PlainModel):
        return model.tokenizer if model.cfg.d_vocab else None
    return sequences.tokenizer_of(model)


def _content(processor: Any) -> dict[str, Any]:
    return {key: value for key, value in processor.to_dict().items() if "name" not in key}


def _stacked(made: list[Made], fill: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the arrays and positions of all items, shorter ones filled up at their ends (ids: by `fill`)."""
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    arrays = {
        key: pad([one.arrays[key] for one in made], padding_value=fill if key.endswith("input_ids") else 0)
        for key in made[0].arrays
    }
    return arrays, pad([one.kept for one in made])
