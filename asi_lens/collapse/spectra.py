"""Spectra of a model on a corpus, cached on disk one (site, layer) at a time.

The key of a cached file covers everything its numbers depend on: the model's weights and compute dtype, the
tokens, whether the first position is dropped, and the format's version. If more sites are asked for later,
the model runs only for the new sites.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asi_lens.activations.batch_rows import Given, rows_before
from asi_lens.activations.harvest import SiteLayer, batch_tokens_for, harvest, places
from asi_lens.activations.moments import TYPICAL_NOISE, Moments
from asi_lens.activations.moments_consumer import MomentsConsumer, moments_in
from asi_lens.activations.spectrum import Spectrum, warn_if_few
from asi_lens.base.doors import checked
from asi_lens.base.errors import CacheError, require
from asi_lens.base.facts import facts_html
from asi_lens.base.files import cache_key, file_name, locked
from asi_lens.base.paths import cache_dir, cached
from asi_lens.base.safetensors_io import read_tensors, save_tensors
from asi_lens.inputs import models
from asi_lens.inputs.fingerprint import cached_number, is_fixed, number_key

_FORMAT = "2"
_KIND = "moments"
_ABOUT = {"asi_lens_moments": _FORMAT}
_NOISE = "noise"
_SHOWN = 8  # sites of a table in a notebook
# Seconds between two saved states of a running pass.
_SAVE_EVERY = 300.0


@checked
class Spectra(Mapping[SiteLayer, Spectrum]):
    """Spectra by (site, layer), as in `spectra["attn_out", 15]`, with their model and corpus."""

    def __init__(self, spectra: Mapping[SiteLayer, Spectrum], model: models.ModelInfo, corpus: str):
        self._spectra = dict(spectra)
        self.model = model
        self.corpus = corpus

    def __getitem__(self, where: SiteLayer) -> Spectrum:
        try:
            return self._spectra[where]
        except (KeyError, TypeError):
            sites = sorted({site for site, _ in self._spectra})
            layers = sorted({layer for _, layer in self._spectra})
            raise KeyError(f"no spectrum of {where!r}; sites {sites}, layers {layers}") from None

    def __iter__(self) -> Iterator[SiteLayer]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    def records(self) -> list[dict[str, object]]:
        """Return one dict per (site, layer) with the columns of `01_rank_curves.csv`."""
        return [
            {
                "model": self.model.name,
                "corpus": self.corpus,
                "site": site,
                "layer": layer,
                "n_tokens": spectrum.n + spectrum.left_out,
                **spectrum.summary(),
            }
            for (site, layer), spectrum in self._spectra.items()
        ]

    def curve_records(self, layers: Sequence[int]) -> list[dict[str, object]]:
        """Return one dict per singular value at `layers` with the columns of `01_spectra.csv`."""
        return [
            {
                "model": self.model.name,
                "corpus": self.corpus,
                "site": site,
                "layer": layer,
                "d": spectrum.d,
                "n_tokens": spectrum.n + spectrum.left_out,
                "index": i,
                "index_fraction": i / spectrum.d,
                "relative_singular_value": value,
            }
            for (site, layer), spectrum in self._spectra.items()
            if layer in layers
            for i, value in enumerate(spectrum.relative_singular_values.tolist(), start=1)
        ]

    def __repr__(self) -> str:
        sites = sorted({site for site, _ in self})
        return f"Spectra({self.model.name} on {self.corpus}: {len(self)} spectra of {', '.join(sites)})"

    def _repr_html_(self) -> str:
        sites = list(dict.fromkeys(site for site, _ in self))
        few = sum(spectrum.is_few for spectrum in self.values())
        facts: dict[str, object] = {
            "spectra": len(self),
            "rows n": _from_to([spectrum.n for spectrum in self.values()], ",") if self else None,
            **{site: self._told(site) for site in sites[:_SHOWN]},
            "more sites": len(sites) - _SHOWN if len(sites) > _SHOWN else None,
            "warning": f"few rows in {few} of {len(self)}: ranks are biased downwards" if few else None,
        }
        return facts_html(f"Spectra of {self.model.name} on {self.corpus}", facts)

    def _told(self, site: str) -> str:
        """Return the layers of a site, and the ranges of its ranks over them, in words."""
        found = {layer: spectrum for (name, layer), spectrum in self.items() if name == site}
        ranks = [spectrum.effective_rank_fraction for spectrum in found.values()]
        dimensions = [spectrum.intrinsic_dimension(0.99) / spectrum.d for spectrum in found.values()]
        return (
            f"{len(found)} layers ({_from_to(found, '')}): effective rank / d {_from_to(ranks, '.3f')}, "
            f"directions for 99 % / d {_from_to(dimensions, '.3f')}"
        )


def _from_to(values: Iterable[int] | Iterable[float], form: str) -> str:
    ends = dict.fromkeys(format(end(values), form) for end in (min, max))
    return " to ".join(ends)


@checked
def collect_spectra(
    model: nn.Module,
    tokens: Given,
    sites: str | Iterable[str] = models.SITES,
    layers: Sequence[int] | None = None,
    *,
    drop_first: bool = True,
    drop_massive: bool = True,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Spectra:
    """Return the spectra of `sites` at `layers` (all by default), from the cache or one pass of the model.

    Position 0 of every sequence and rows with massive activations are left out (see `harvest.harvest`).
    With and without massive rows are one pass: whichever is asked for later is read from the cache.

    A running pass takes 8 d^2 bytes per (site, layer) for any number of tokens. Ctrl-C saves the state of
    the pass; the next call continues from there, with the same bits as a pass without a stop. With hooks that
    somebody added to the model, the pass runs every time and nothing is kept.

    Raises UnknownNameError, OptionError or UnsupportedModelError for a site or layer that the model does
    not have, DataError for activations that are not finite, CacheError for a damaged cache file.
    """
    wanted = places(model, sites, layers)
    info, batch_tokens = models.model_info(model), batch_tokens_for(model, batch_tokens)
    if not is_fixed(info.fingerprint):
        consumer = MomentsConsumer(wanted)
        options: dict[str, Any] = {"drop_massive": drop_massive, "left_out": consumer.leave_out}
        options |= {"batch_tokens": batch_tokens, "drop_first": drop_first, "progress": progress}
        harvest(model, tokens, [consumer], **options)
        found = {where: consumer.spectrum(where) for where in wanted}
        warn_if_few(found.values())
        return Spectra(found, info, tokens.corpus)
    folder = _folder(info, tokens, drop_first, batch_tokens)

    def absent() -> list[SiteLayer]:
        return [where for where in wanted if not _file(folder, where).exists()]

    # Looked for before the lock, as a complete cache may be read-only.
    with locked(folder) if absent() else nullcontext():
        if missing := absent():
            consumer = _run(model, tokens, missing, folder, drop_first, batch_tokens, progress)
            for where in missing:
                _write(_file(folder, where), consumer, where)
            _partial(folder, missing).unlink(missing_ok=True)
    spectra = {where: _read(_file(folder, where), f"{where[0]} {where[1]}", drop_massive) for where in wanted}
    warn_if_few(spectra.values())
    return Spectra(spectra, info, tokens.corpus)


@checked
def rank_growth(
    model: nn.Module,
    tokens: Given,
    sites: str | Iterable[str],
    layers: Sequence[int],
    *,
    steps: int = 5,
    drop_first: bool = True,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> list[dict[str, object]]:
    """Measure the effective rank on `steps` nested samples of the tokens, each half the next.

    Returns records with the columns of `01_rank_curves.csv`, smallest sample first. One pass, cached.
    """
    require(2 <= steps <= 12, "steps", steps, "from 2 to 12")
    wanted = places(model, sites, layers)
    info, batch_tokens = models.model_info(model), batch_tokens_for(model, batch_tokens)
    sizes = sorted({max(1, len(tokens) >> k) for k in range(steps)})
    key = {**_key(info, tokens, drop_first, batch_tokens), "pairs": wanted, "sizes": sizes}

    def measure() -> list[dict[str, object]]:
        consumer = MomentsConsumer(wanted)
        records: list[dict[str, object]] = []
        for start, size in itertools.pairwise([0, *sizes]):
            harvest(
                model,
                tokens[:size],
                [consumer],
                batch_tokens=batch_tokens,
                drop_first=drop_first,
                left_out=consumer.leave_out,
                start=start,
                progress=progress,
            )
            found = {where: consumer.spectrum(where) for where in wanted}
            records += Spectra(found, info, tokens.corpus).records()
        return records

    return cached_number(_KIND, key, measure)


def _run(
    model: nn.Module,
    tokens: Given,
    missing: Sequence[SiteLayer],
    folder: Path,
    drop_first: bool,
    batch_tokens: int,
    progress: bool,
) -> MomentsConsumer:
    """Run the pass, from a saved state if there is one; returns the consumer with its moments."""
    consumer = MomentsConsumer(missing)
    partial = _partial(folder, missing)
    done = 0
    if partial.exists():
        state, _ = _load(partial)
        done = int(state["done"])
        consumer.load_state(state)
    saved_at = time.monotonic()

    def save() -> None:
        save_tensors(partial, {"done": torch.tensor(done, device="cpu"), **consumer.state()}, _ABOUT)

    def after_batch(sequences: int) -> None:
        nonlocal done, saved_at
        done = sequences
        if time.monotonic() - saved_at > _SAVE_EVERY:
            save()
            saved_at = time.monotonic()

    try:
        harvest(
            model,
            tokens,
            [consumer],
            batch_tokens=batch_tokens,
            drop_first=drop_first,
            left_out=consumer.leave_out,
            start=done,
            after_batch=after_batch,
            progress=progress,
        )
    except KeyboardInterrupt:
        # A batch may be half counted: a state is saved only if every (site, layer) has the same rows.
        rows = rows_before(tokens, drop_first)[done]
        if done and all(consumer.n(where) == rows for where in missing):
            save()
        raise
    return consumer


def _key(info: models.ModelInfo, tokens: Given, drop_first: bool, batch_tokens: int) -> dict[str, object]:
    options = {"format": _FORMAT, "drop_first": drop_first, "batch_tokens": batch_tokens}
    return number_key(info.fingerprint, info.dtype, tokens.fingerprint, **options)


def _folder(info: models.ModelInfo, tokens: Given, drop_first: bool, batch_tokens: int) -> Path:
    key = cache_key(**_key(info, tokens, drop_first, batch_tokens))
    return cache_dir(_KIND) / file_name(info.name, tokens.corpus, key=key)


def _file(folder: Path, where: SiteLayer) -> Path:
    return cached(_KIND, f"{folder.name}/{where[0]}.{where[1]}.safetensors")


def _partial(folder: Path, missing: Sequence[SiteLayer]) -> Path:
    return folder / f"partial-{cache_key(missing=[list(where) for where in missing])}.safetensors"


def _write(path: Path, consumer: MomentsConsumer, where: SiteLayer) -> None:
    found = consumer.spectrum(where)
    moments, massive = consumer.moments.pop(where), consumer.massive.pop(where, None)
    out = {} if massive is None else {f"massive.{name}": t for name, t in massive.state().items()}
    # NaN: no tokens were left out
    rank = found.rank_with_massive or math.nan
    out |= {
        "eigenvalues": found.eigenvalues,
        "left_out": torch.tensor(found.left_out, device="cpu"),
        "rank_with_massive": torch.tensor(rank, dtype=torch.float64, device="cpu"),
    }
    save_tensors(path, {**moments.state(), **out}, {**_ABOUT, _NOISE: repr(found.noise)})


def _load(path: Path, *names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a cached file (those in `names`, or all) and its metadata."""
    return read_tensors(path, CacheError, "delete the file and run again", names, _ABOUT)


def _read(path: Path, name: str, drop_massive: bool) -> Spectrum:
    head, about = _load(path, "n", "mean", "eigenvalues", "left_out", "rank_with_massive")
    left_out, values = int(head["left_out"]), head["eigenvalues"]
    if left_out and not drop_massive:
        state, _ = _load(path)
        whole = moments_in(state, "").merge(moments_in(state, "massive."))
        return Spectrum.from_moments(whole, name=name)
    return Spectrum(
        values,
        head["mean"],
        int(head["n"]),
        lambda: Moments.from_state(_load(path)[0]).covariance,
        name=name,
        left_out=left_out,
        rank_with_massive=head["rank_with_massive"].item() if left_out else None,
        # Files of older versions do not state it.
        noise=float(about.get(_NOISE, TYPICAL_NOISE * values.sum().item())),
    )
