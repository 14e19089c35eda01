"""Moments of every place of one pass of the model, with the massive rows counted apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.activations.harvest import SiteLayer
from asi_lens.activations.moments import Moments
from asi_lens.activations.spectrum import Spectrum


class MomentsConsumer:
    """A harvest consumer that keeps the moments of every (site, layer) it wants.

    `moments`: of the rows. `massive`: of the rows that the pass left out, for places that have such rows.
    """

    def __init__(self, wants: Sequence[SiteLayer]):
        self.wants = tuple(wants)
        self.moments: dict[SiteLayer, Moments] = {}
        self.massive: dict[SiteLayer, Moments] = {}

    def consume(self, where: SiteLayer, rows: Float[Tensor, "n d"]) -> None:
        """Add one batch of rows."""
        _add(self.moments, where, rows)

    def leave_out(self, where: SiteLayer, tokens: Int[Tensor, " m"], rows: Float[Tensor, "m d"]) -> None:
        """Count rows that the pass leaves out (`harvest.LeftOut`)."""
        _add(self.massive, where, rows)

    def n(self, where: SiteLayer) -> int:
        """Return the number of tokens seen at a place, with those left out."""
        return sum(part[where].n for part in (self.moments, self.massive) if where in part)

    def spectrum(self, where: SiteLayer) -> Spectrum:
        """Return the spectrum of the rows so far."""
        name = f"{where[0]} {where[1]}"
        found, massive = Spectrum.from_moments(self.moments[where], name=name), self.massive.get(where)
        if massive is not None:
            whole = Spectrum.from_moments(self.moments[where].clone().merge(massive))
            found.left_out, found.rank_with_massive = massive.n, whole.effective_rank_fraction
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to store; names begin with the number of the place."""
        out: dict[str, Tensor] = {}
        for name, moments in (("", self.moments), ("massive.", self.massive)):
            for where, own in moments.items():
                out |= {f"{self.wants.index(where)}.{name}{key}": t for key, t in own.state().items()}
        return out

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        for k, where in enumerate(self.wants):
            for name, moments in (("", self.moments), ("massive.", self.massive)):
                if f"{k}.{name}n" in state:
                    moments[where] = moments_in(state, f"{k}.{name}")


def _add(moments: dict[SiteLayer, Moments], where: SiteLayer, rows: Float[Tensor, "n d"]) -> None:
    if len(rows):
        known = moments.get(where) or Moments.zeros(rows.shape[1])
        # A resumed pass has read its moments to the CPU: they are moved to the device of the rows.
        moments[where] = known.to(rows.device).update(rows)


def moments_in(state: Mapping[str, Tensor], prefix: str) -> Moments:
    """Return the moments stored under names with this prefix."""
    return Moments.from_state({k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)})
