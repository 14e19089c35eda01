"""Base classes of kinds that fire on any number of features.

A code is as wide as the row with most features. Shorter rows are padded with zeros, which did not fire.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from asi_lens.base.errors import OptionError
from asi_lens.kernels.codes import SparseCode, flat_code
from asi_lens.kernels.topk import Workspace
from asi_lens.sae.kinds.kind import Kind, pre_activations


class FiresFreely(Kind):
    """A kind that fires on all features whose value is above zero."""

    has_threshold = True

    def values(
        self, z: Float[Tensor, "batch d_sae"], bias: Float[Tensor, " d_sae"]
    ) -> Float[Tensor, "batch d_sae"]:
        """Return values from pre-activations z (which include `bias`); zero for features that do not fire."""
        raise NotImplementedError

    def code(
        self,
        x: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        bias: Float[Tensor, " d_sae"],
        workspace: Workspace | None = None,
    ) -> SparseCode:
        """See `Kind.code`."""
        blocks = (self.values(z, bias) for z in pre_activations(x, encoder, bias))
        picks = flat_code((values > 0, values) for values in blocks)
        return picks._replace(values=picks.values.to(bias.dtype)).code(len(x))

    def set_threshold(self, b_enc: Float[Tensor, " d_sae"], threshold: float) -> None:
        """See `Kind.set_threshold`. Lowers b_enc, since the kind has no threshold of its own."""
        b_enc.sub_(threshold)


class Thresholded(FiresFreely):
    """A kind with value z if z > threshold, else 0, and never below 0: base of JumpReLU and BatchTopK."""

    threshold: Tensor

    saelens = "jumprelu"
    saelens_transcoder = "jumprelu_transcoder"
    saelens_names: ClassVar[Mapping[str, str]] = {"threshold": "activation.threshold"}
    # A feature with an infinite threshold never fires.
    may_be_infinite = ("threshold",)

    def values(self, z: Tensor, bias: Tensor) -> Tensor:
        """See `FiresFreely.values`."""
        return relu(z) * (z > self.threshold.to(z))

    def set_threshold(self, b_enc: Float[Tensor, " d_sae"], threshold: float) -> None:
        """See `Kind.set_threshold`."""
        self.threshold.data.fill_(threshold)

    def rescale(self, factor: float) -> None:
        """See `Kind.rescale`."""
        self.threshold.data.mul_(factor)

    def folded(self, scale: Float[Tensor, ""], shift: Tensor | None = None) -> dict[str, Tensor]:
        """See `Kind.folded`."""
        return {"threshold": self.threshold.detach() / scale}

    def to_saelens(self, folded: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
        """See `Kind.to_saelens`. Writes one threshold for each feature."""
        if bool((folded["threshold"] < 0).any()):
            raise OptionError(
                f"{folder} cannot hold thresholds below zero, which SAELens does not have; zero is the same "
                "function"
            )
        wide = folded["threshold"].expand(len(folded["b_enc"])).contiguous()
        return {**folded, "threshold": wide}

    @staticmethod
    def from_saelens(tensors: dict[str, Tensor], shift: Tensor | None) -> dict[str, Tensor]:
        """See `Kind.from_saelens`. A threshold below zero is read as zero, which is the same function."""
        name = "activation.threshold"
        return {**Kind.from_saelens(tensors, shift), name: tensors[name].clamp_min(0)}
