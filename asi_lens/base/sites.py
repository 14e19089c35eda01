"""Sites of a model with a short name: their TransformerLens hooks, and their labels and colors in figures.

A new site is one entry here. Full hook names need no entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Site:
    """One site.

    Attributes:
        template: TransformerLens hook of the site, with `{}` for the layer.
        label, color, marker: name, color and marker of the site, the same in every figure.
        in_stream: whether the site is as wide as the residual stream.
        templates: hooks of architectures in which `template` is a different activation; keys are the start
            of the architecture's name.
    """

    template: str
    label: str
    color: str
    marker: str
    in_stream: bool = True
    templates: Mapping[str, str] = field(default_factory=dict)

    def hook(self, architecture: str) -> str:
        """Return the hook template for an architecture."""
        special = [name for start, name in self.templates.items() if architecture.startswith(start)]
        return special[0] if special else self.template


# Colors of Okabe and Ito, which remain distinct under color blindness.
SITES: dict[str, Site] = {
    # In a BERT layer, TransformerLens's `hook_attn_out` is the stream after attention and its norm. Attention
    # adds the output of its projection to the stream.
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
"""Sites by short name, in the order of every legend: the outputs of attention and the MLP, which are added to
the residual stream; the stream after a layer; and the heads' concatenated outputs before W_O
[n_heads * d_head]."""
