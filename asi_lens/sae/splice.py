"""Losses of the language model with a reconstruction in place of an activation.

Sums over all predicted tokens run in float64. The clean and the ablated model run once for all dictionaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from asi_lens.base.errors import DataError, UnsupportedModelError, require
from asi_lens.collapse.interventions import loss_recovered, skip_outliers
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.own_tokens import require_own_tokens

Hooks = Mapping[str, models.Hook]
"""Hooks of a forward pass, by name."""


@dataclass(frozen=True)
class SpliceLosses:
    """Losses of the language model with the reconstruction in place of the activation.

    Losses are means over all predicted tokens, in nats. Position 0 of a sequence and massive rows are never
    edited, because the dictionary's data and the measured mean exclude them.
    """

    cross_entropy: float
    """With the reconstruction spliced in."""
    cross_entropy_clean: float
    cross_entropy_mean_ablated: float
    """With the site at its mean."""
    cross_entropy_delta: float
    """Spliced minus clean; 0 for a perfect reconstruction."""
    cross_entropy_delta_error: float | None
    """Standard error of `cross_entropy_delta` over sequences, taken as independent; None for one sequence."""
    loss_recovered: float | None
    """(ablated - spliced) / (ablated - clean); None if ablation changes nothing."""
    kl: float
    """KL(clean || spliced) of the next-token distributions, per token."""
    n_predictions: int
    """Predicted tokens: sequences times (context - 1)."""


@torch.inference_mode()
def hooked_losses(
    model: nn.Module,
    tokens: Tokens,
    layer: int,
    ablated: Hooks,
    spliced: Sequence[Hooks],
    *,
    site: str,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> list[SpliceLosses]:
    """Return losses of the language model under each of `spliced`, compared with clean and ablated losses.

    All hooks are in block `layer` or later, so the blocks below run once per batch. `site` names the edited
    site, for the progress bar and errors.

    Raises UnsupportedModelError for a model that does not predict next tokens, OptionError if there is no
    token to predict, DataError for a loss that is not finite.
    """
    info = models.model_info(model, fingerprint=False)
    if not info.causal:
        raise UnsupportedModelError(
            f"{info.name} ({info.architecture}) does not predict next tokens: no loss"
        )
    require_own_tokens(model, tokens)
    require(tokens.context >= 2, "context", tokens.context, "at least 2 (a first token predicts the next)")
    require(len(tokens) >= 1, "tokens", f"{len(tokens)} sequences", "at least one sequence")
    require(batch_tokens >= 1, "batch_tokens", batch_tokens, "at least 1")
    edits = [ablated, *spliced]
    # Sums for each sequence. The first list is of the clean model.
    sums: list[list[Tensor]] = [[] for _ in range(1 + len(edits))]
    divergences = [0.0] * len(edits)
    n = len(tokens) * (tokens.context - 1)
    with tqdm(
        total=n, unit="tok", unit_scale=True, desc=f"losses {site} {layer}", disable=not progress
    ) as bar:
        for ids in tokens.batches(max(1, batch_tokens // tokens.context)):
            start = models.capture_resume(model, ids, layer)

            def run(hooks: Mapping[str, Any], ids: Tensor = ids, start: Any = start) -> Tensor:
                logits = models.forward(model, ids, hooks, logits=True, start=start)
                assert logits is not None  # asked for
                return logits

            clean = _log_probabilities(run({}))
            targets = ids[:, 1:].to(clean.device).long()
            sums[0].append(_loss(clean, targets))
            p = clean.exp()
            for k, edit in enumerate(edits):
                edited = _log_probabilities(run(edit))
                sums[1 + k].append(_loss(edited, targets))
                if k > 0:
                    divergences[k] += _divergence(p, clean, edited)
            bar.update(ids.shape[0] * (tokens.context - 1))
    clean_each, ablated_each, *each = (torch.cat(parts) / (tokens.context - 1) for parts in sums)
    clean_loss, ablated_loss = clean_each.mean().item(), ablated_each.mean().item()
    out = []
    for own, divergence in zip(each, divergences[1:], strict=True):
        loss = own.mean().item()
        if not all(abs(x) < float("inf") for x in (loss, clean_loss, ablated_loss)):
            raise DataError(f"the cross-entropy with {site} of layer {layer} edited is not finite")
        recovered = loss_recovered(loss, clean_loss, ablated_loss)
        many = len(own) > 1
        error = (own - clean_each).std().item() / math.sqrt(len(own)) if many else None
        delta = loss - clean_loss
        out.append(SpliceLosses(loss, clean_loss, ablated_loss, delta, error, recovered, divergence / n, n))
    return out


def splice_through(coder: Callable[[Tensor], Tensor], read: str, write: str) -> Hooks:
    """Return hooks that apply `coder` to the activation at `read` and put the result at `write`.

    Position 0 and massive rows (`massive`) at `write` stay unchanged. If both are the same hook, `coder` does
    not receive position 0.
    """
    if read == write:
        return {write: skip_outliers(lambda x: coder(x).to(x))}
    seen: list[Tensor] = []

    def look(x: Tensor) -> None:
        seen[:] = [x]

    def put(y: Tensor) -> Tensor:
        return skip_outliers(lambda _: coder(seen.pop())[:, 1:])(y)

    return {read: look, write: put}


def _log_probabilities(logits: Float[Tensor, "batch position d"]) -> Float[Tensor, "batch predicted d"]:
    """Return log-probabilities of the next token after every position but the last, float32."""
    return logits[:, :-1].float().log_softmax(-1)


def _loss(
    log_p: Float[Tensor, "batch predicted d"], targets: Int[Tensor, "batch predicted"]
) -> Float[Tensor, " batch"]:
    """Return the sum of the cross-entropies of each sequence, in nats."""
    return -log_p.gather(-1, targets[..., None]).sum((1, 2), dtype=torch.float64).cpu()


def _divergence(
    p: Float[Tensor, "batch predicted d"],
    log_p: Float[Tensor, "batch predicted d"],
    log_q: Float[Tensor, "batch predicted d"],
) -> float:
    """Return the sum of KL(p || q) over all predictions, one sequence at a time to save memory."""
    parts = zip(p, log_p, log_q, strict=True)
    return sum(
        (one * (log_one - log_other)).sum(dtype=torch.float64).item() for one, log_one, log_other in parts
    )
