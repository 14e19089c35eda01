"""The sites of a model that have a short name: what each is called, where it lies, and how figures show it.

A new site is one entry here. Full hook names work everywhere without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Site:
    """One site.

    Attributes:
        template: its TransformerLens hook, with `{}` for the layer.
        label, color, marker: its name in figures, and the looks that it has in each of them.
        in_stream: whether it is as wide as the residual stream.
        templates: hooks of architectures where `template` is another thing, by the start of their name.
    """

    template: str
    label: str
    color: str
    marker: str
    in_stream: bool = True
    templates: Mapping[str, str] = field(default_factory=dict)

    def hook(self, architecture: str) -> str:
        """The template of an architecture."""
        special = [name for start, name in self.templates.items() if architecture.startswith(start)]
        return special[0] if special else self.template


# Colors are Okabe and Ito's, which stay apart under color blindness.
SITES: dict[str, Site] = {
    # TransformerLens calls a BERT layer's stream after attention and its norm `hook_attn_out`; what attention
    # itself adds to the stream is the output of its projection.
    "attn_out": Site(
        "blocks.{}.hook_attn_out",
        "attention output",
        "#D55E00",
        "circle",
        templates={"Bert": "blocks.{}.attn.o.hook_out"},
    ),
    "mlp_out": Site("blocks.{}.hook_mlp_out", "MLP output", "#0072B2", "square"),
    "resid_post": Site("blocks.{}.hook_resid_post", "residual stream", "#009E73", "diamond"),
    "z": Site("blocks.{}.attn.hook_z", "concatenated heads z", "#CC79A7", "triangle-up", in_stream=False),
}
"""What attention and the MLP add to the residual stream, the stream after a layer, and the heads' outputs
before W_O, side by side [n_heads * d_head]; in the order of every legend."""
