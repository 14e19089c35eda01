"""What a feature means: the contexts it fires in, its effect on the logits, its place in the dictionary.

`Features` joins a dictionary, the rows it is looked at on, and the text of these rows. A `Card` holds the
facts of one feature, which `browse` draws.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.spectrum import Spectrum
from asi_lens.activations.store import ActivationStore
from asi_lens.base.doors import checked
from asi_lens.base.errors import UnsupportedModelError, require, require_whole
from asi_lens.base.sites import SITES
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.fingerprint import model_fingerprint
from asi_lens.inputs.float32 import in_float32
from asi_lens.inputs.same_origin import require_model_of, require_text_of
from asi_lens.sae.cards import Card, Context
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.drift import subspace_share
from asi_lens.sae.firings import Firings, find_firings
from asi_lens.sae.initialize import auto_d_init

# Tokens whose final residual stream the effect on the logits is averaged over.
_LOGIT_SEQUENCES, _LOGIT_CONTEXT = 4, 64
_AROUND = (16, 8)


@checked
class Features:
    """A dictionary looked at on the rows of a store and their text.

    Attributes:
        sae, store, tokens, model: as given. firings: of every feature on the store.
        inside: share of each decoder row's squared norm in the active subspace [d_sae].
        d_init: dimensions of that subspace.
    """

    sae: Any
    store: Any
    _kept: tuple[str, models.ResumePoint, Tensor] | None = None
    """What `_clean` returned last, after the fingerprint of the model."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        store: ActivationStore | PairedStores,
        tokens: Tokens,
        model: nn.Module,
        *,
        d_init: int | None = None,
        top: int = 16,
        sampled: int = 16,
        seed: int = 0,
        progress: bool = True,
    ):
        """Read the store once (`find_firings`).

        Args:
            tokens: what the store was harvested from.
            model: whose tokenizer and logits are shown.
            d_init: dimensions of the active subspace; by default those that the dictionary started with, or
                "auto" of the store's spectrum.

        Raises OptionError for a store without tokens, for other tokens or another model than the store's, or
        for a dictionary of another width than the store.
        """
        self.sae, self.store, self.tokens, self.model = sae, store, tokens, model
        rows = store.inputs if isinstance(store, PairedStores) else store
        self._rows = rows
        require_text_of("the store", rows.metadata.get("tokens_fingerprint"), tokens)
        require_model_of("the store", rows.metadata, model)
        self.firings: Firings = find_firings(
            sae, store, top=top, sampled=sampled, seed=seed, progress=progress
        )
        started = sae.initialization.get("d_init")
        self._look_inside(store.spectrum, d_init or (started if isinstance(started, int) else None))

    def _look_inside(self, spectrum: Spectrum, d_init: int | None) -> None:
        """Set `d_init` ("auto" of the spectrum for None) and `inside`."""
        self.d_init = d_init or auto_d_init(spectrum)
        rows = self.directions
        basis = spectrum.active_subspace(self.d_init).float().to(rows.device)
        self.inside: Float[Tensor, " d_sae"] = subspace_share(rows, basis).cpu()

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return int(self.sae.d_sae)

    @property
    def directions(self) -> Float[Tensor, "d_sae d_out"]:
        """The features' decoder rows."""
        rows: Tensor = self.sae.W_dec.detach()
        return rows

    @property
    def site(self) -> str:
        """Site, layer, model and corpus of the store, in words."""
        about = {key: self.store.metadata.get(key, "?") for key in ("site", "layer", "model", "corpus")}
        return "{site} {layer} of {model} on {corpus}".format(**about)

    @property
    def trained_elsewhere(self) -> str:
        """Which other model's activations the dictionary was trained on, in words; "" for this model's."""
        theirs, ours = (about.get("model") for about in (self.sae.config.metadata, self.store.metadata))
        return "" if theirs in (None, ours) else f"; the dictionary was trained on {theirs}"

    def card(self, feature: int, *, n_logits: int = 8, n_similar: int = 6) -> Card:
        """Return the facts of one feature. Raises OptionError for a feature that does not exist."""
        self._require(feature)
        most = models.model_info(self.model, fingerprint=False).d_vocab
        require(0 <= n_logits <= most, "n_logits", n_logits, f"from 0 to {most}")
        mean = self.firings.mean[feature].item()
        fires = int(self.firings.counts[feature]) > 0
        raised, lowered, why = [], [], "" if fires else "the feature never fires here"
        try:
            effect = self.logit_effect(feature) if fires else None
        except UnsupportedModelError as error:
            effect, why = None, str(error)
        if effect is not None:
            raised, lowered = (
                [(self.word(i), v) for v, i in zip(*map(Tensor.tolist, found), strict=True)]
                for found in (effect.topk(n_logits), effect.topk(n_logits, largest=False))
            )
        return Card(
            feature,
            self.site,
            self.firings.frequency[feature].item(),
            mean if fires else None,
            self.inside[feature].item(),
            self.contexts(feature, "top"),
            self.contexts(feature, "sampled"),
            raised,
            lowered,
            why,
            self.similar(feature, n_similar),
        )

    def contexts(
        self, feature: int, which: str = "top", before: int = _AROUND[0], after: int = _AROUND[1]
    ) -> list[Context]:
        """Return the stretches of text around a feature's firings, from the largest value down.

        `which` is "top" or "sampled"; `before` and `after` count tokens around the firing.
        """
        self._require(feature)
        require(which in ("top", "sampled"), "which", which, "'top' or 'sampled'")
        require_whole("before", before, 0)
        require_whole("after", after, 0)
        picks = self.firings.top if which == "top" else self.firings.sampled
        rows = picks.rows[feature][picks.rows[feature] >= 0]
        if not len(rows):
            return []
        near = rows[:, None] + torch.arange(-before, after + 1)
        near = near.clamp(0, self.firings.n - 1)
        values = self._values(near.flatten(), feature).view(near.shape)
        places = self._positions(near.flatten()).view(*near.shape, 2)
        here = self._positions(rows)
        found = []
        for (sequence, position), theirs, at in zip(here.tolist(), values, places, strict=True):
            known = {p: v for (s, p), v in zip(at.tolist(), theirs.tolist(), strict=True) if s == sequence}
            start = max(0, position - before)
            ids = self.tokens.ids[sequence, start : position + after + 1].tolist()
            shown = [known.get(start + i, 0.0) for i in range(len(ids))]
            found.append(Context([self.word(i) for i in ids], shown, position - start, sequence, position))
        return sorted(found, key=lambda context: -context.value)

    def similar(self, feature: int, n: int = 6) -> list[tuple[int, float]]:
        """Return the `n` features whose decoder rows have the largest cosine with this one's."""
        self._require(feature)
        require_whole("n", n, 0)
        rows = self.directions
        cosines = (rows @ rows[feature]) / (rows.norm(dim=1) * rows[feature].norm()).clamp_min(1e-30)
        cosines[feature] = -2
        values, numbers = cosines.topk(min(n, len(rows) - 1))
        return list(zip(numbers.tolist(), values.tolist(), strict=True))

    def written(self, feature: int) -> Float[Tensor, " d_out"]:
        """Return what a feature adds to the reconstruction per unit of its value, in raw units."""
        self._require(feature)
        return self.directions[feature] / self._scale

    @torch.no_grad()
    def logit_effect(self, feature: int) -> Float[Tensor, " d_vocab"]:
        """Return how a feature at its mean value moves the logits directly: mean change, less its mean.

        The feature's raw contribution is added to the final residual stream of real text, which goes through
        the model's own final norm and unembedding; the changes are averaged over 4 x 64 positions. Effects
        through later layers are not in it. The model computes in float32 (`in_float32`): half precision
        rounds a small contribution away.

        Raises UnsupportedModelError for a site that does not add to the residual stream, z of a layer whose
        output is normed or scaled first, or a model without logits, and as `in_float32`.
        """
        self._require(feature)
        why = self._why_no_logits()
        if why:
            raise UnsupportedModelError(why)
        push = self.written(feature) * self.firings.mean[feature].to(self.directions)
        weights = model_fingerprint(self.model)
        with in_float32(self.model):
            if self.store.metadata.get("site") == "z":
                W_O = models.output_projection(self.model, int(self.store.metadata["layer"]))
                push = push.to(W_O) @ W_O.reshape(-1, W_O.shape[-1])
            start, clean = self._clean(weights)
            change = self._final_logits(start, push) - clean
        return (change - change.mean()).float()

    def _clean(self, weights: str) -> tuple[models.ResumePoint, Float[Tensor, " d_vocab"]]:
        """Return the pass of the model up to its last layer on some text, and the mean logits of that text.

        It is asked for inside `in_float32` alone. Both are kept for the model's next feature, under the
        fingerprint of its `weights`.
        """
        if self._kept is None or self._kept[0] != weights:
            ids = self.tokens.ids[:_LOGIT_SEQUENCES, :_LOGIT_CONTEXT]
            start = models.capture_resume(self.model, ids, self._last_layer)
            self._kept = weights, start, self._final_logits(start, torch.zeros(()))
        return self._kept[1:]

    @cached_property
    def _last_layer(self) -> int:
        return models.model_info(self.model, fingerprint=False).n_layers - 1

    def _final_logits(self, start: models.ResumePoint, push: Tensor) -> Float[Tensor, " d_vocab"]:
        """Return the mean logits, float64, with `push` added to the final residual stream."""
        ids, last = start.ids, models.hook_name(self.model, "resid_post", self._last_layer)
        hooks = {last: lambda x: x + push.to(x)}
        logits = models.forward(self.model, ids, hooks, logits=True, start=start)
        assert logits is not None  # asked for
        return logits[:, 1:].mean((0, 1), dtype=torch.float64).cpu()

    def search(self, text: str, n: int = 20) -> list[int]:
        """Return features that fire strongly on a token that contains `text`, by their largest value there.

        Only the strongest firings of each feature are looked at (`top` of them).
        """
        require(bool(text), "text", text, "not empty")
        require_whole("n", n, 0)
        rows, values = self.firings.top.rows, self.firings.top.values
        known = rows >= 0
        places = self._positions(rows[known])
        ids = self.tokens.ids[places[:, 0], places[:, 1]]
        kinds, which = ids.unique(return_inverse=True)
        hit = torch.tensor([text in self.word(i) for i in kinds.tolist()], dtype=torch.bool)
        scores = torch.zeros(values.shape)
        scores[known] = values[known] * hit[which]
        best = scores.amax(1)
        order = best.argsort(descending=True, stable=True)[:n]
        return [int(i) for i in order if best[i] > 0]

    def choice(self, n: int = 8) -> dict[str, list[int]]:
        """Return a fixed choice of features: the `n` most frequent, `n` around the median, the `n` rarest."""
        require_whole("n", n, 1)
        alive = self.firings.counts.nonzero()[:, 0]
        order = alive[self.firings.counts[alive].argsort(descending=True, stable=True)].tolist()
        middle = max(0, len(order) // 2 - n // 2)
        return {
            "most frequent": order[:n],
            "median": order[middle : middle + n],
            "rarest": order[-n:][::-1],
        }

    @cached_property
    def _words(self) -> dict[int, str]:
        return {}

    def word(self, token: int) -> str:
        """Return the text of a token id."""
        if token not in self._words:
            require(0 <= token < 2**32, "token", token, "the id of a token")
            self._words[token] = str(models.tokenizer_of(self.model).decode([token]))
        return self._words[token]

    def _require(self, feature: int) -> None:
        require_whole("feature", feature, 0)
        require(feature < self.d_sae, "feature", feature, f"from 0 to {self.d_sae - 1}")

    @property
    def _scale(self) -> Tensor:
        """Factor on raw outputs before they are normalized."""
        scale: Tensor = self.sae.written_normalization[1]
        return scale

    def _positions(self, rows: Int[Tensor, " n"]) -> Int[Tensor, "n 2"]:
        """Return sequence and position of rows."""
        return self._rows.positions(rows)

    def _why_no_logits(self) -> str:
        """Return why the feature's direct effect on the logits is not known; empty if it is."""
        site = self.store.metadata.get("site")
        if site not in SITES:
            return f"{site} does not add to the residual stream, so it has no direct effect on the logits"
        if not models.model_info(self.model, fingerprint=False).causal:
            return "the model does not predict next tokens"
        return self._why_not_added() if site == "z" else ""

    def _why_not_added(self) -> str:
        """Return why the stream does not get what attention writes, z W_O; empty if it does."""
        if models.attention_write_site(self.model) != "attn_out":
            return "what the layer writes is normed or scaled before it is added to the residual stream"
        return ""

    @torch.no_grad()
    def _values(self, index: Tensor, feature: int) -> Tensor:
        """Return a feature's values on the rows at `index`."""
        rows, which = index.unique(return_inverse=True)
        code = self.sae.encode(self._rows.rows(rows))
        return (code.values * (code.indices == feature)).sum(-1).cpu()[which]
