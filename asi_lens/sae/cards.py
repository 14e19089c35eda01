"""The card of a feature: its facts, and the stretches of text that it fires in."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reading:
    """A position that a unit of an attention layer read from.

    Attributes:
        token, position: its text, and its place in the sequence. attention: weight in the head's pattern.
        share: its part of the unit's value; other parts may be negative, so it may exceed 1.
    """

    token: str
    position: int
    attention: float
    share: float


@dataclass(frozen=True)
class Context:
    """A stretch of text around a firing.

    Attributes:
        tokens: text of each token. values: the feature's value on each, 0 where it does not fire or where the
            store holds no row. at: place of the firing among them.
        sequence, position: of the firing, in the tokens of the store.
        reads: for units of an attention layer, the positions that gave most, the largest share first.
    """

    tokens: list[str]
    values: list[float]
    at: int
    sequence: int
    position: int
    reads: list[Reading] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The feature's value at the firing, in normalized units."""
        return self.values[self.at]


@dataclass(frozen=True)
class Card:
    """Facts of one feature.

    Attributes:
        feature: its number. site: what its dictionary is of, in words.
        frequency: share of tokens on which it fires. mean: its mean value there; None if it never fires.
        inside: share of the squared norm of its decoder row in the active subspace.
        top, sampled: contexts of its largest values, and of a random sample from the largest value down.
        raised, lowered: tokens whose logits the feature moves most, with the change at its mean value; empty
            if `no_logits` says why.
        similar: features with the most similar decoder rows, and the cosines.
        head: the query-key head of a unit of an attention layer; None for features.
    """

    feature: int
    site: str
    frequency: float
    mean: float | None
    inside: float
    top: list[Context]
    sampled: list[Context]
    raised: list[tuple[str, float]]
    lowered: list[tuple[str, float]]
    no_logits: str
    similar: list[tuple[int, float]]
    head: int | None = None
