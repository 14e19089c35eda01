"""Sites of a model with a short name: their TransformerLens hooks, and their labels and colors in figures.

A new site is one entry here. Full hook names need no entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One site.

    Attributes:
        template: TransformerLens hook of the site in most architectures, with `{}` for the layer; in a given
            model, the hook is the one whose values are added to the stream (`inputs.identities`).
        label, color, marker: name, color and marker of the site, the same in every figure.
        in_stream: whether the site is as wide as the residual stream.
    """

    template: str
    label: str
    color: str
    marker: str
    in_stream: bool = True


# Colors of Okabe and Ito, which remain distinct under color blindness.
SITES: dict[str, Site] = {
    "attn_out": Site("blocks.{}.hook_attn_out", "attention output", "#D55E00", "circle"),
    "mlp_out": Site("blocks.{}.hook_mlp_out", "MLP output", "#0072B2", "square"),
    "resid_post": Site("blocks.{}.hook_resid_post", "residual stream", "#009E73", "diamond"),
    "z": Site("blocks.{}.attn.hook_z", "concatenated heads z", "#CC79A7", "triangle-up", in_stream=False),
}
"""Sites by short name, in the order of every legend: the outputs of attention and the MLP, which are added to
the residual stream; the stream after a layer; and the heads' concatenated outputs before W_O
[n_heads * d_head]."""

CROSS: dict[str, Site] = {
    "cross_attn_out": Site("blocks.{}.hook_cross_attn_out", "cross-attention output", "#E69F00", "star"),
    "cross_z": Site(
        "blocks.{}.cross_attn.hook_z",
        "concatenated heads of cross-attention",
        "#56B4E9",
        "hexagon",
        in_stream=False,
    ),
}
"""Sites of a decoder's attention to an encoder, which are asked for by name."""

ALL: dict[str, Site] = SITES | CROSS
"""Every site with a short name."""
