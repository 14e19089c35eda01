"""What a Lorsa's unit does: the contexts it writes in, the positions it reads from, its effect on the logits.

`UnitFeatures` shows the units of a Lorsa as `Features` shows the features of a dictionary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from asi_lens.activations.spectrum import Spectrum
from asi_lens.base.doors import checked
from asi_lens.base.errors import require, require_whole
from asi_lens.inputs.corpora import Tokens
from asi_lens.inputs.same_origin import require_model_of, require_text_of
from asi_lens.kernels.codes import SparseCode
from asi_lens.lorsa.contexts import read_from
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.lorsa import Lorsa
from asi_lens.sae.cards import Card, Context, Reading
from asi_lens.sae.features import Features
from asi_lens.sae.firings import Firings, count_firings

# Values z~ [sequence position unit] held at a time.
_BLOCK = 2**25


@checked
class UnitFeatures(Features):
    """Units of a Lorsa looked at on the sequences of its layer and their text.

    Rows are the positions that count; a unit's value is its size, of either sign. Decoder rows are `W_O`, and
    the subspace is that of the layer's outputs. Attributes as of `Features`; `sae` is the Lorsa.
    """

    def __init__(
        self,
        lorsa: Lorsa,
        pairs: SequencePairs,
        tokens: Tokens,
        model: nn.Module,
        *,
        d_init: int | None = None,
        top: int = 16,
        sampled: int = 16,
        n_reads: int = 4,
        seed: int = 0,
        progress: bool = True,
    ):
        """Read the sequences once.

        Args:
            tokens: text that the pairs were harvested from.
            model: whose tokenizer and logits are shown.
            d_init: dimensions of the active subspace; by default "auto" of the outputs' spectrum. (The
                dimensions that a Lorsa started with are of each head's values.)
            top, sampled, seed: as in `Features`.
            n_reads: positions shown that a unit read from, at each of its largest values.

        Raises OptionError for pairs without tokens, other tokens or another model than theirs, or a Lorsa of
        another width.
        """
        self.sae, self.store, self.tokens, self.model = lorsa, pairs, tokens, model
        require_whole("n_reads", n_reads, 0)
        self.n_reads = n_reads
        require_text_of("the pairs", pairs.metadata.get("tokens"), tokens)
        require_model_of("the pairs", pairs.metadata, model)
        require(pairs.d == lorsa.d_in, "pairs", f"of width {pairs.d}", f"of width d_in={lorsa.d_in}")
        codes = self._codes()
        self.firings: Firings = count_firings(codes, lorsa.n_ov, pairs.n, top, sampled, seed, progress)
        self._look_inside(Spectrum.from_moments(pairs.output_moments), d_init)

    @property
    def site(self) -> str:
        """Layer, model and corpus of the pairs, in words."""
        about = {key: self.store.metadata.get(key, "?") for key in ("layer", "model", "corpus")}
        return "attention of layer {layer} of {model} on {corpus}".format(**about)

    @property
    def directions(self) -> Float[Tensor, "n_ov d_out"]:
        """The units' rows of `W_O`."""
        rows: Tensor = self.sae.W_O.detach()
        return rows

    def card(self, feature: int, *, n_logits: int = 8, n_similar: int = 6) -> Card:
        """Return the facts of one unit, its head among them. Raises OptionError for an unknown unit."""
        card = super().card(feature, n_logits=n_logits, n_similar=n_similar)
        return dataclasses.replace(card, head=self.sae.head_of_unit[feature])

    def contexts(self, feature: int, which: str = "top", before: int = 16, after: int = 8) -> list[Context]:
        """Return the stretches of text around a unit's firings, as `Features.contexts` does.

        The strongest ones ("top") say which positions the unit read from (`Context.reads`).
        """
        found = super().contexts(feature, which, before, after)
        if which != "top":
            return found
        return [dataclasses.replace(one, reads=self.reads(feature, one)) for one in found]

    def reads(self, unit: int, context: Context) -> list[Reading]:
        """Return the `n_reads` positions that gave most to a unit's value at a firing, the largest first."""
        ids = self.tokens.ids[context.sequence]
        x = self.store.inputs[context.sequence][None]
        attention, parts = read_from(self.sae, x, unit, context.position)
        shares = parts / parts.sum()
        most = shares.topk(min(self.n_reads, len(shares)))
        return [
            Reading(self.word(int(ids[place])), place, attention[place].item(), share)
            for share, place in zip(most.values.tolist(), most.indices.tolist(), strict=True)
        ]

    @property
    def _scale(self) -> Tensor:
        scale: Tensor = self.sae.output_scale
        return scale

    def _positions(self, rows: Int[Tensor, " n"]) -> Int[Tensor, "n 2"]:
        each = self.store.context - 1  # position 0 does not count
        return torch.stack([rows // each, rows % each + 1], dim=-1)

    def _why_no_logits(self) -> str:
        return self._why_not_added()

    @torch.no_grad()
    def _codes(self) -> Iterator[tuple[int, SparseCode]]:
        """Yield the number of the first row of a block and the block's code, on the CPU, over all rows."""
        first = 0
        for block in self.store.blocks(self._at_once):
            code = self._code(block.x)
            yield first, code
            first += len(code.values)

    def _code(self, x: Float[Tensor, "batch position d_in"]) -> SparseCode:
        """Return units and sizes [positions that count, k] of sequences."""
        units, values = (part[:, 1:].flatten(0, 1).cpu() for part in self.sae.encode(x))
        return SparseCode(units, values.abs())

    @property
    def _at_once(self) -> int:
        return max(1, _BLOCK // (self.store.context * self.sae.n_ov))

    @torch.no_grad()
    def _values(self, index: Int[Tensor, " n"], feature: int) -> Float[Tensor, " n"]:
        """Return a unit's sizes on the rows at `index`."""
        each = self.store.context - 1
        sequences, which = (index // each).unique(return_inverse=True)
        sizes = []
        for some in sequences.split(self._at_once):
            code = self._code(self.store.inputs[some.to(self.store.inputs.device)])
            sizes.append((code.values * (code.indices == feature)).sum(-1).view(len(some), each))
        return torch.cat(sizes)[which, index % each]
