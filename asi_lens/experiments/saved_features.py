"""Features that a random start loses and ASI keeps, each beside a feature as frequent that both keep alive.

ASI projects the directions that the random start draws from the same seed, so feature i is the same draw in
both dictionaries. Features are looked at on held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import OptionError, require_whole
from asi_lens.experiments.runs import TrainedRun
from asi_lens.inputs.corpora import Tokens
from asi_lens.results.beyond_rows import SavedFeatureRow
from asi_lens.sae.firings import find_firings
from asi_lens.sae.meaning import ablation_effects, token_information

SAVED: Literal["saved by ASI"] = "saved by ASI"
ALIVE: Literal["alive either way"] = "alive either way"


def runs_by_seed(runs: Iterable[TrainedRun]) -> dict[int, dict[str, TrainedRun]]:
    """Return runs by seed and by the name of their recipe."""
    out: dict[int, dict[str, TrainedRun]] = {}
    for run in runs:
        out.setdefault(run.seed, {})[run.recipe.name] = run
    return out


def saved_features(
    random: TrainedRun,
    asi: TrainedRun,
    store: ActivationStore,
    tokens: Tokens,
    model: nn.Module,
    loss_tokens: Tokens,
    n: int,
) -> list[SavedFeatureRow]:
    """Return up to `n` pairs of features of the ASI dictionary: one saved, one alive either way.

    Saved features never fire on the rows in the random start's dictionary, and at least twice in ASI's. They
    are taken evenly over their frequencies. The partner of each is the feature alive in both dictionaries
    whose number of firings is nearest, and no feature is taken twice. Where fewer than `n` are saved, others
    that are alive either way stand alone.

    Raises OptionError for runs of different seeds or widths.
    """
    require_whole("n", n, 1)
    if (random.seed, random.config.d_sae) != (asi.seed, asi.config.d_sae):
        raise OptionError("runs of different seeds or widths have no feature in common")
    sae = asi.sae()
    lost = find_firings(random.sae(), store, top=1, sampled=1, progress=False).counts
    about = token_information(sae, store, tokens).set_index("feature")
    kept = torch.zeros(sae.d_sae, dtype=torch.int64)  # features that fire once are not asked for
    kept[torch.tensor(about.index.to_numpy())] = torch.tensor(about.firings.to_numpy())
    pairs = pairs_of(lost, kept, n)
    features = [feature for pair in pairs for feature in pair if feature is not None]
    effects = ablation_effects(sae, model, loss_tokens, features, progress=False).set_index("feature")
    rows = []
    for number, pair in enumerate(pairs):
        for group, feature in ((SAVED, pair[0]), (ALIVE, pair[1])):
            if feature is None:
                continue
            increase = float(effects.loss_increase[feature])
            rows.append(
                SavedFeatureRow(
                    model=str(store.metadata["model"]),
                    corpus=str(store.metadata["corpus"]),
                    n_tokens=store.n,
                    site=str(store.metadata["site"]),
                    layer=int(store.metadata["layer"]),
                    d_sae=asi.config.d_sae,
                    k=asi.config.k,
                    seed=asi.seed,
                    pair=number,
                    group=group,
                    feature=feature,
                    firings=int(kept[feature]),
                    entropy=float(about.entropy[feature]),
                    information=float(about.information[feature]),
                    loss_increase=None if math.isnan(increase) else increase,
                )
            )
    return rows


def pairs_of(lost: torch.Tensor, kept: torch.Tensor, n: int) -> list[tuple[int | None, int]]:
    """Return pairs of features from firings [d_sae] in both dictionaries, as `saved_features` says."""
    saved = _evenly((lost == 0) & (kept > 1), kept, n)
    free = ((lost > 1) & (kept > 1)).nonzero()[:, 0].tolist()
    pairs: list[tuple[int | None, int]] = []
    for feature in saved[: len(free)]:
        partner = _nearest(free, kept, int(kept[feature]))
        free.remove(partner)
        pairs.append((feature, partner))
    left = torch.zeros(len(kept), dtype=torch.bool)
    left[free] = True
    return pairs + [(None, feature) for feature in _evenly(left, kept, n - len(pairs))]


def _evenly(chosen: torch.Tensor, kept: torch.Tensor, n: int) -> list[int]:
    """Return up to `n` of the chosen features, evenly over their order by firings."""
    features = chosen.nonzero()[:, 0]
    features = features[kept[features].argsort(stable=True)]
    if len(features) > n:
        features = features[torch.linspace(0, len(features) - 1, n).round().long()] if n else features[:0]
    return [int(feature) for feature in features]


def _nearest(free: Sequence[int], kept: torch.Tensor, firings: int) -> int:
    return min(free, key=lambda other: abs(math.log(int(kept[other]) / firings)))
