"""Do features mean something? Two numbers without a judge: what a firing tells of the token and of the loss.

Both compare a feature with what its frequency alone would give: entropies with those of as many tokens drawn
from the text, losses per firing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from asi_lens.activations.massive import massive_rows
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError, OptionError, require, require_whole
from asi_lens.collapse.interventions import next_token_loss, require_next_tokens
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.float32 import in_float32
from asi_lens.inputs.same_origin import require_text_of
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.firings import codes_in_order
from asi_lens.sae.read_site import site_read


@torch.no_grad()
def token_information(
    sae: SparseAutoencoder, store: ActivationStore, tokens: Tokens, *, draws: int = 16, seed: int = 0
) -> pd.DataFrame:
    """Return how much a feature's firing tells about the token it fires on, for features that fire twice.

    Columns: `feature`, `firings`, `entropy` (of the token ids on which it fires, bits), `entropy_matched` (of
    as many tokens drawn from the store's rows without replacement, mean over `draws`), `information` (the
    difference, 0 for a feature that fires at random). The plug-in estimate of an entropy from few tokens is
    too low, by the same amount on average for both.

    Raises OptionError for a store without positions, tokens that are not its own, or an option out of range.
    """
    require_whole("draws", draws, 1)
    require_whole("seed", seed, 0)
    places = store.positions(torch.arange(store.n, device="cpu"))
    require_text_of("the store", store.metadata.get("tokens_fingerprint"), tokens)
    ids = tokens.ids[places[:, 0], places[:, 1]]
    pairs, counts = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    base = int(ids.max()) + 1
    for first, code in codes_in_order(sae, store):
        row, column = (code.values > 0).nonzero(as_tuple=True)
        own, n = (code.indices[row, column] * base + ids[first + row]).unique(return_counts=True)
        # Counts of the same feature and token from several blocks are added.
        pairs, which = torch.cat([pairs, own]).unique(return_inverse=True)
        counts = torch.zeros(len(pairs), dtype=torch.int64).index_add_(0, which, torch.cat([counts, n]))
    features = pairs // base
    firings = torch.zeros(sae.d_sae, dtype=torch.int64).index_add_(0, features, counts)
    shares = counts.double() / firings[features]
    entropy = torch.zeros(sae.d_sae, dtype=torch.float64)
    entropy.index_add_(0, features, -shares * shares.log2())
    matched = _matched(ids.numpy(), sorted(set(firings[firings > 1].tolist())), draws, seed)
    table = pd.DataFrame(
        {"feature": range(sae.d_sae), "firings": firings.tolist(), "entropy": entropy.tolist()}
    )
    table = table[table.firings > 1].reset_index(drop=True)
    table["entropy_matched"] = table.firings.map(matched)
    return table.assign(information=table.entropy_matched - table.entropy)


def _matched(ids: np.ndarray, sizes: Sequence[int], draws: int, seed: int) -> dict[int, float]:
    """Return the mean entropy, in bits, of random draws of each size from the tokens."""
    generator = np.random.default_rng(seed)
    kinds = np.unique(ids, return_inverse=True)[1]
    found = dict.fromkeys(sizes, 0.0)
    for _ in range(draws):
        # The first n of one shuffle are a draw of n: a draw for every size at the price of one.
        shuffled = generator.permutation(kinds)
        counts = np.zeros(kinds.max() + 1)
        done = 0
        for size in sizes:
            counts += np.bincount(shuffled[done:size], minlength=len(counts))
            done = size
            some = counts[counts > 0] / size
            found[size] -= float((some * np.log2(some)).sum()) / draws
    return found


@torch.inference_mode()
def ablation_effects(
    sae: SparseAutoencoder,
    model: nn.Module,
    tokens: Tokens,
    features: Sequence[int],
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> pd.DataFrame:
    """Return what the language model loses when one feature's contribution is taken out of the activation.

    The feature's part of the reconstruction, value times decoder row in raw units, is subtracted from the
    activation wherever it fires; everything else of the activation stays. Position 0 and massive rows
    (`massive`) are never edited. The model computes in float32 (`in_float32`).

    Columns: `feature`, `firings` (on the edited positions), `loss_increase` (nats of next-token loss, summed
    over the text, per firing; NaN for a feature that does not fire), `error` (its standard error over
    sequences, NaN for fewer than two sequences).

    Raises OptionError for a feature that does not exist, a transcoder or a dictionary that does not say its
    site, DataError for a loss that is not finite, and the errors of `site_read`, `require_next_tokens`,
    `models.forward` and `in_float32`.
    """
    require(not sae.is_transcoder, "sae", "a transcoder", "an autoencoder, which edits what it reads")
    where = site_read(model, sae.config.metadata)
    if where is None:
        raise OptionError("sae='without a site' is not allowed; sae must be trained on a site that it states")
    for feature in features:
        require_whole("features", feature, 0)
        require(feature < sae.d_sae, "features", feature, f"from 0 to {sae.d_sae - 1}")
    require_next_tokens(model, tokens)
    hook = models.hook_name(model, *where)
    increases: dict[int, list[Tensor]] = {feature: [] for feature in features}
    firings = dict.fromkeys(features, 0)
    per_batch = max(1, batch_tokens // tokens.context)
    told = {"unit": "seq", "desc": "ablations", "disable": not progress}
    with in_float32(model), tqdm(total=len(tokens), **told) as bar:
        for ids in tokens.batches(per_batch):
            start = models.capture_resume(model, ids, where[1])
            seen: list[Tensor] = []
            clean = models.forward(model, ids, {hook: seen.append}, logits=True, start=start)
            before = _losses(clean, ids)
            code, (massive, _) = sae.encode(seen[0][:, 1:]), massive_rows(seen[0])
            values = code.values.masked_fill(massive[:, 1:, None].to(code.values.device), 0)
            for feature in features:
                value = (values * (code.indices == feature)).sum(-1, keepdim=True)
                fired = int((value > 0).sum())
                if not fired:
                    increases[feature].append(torch.zeros(len(ids), dtype=torch.float64))
                    continue
                firings[feature] += fired
                part = value * (sae.W_dec[feature] / sae.written_normalization[1])

                def without(x: Tensor, part: Tensor = part) -> Tensor:
                    return torch.cat([x[:, :1], x[:, 1:] - part.to(x)], 1)

                logits = models.forward(model, ids, {hook: without}, logits=True, start=start)
                increases[feature].append(_losses(logits, ids) - before)
            bar.update(len(ids))
    rows = []
    for feature, parts in increases.items():
        each, n = torch.cat(parts), firings[feature]
        total = each.sum().item() / n if n else math.nan
        if n and not math.isfinite(total):
            raise DataError(f"the loss without feature {feature} is not finite")
        error = each.std().item() * math.sqrt(len(each)) / n if n and len(each) > 1 else math.nan
        rows.append({"feature": feature, "firings": n, "loss_increase": total, "error": error})
    return pd.DataFrame(rows, columns=["feature", "firings", "loss_increase", "error"])


def _losses(logits: Tensor | None, ids: Tensor) -> Tensor:
    """Return the sum of the next-token losses of each sequence, nats, float64 on the CPU."""
    assert logits is not None  # asked for
    return next_token_loss(logits, ids.to(logits.device)).sum(1, dtype=torch.float64).cpu()
