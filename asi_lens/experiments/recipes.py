"""Named ways of training dictionaries, for comparison in notebooks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from asi_lens.base.errors import require, require_known
from asi_lens.sae.kinds import KINDS, kinds_with
from asi_lens.sae.scale import require_overshoot
from asi_lens.sae.search import SEARCHES
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.starts import find_start
from asi_lens.sae.starts.start import starts_with
from asi_lens.sae.transcoder_init import READERS
from asi_lens.training.config import TrainConfig

ALIGNED = ("start", "training")
"""When encoder and decoder rows are aligned."""


@dataclass(frozen=True)
class Recipe:
    """A way of training, named as in the figures' legends. Raises OptionError or UnknownNameError."""

    name: str
    init: str = "random"
    """Method of `sae.initialize`."""
    d_init: int | str | None = None
    """Dimensions of the active subspace, or "auto"."""
    optimizer: str = "adam"
    """As in `TrainConfig`."""
    aux_k: int | str = 0
    """As in `TrainConfig`."""
    center: bool = True
    """Subtract the mean from the input. False: the input keeps its mean, and `b_dec` starts at zero."""
    inside: bool = False
    """Train only on the coordinates in the active subspace (`sae.subspace`). For "asi" only."""
    activation: str = "topk"
    """As in `SAEConfig`."""
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    """Options of sparsity (`sae.sparsity`)."""
    reader: str | None = None
    """Start of a transcoder's encoder, one of `transcoder_init.READERS`; None for autoencoders."""
    whiten: float | int | None = None
    """Power of the input's spectrum in training: 0 whitens, 1 changes nothing (`shaped`), None is off. The
    trained dictionary is put back to raw activations exactly."""
    subspace_of: str | None = None
    """Name of another store (`train_recipes(subspaces=...)`) whose active subspace the start takes: of
    another text, or another layer. None for that of the training data. `d_init` "auto" is that of the
    training data either way."""
    aligned: str | None = None
    """One of `ALIGNED`: w_enc . w_dec = 1 for every feature, at the "start" (no search for the norm), or all
    through "training" (`sae.aligned`). None is off."""
    overshoot: float | int = 1.0
    """As in `sae.initialize`."""
    encoder_lr: float | int = 1.0
    """As in `TrainConfig`."""
    search: str = "exact"
    """Search for the top k, one of `search.SEARCHES`; "subspace" is for TopK autoencoders at full width."""

    def __post_init__(self) -> None:
        start = find_start(self.init)
        TrainConfig(optimizer=self.optimizer, aux_k=self.aux_k, encoder_lr=float(self.encoder_lr))
        require_known([self.activation], KINDS, "activation")
        fits = not self.inside or (self.init == "asi" and self.d_init is not None and self.center)
        require(fits, "inside", self.inside, "False, except for init='asi' with a d_init and center=True")
        if self.reader is not None:
            require_known([self.reader], READERS, "reader")
            fits = start.transcoders and self.center and not self.inside
            starts = starts_with(lambda start: start.transcoders)
            allowed = f"None, except for init={starts} with center=True and inside=False"
            require(fits, "reader", self.reader, allowed)
        fits = self.whiten is None or (0 <= self.whiten <= 4 and self.reader is None and not self.inside)
        allowed = "None, or from 0 to 4 for centered autoencoders at full width"
        require(fits and (self.whiten is None or self.center), "whiten", self.whiten, allowed)
        fits = self.subspace_of is None or (start.subspace and self.reader is None and not self.inside)
        allowed = "None, except for a start in a subspace, of an autoencoder at full width"
        require(fits, "subspace_of", self.subspace_of, allowed)
        if self.aligned is not None:
            require_known([self.aligned], ALIGNED, "aligned")
            fits = KINDS[self.activation].picks_k and start.norm is None and self.reader is None
            allowed = (
                f"None, except for {kinds_with('picks_k')} autoencoders whose start has no norm of its own, "
                "with overshoot=1"
            )
            require(fits and self.overshoot == 1, "aligned", self.aligned, allowed)
        require_overshoot(self.overshoot)
        require_known([self.search], SEARCHES, "search")
        plain = KINDS[self.activation].picks_k and not self.inside and self.reader is None
        plain = plain and self.aligned != "training"
        fits = self.search == "exact" or plain
        allowed = f"'exact', except for {kinds_with('picks_k')} autoencoders with inside=False"
        require(fits, "search", self.search, allowed)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("random"),
        Recipe("random + AuxK", aux_k="auto"),
        Recipe("ASI", "asi", "auto"),
        Recipe("ASI + sparse Adam", "asi", "auto", "sparse_adam"),
        Recipe("random, not centered", center=False),
        Recipe("inside the subspace", "asi", "auto", inside=True),
    )
}
"""The paper's comparison (C7, C9), the effect of centering alone, and training in the subspace alone."""


# Matryoshka's prefixes have the size of the dictionary divided by these numbers.
_PARTS = (16, 8, 4, 2)
_KINDS = {
    name: (kind, nested)
    for kind, about in KINDS.items()
    for name, nested in ((about.title, False), (f"Matryoshka {about.title}", True))
    if about.also_nested or not nested
}
DICTIONARIES = tuple(_KINDS)
"""Kinds of dictionary that `dictionary_recipe` knows."""


def dictionary_recipe(kind: str, d_sae: int) -> Recipe:
    """Return the recipe of a kind of dictionary with a random start, named after the kind.

    `dataclasses.replace` changes the start. Matryoshka's prefixes are a sixteenth, an eighth, a quarter and
    half of the dictionary. Raises UnknownNameError for a name that is not in `DICTIONARIES`.
    """
    require_known([kind], DICTIONARIES, "kind of dictionary")
    activation, nested = _KINDS[kind]
    sparsity = KINDS[activation].default
    if nested:
        sparsity = replace(sparsity, prefixes=tuple(d_sae // part for part in _PARTS))
    return Recipe(kind, activation=activation, sparsity=sparsity)


def find_recipe(given: Recipe | str) -> Recipe:
    """Return the given recipe, or the recipe of that name in `RECIPES`. Raises UnknownNameError."""
    if isinstance(given, Recipe):
        return given
    require_known([given], RECIPES, "recipe")
    return RECIPES[given]
