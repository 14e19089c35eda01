"""Cross-entropy with a site truncated to a subspace, ablated to its mean, or edited in any other way.

The layers below the edited layer are computed once per batch, and every edit resumes from there. A sweep
over ranks therefore runs only the layers above for each rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from asi_lens.activations.massive import massive_rows
from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, UnsupportedModelError, require
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.fingerprint import cached_number, number_key
from asi_lens.inputs.float32 import in_float32, loss_dtype
from asi_lens.inputs.own_tokens import require_own_tokens

# Takes an activation [batch position d] and returns the activation that replaces it.
Edit = Callable[[Tensor], Tensor]

_FORMAT = "2"


def project(mean: Float[Tensor, " d"], basis: Float[Tensor, "d r"]) -> Edit:
    """Return the edit x -> mean + (x - mean) B B^T.

    It keeps the part inside the span of B's orthonormal columns and sets the rest to its mean. Without
    columns it is mean ablation.
    """

    def edit(x: Tensor) -> Tensor:
        m, B = mean.to(x), basis.to(x)
        return m + (x - m) @ B @ B.T

    return edit


def mean_ablate(mean: Float[Tensor, " d"]) -> Edit:
    """Return the edit x -> mean, for every edited position."""
    return lambda x: mean.to(x).expand(*x.shape[:-1], -1).clone()


def skip_outliers(edit: Edit, also: Bool[Tensor, "batch position"] | None = None) -> Edit:
    """Return `edit` without position 0, massive rows (`massive`) and rows `also`, which stay as they are.

    The mean and the directions were measured without them.
    """

    def skipping(x: Tensor) -> Tensor:
        kept, _ = massive_rows(x)
        kept = kept if also is None else kept | also
        edited = edit(x[:, 1:]).to(x)
        return torch.cat([x[:, :1], torch.where(kept[:, 1:, None], x[:, 1:], edited)], dim=1)

    return skipping


def require_next_tokens(model: nn.Module, tokens: Tokens) -> None:
    """Raise UnsupportedModelError for a model without next-token losses, OptionError for others' tokens."""
    info = models.model_info(model, fingerprint=False)
    if not info.causal:
        raise UnsupportedModelError(
            f"{info.name} ({info.architecture}) does not predict next tokens: no loss"
        )
    require_own_tokens(model, tokens)


def next_token_loss(
    logits: Float[Tensor, "batch position vocabulary"], ids: Int[Tensor, "batch position"]
) -> Float[Tensor, "batch position-1"]:
    """Return the cross-entropy of each next token, in nats, computed in float32 for any model dtype."""
    predicted = rearrange(logits[:, :-1], "batch position vocabulary -> (batch position) vocabulary")
    losses = torch.nn.functional.cross_entropy(
        predicted.float(), ids[:, 1:].flatten().long(), reduction="none"
    )
    return rearrange(losses, "(batch position) -> batch position", batch=len(ids))


@checked
def cross_entropy(
    model: nn.Module, tokens: Tokens, *, batch_tokens: int = 2048, progress: bool = True
) -> float:
    """Return the mean next-token cross-entropy of the unedited model, in nats per token.

    The mean is over all predicted tokens; the model computes in float32 (`in_float32`). Raises DataError if
    the loss is not finite, UnsupportedModelError for a model that does not predict next tokens, OptionError
    for tokens of another model's tokenizer, and the errors of `in_float32`.
    """
    require_next_tokens(model, tokens)
    total = 0.0
    told = {"unit": "seq", "desc": "clean loss", "disable": not progress}
    with in_float32(model), models.held(model), tqdm(total=len(tokens), **told) as bar:
        for ids in _batches(tokens, batch_tokens):
            total += _summed_loss(models.forward(model, ids, {}, logits=True), ids, "clean")
            bar.update(ids.shape[0])
    return total / _predictions(tokens)


@checked
def edited_cross_entropy(
    model: nn.Module,
    tokens: Tokens,
    site: str,
    layer: int,
    edits: Mapping[str, Edit],
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> dict[str, float]:
    """Return the mean next-token cross-entropy (nats per token) under each edit of one site, by edit name.

    Raises as `cross_entropy` and `models.hook_name` do.
    """
    require_next_tokens(model, tokens)
    hook = models.hook_name(model, site, layer)
    totals = dict.fromkeys(edits, 0.0)
    told = {"unit": "seq", "desc": f"{site} {layer}", "disable": not progress, "leave": False}
    with in_float32(model), models.held(model), tqdm(total=len(tokens) * len(edits), **told) as bar:
        for ids in _batches(tokens, batch_tokens):
            resume = models.capture_resume(model, ids, layer)
            for name, edit in edits.items():
                logits = models.forward(model, ids, {hook: edit}, logits=True, start=resume)
                totals[name] += _summed_loss(logits, ids, name)
                bar.update(ids.shape[0])
    return {name: total / _predictions(tokens) for name, total in totals.items()}


@checked
def truncation_sweep(
    model: nn.Module,
    tokens: Tokens,
    spectra: Mapping[tuple[str, int], Spectrum],
    ranks: Sequence[float],
    *,
    random_ranks: Sequence[float] | None = None,
    random_seeds: Sequence[int] = (0,),
    batch_tokens: int = 2048,
    progress: bool = True,
) -> list[dict[str, object]]:
    """Measure the cross-entropy with each (site, layer) of `spectra` projected on r directions (claim C3).

    Returns one record per point with the columns of `02_downstream_loss.csv`. Losses are cached, one
    (site, layer) at a time: the layers below it run once for all of its points.

    Args:
        ranks: numbers of top directions of the spectrum, as fractions of the site's width in (0, 1].
        random_ranks: numbers of random directions, for comparison with the top directions; None is `ranks`.
        random_seeds: one random subspace per seed, the same for a site at every r (nested); () draws none.

    Position 0 and massive rows are not edited. The spectra should be measured on other tokens than `tokens`.
    Raises OptionError for a rank or seed out of range.
    """
    random_ranks = ranks if random_ranks is None else random_ranks
    _require_fractions(ranks=ranks, random_ranks=random_ranks)
    require(all(seed >= 0 for seed in random_seeds), "random_seeds", list(random_seeds), "of at least 0")
    require_next_tokens(model, tokens)
    info = models.model_info(model)
    dtype = loss_dtype(info.dtype)
    base = number_key(info.fingerprint, dtype, tokens.fingerprint, format=_FORMAT, batch_tokens=batch_tokens)
    clean = cached_number(
        "losses", base, partial(cross_entropy, model, tokens, batch_tokens=batch_tokens, progress=progress)
    )
    out: list[dict[str, object]] = []
    for (site, layer), spectrum in spectra.items():
        points: list[tuple[int | None, int]] = [(None, r) for r in _sizes(ranks, spectrum.d)]
        points += [(seed, r) for seed in random_seeds for r in _sizes(random_ranks, spectrum.d)]
        about = {
            **base,
            "left_alone": ["position 0", "massive rows"],
            "site": site,
            "layer": layer,
            "edits": ["mean", *(_name(*point) for point in points)],
            "spectrum": spectrum.fingerprint,
        }

        def measure(
            site: str = site, layer: int = layer, spectrum: Spectrum = spectrum, points: Any = points
        ) -> dict[str, float]:
            edits = _truncations(spectrum, points)
            return edited_cross_entropy(
                model, tokens, site, layer, edits, batch_tokens=batch_tokens, progress=progress
            )

        losses = cached_number("losses", about, measure)
        for seed, r in points:
            loss = losses[_name(seed, r)]
            out.append(
                {
                    "model": info.name,
                    "corpus": tokens.corpus,
                    "n_tokens": _predictions(tokens),
                    "site": site,
                    "layer": layer,
                    "subspace": "principal" if seed is None else "random",
                    "seed": seed,
                    "rank": r,
                    "rank_fraction": r / spectrum.d,
                    "cross_entropy": loss,
                    "cross_entropy_clean": clean,
                    "cross_entropy_mean_ablated": losses["mean"],
                    "loss_recovered": loss_recovered(loss, clean, losses["mean"]),
                }
            )
    return out


def _require_fractions(**given: Sequence[float]) -> None:
    for key, values in given.items():
        for rank in values:
            require(0 < rank <= 1, key, rank, "fractions of the width above 0 and at most 1")


def _sizes(ranks: Sequence[float], d: int) -> list[int]:
    return sorted({max(1, round(rank * d)) for rank in ranks})


def _name(seed: int | None, r: int) -> str:
    return f"principal {r}" if seed is None else f"random {seed} {r}"


def _truncations(spectrum: Spectrum, points: Sequence[tuple[int | None, int]]) -> dict[str, Edit]:
    """Return the edits of a sweep: mean ablation, then one projection per (seed, r).

    Seed None stands for the top directions of the spectrum.
    """
    frames: dict[int | None, Tensor] = {None: spectrum.eigenvectors}
    for seed in {point[0] for point in points} - {None}:
        assert seed is not None
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(spectrum.d, spectrum.d, generator=generator, dtype=torch.float64, device="cpu")
        frames[seed] = torch.linalg.qr(noise).Q
    edits = {"mean": skip_outliers(mean_ablate(spectrum.mean))}
    for which, r in points:
        edits[_name(which, r)] = skip_outliers(project(spectrum.mean, frames[which][:, :r]))
    return edits


def loss_recovered(loss: float, clean: float, ablated: float) -> float | None:
    """Return (ablated - loss) / (ablated - clean): 1 for the clean model, 0 for ablation, below 0 if worse.

    Returns None if ablation does not change the loss: the share is then undefined.
    """
    if math.isclose(clean, ablated, rel_tol=0.0, abs_tol=1e-9):
        return None
    return (ablated - loss) / (ablated - clean)


def _batches(tokens: Tokens, batch_tokens: int) -> Iterator[Int[Tensor, "batch position"]]:
    require(tokens.context >= 2, "context", tokens.context, "at least 2 (a first token predicts the next)")
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "at least 1")
    yield from tokens.ids.split(max(1, batch_tokens // tokens.context))


def _predictions(tokens: Tokens) -> int:
    return len(tokens) * (tokens.context - 1)


def _summed_loss(logits: Tensor | None, ids: Tensor, name: str) -> float:
    assert logits is not None  # asked for with logits=True
    total = next_token_loss(logits, ids.to(logits.device)).sum(dtype=torch.float64).item()
    if not math.isfinite(total):
        raise DataError(f"the cross-entropy under {name!r} is not finite")
    return total
