"""A Hugging Face model of pictures, speech or sequences, with hooks at its modules under the usual names.

TransformerLens bridges language models. For other transformers the same sites are plain forward hooks: the
module names of vision, audio and text encoders are looked up in a short table, and `verify` then tests by
arithmetic that what is found is what is added to the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from asi_lens.base.errors import OptionError, UnsupportedModelError, require

Takes = Literal["pictures", "speech", "sequences"]

TAKES: dict[str, Takes] = {
    "pixel_values": "pictures",
    "input_features": "speech",
    "input_ids": "sequences",
}
"""First argument of transformers' models -> what a model takes."""

# Paths inside a layer, in transformers 5.4 to 5.23: the first that exists is the module.
_PATHS = {
    "ln1": (
        "layernorm_before",
        "norm1",
        "self_attn_layer_norm",
        "layer_norm1",
        "attention.output.LayerNorm",
        "sa_layer_norm",
        "attention.LayerNorm",
    ),
    "ln2": (
        "layernorm_after",
        "norm2",
        "final_layer_norm",
        "layer_norm2",
        "output.LayerNorm",
        "output_layer_norm",
        "LayerNorm",
    ),
    "attn.o": (
        "self_attn.out_proj",
        "self_attn.o_proj",
        "attention.output.dense",
        "attention.o_proj",
        "attention.out_proj",
        "attention.out_lin",
        "attn.proj",
        "attn.Wo",
    ),
    "attn.scale": ("layer_scale1",),
    "cross_attn.o": ("encoder_attn.out_proj", "encoder_attn.o_proj", "crossattention.output.dense"),
    "mlp.out": (
        "mlp.fc2",
        "mlp.down_proj",
        "mlp.weights_out",
        "mlp.Wo",
        "fc2",
        "output.dense",
        "ffn.lin2",
        "feed_forward.output_dense",
    ),
    "mlp.scale": ("layer_scale2",),
}
_POSITIONS = 12


@dataclass(frozen=True)
class PlainConfig:
    """Shape of a `PlainModel`, under TransformerLens's names."""

    model_name: str
    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    n_key_value_heads: int
    d_vocab: int
    """0 for a model that does not take token ids."""
    n_ctx: int
    """Positions: of the pictures, the speech or the ids that the configuration names."""
    normalization_type: str = ""


class PlainModel(nn.Module):
    """A model of transformers, whose hooks are forward hooks on its own modules.

    Attributes:
        source: transformers' model, in evaluation mode. part: "encoder" or "decoder" of an encoder-decoder
            model, "" for any other. takes: "pictures", "speech" or "sequences".
        processor: the folder's image processor or feature extractor, or None. tokenizer: or None.
    """

    def __init__(
        self, source: Any, name: str, part: str | None = None, processor: Any = None, tokenizer: Any = None
    ):
        """Raises UnsupportedModelError for a model whose layers are not found or not all alike, OptionError
        for a part that the model does not have."""
        super().__init__()
        two = bool(getattr(source.config, "is_encoder_decoder", False))
        allowed = "'encoder' (also None) or 'decoder'" if two else "None for a model that is not of two parts"
        require(part in ((None, "encoder", "decoder") if two else (None,)), "part", part, allowed)
        self.source, self.part = source.eval(), (part or "encoder") if two else ""
        self.takes: Takes = TAKES[source.main_input_name]
        self.processor, self.tokenizer = processor, tokenizer
        layers = self.blocks
        out = self._module(layers[0], "attn.o")
        d_z, d_model = projection_weight(out).shape
        config = source.config
        heads = self._first(f"{self.part}_attention_heads", "num_attention_heads", "n_heads")
        if not heads or d_z % heads:
            raise UnsupportedModelError(f"{name}: its configuration names no number of heads that fits")
        self.cfg = PlainConfig(
            model_name=name,
            architecture=type(source).__name__,
            n_layers=len(layers),
            d_model=d_model,
            n_heads=heads,
            d_head=d_z // heads,
            n_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            d_vocab=int(config.vocab_size) if self.takes == "sequences" or self.part == "decoder" else 0,
            n_ctx=self._positions(),
        )

    @property
    def root(self) -> Any:
        """The module that a pass calls: the encoder alone, or all that comes before the head."""
        return self.source.get_encoder() if self.part == "encoder" else self.source.base_model

    @property
    def original_model(self) -> Any:
        """Transformers' model, under TransformerBridge's name."""
        return self.source

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers whose sites the model has."""
        inside = self.source.get_decoder() if self.part == "decoder" else self.root
        found = [
            stack
            for stack in inside.modules()
            if isinstance(stack, nn.ModuleList)
            and len(stack)
            and all(self._find(layer, "attn.o") is not None for layer in stack)
        ]
        if len(found) != 1:
            what = "no stack" if not found else f"{len(found)} stacks"
            raise UnsupportedModelError(
                f"{type(self.source).__name__} has {what} of layers with an attention output projection that "
                "is known here; one stack of attention and MLP layers is needed"
            )
        return list(found[0])

    def places(self) -> Iterator[tuple[str, nn.Module, Literal["in", "out"]]]:
        """Yield (hook name, module, side) of every hook."""
        for layer, block in enumerate(self.blocks):
            found = {role: self._find(block, role) for role in _PATHS}
            named = {
                "hook_attn_out": (found["attn.scale"] or found["attn.o"], "out"),
                "hook_cross_attn_out": (found["cross_attn.o"], "out"),
                "hook_mlp_out": (found["mlp.scale"] or found["mlp.out"], "out"),
                "hook_resid_pre": (block, "in"),
                "hook_resid_post": (block, "out"),
                "attn.hook_z": (found["attn.o"], "in"),
                "attn.o.hook_out": (found["attn.o"], "out"),
                "cross_attn.hook_z": (found["cross_attn.o"], "in"),
                "mlp.out.hook_out": (found["mlp.out"], "out"),
                **{f"{norm}.hook_{side}": (found[norm], side) for norm in ("ln1", "ln2") for side in _SIDES},
            }
            for name, (module, side) in named.items():
                if module is not None:
                    yield f"blocks.{layer}.{name}", module, side  # type: ignore[misc]

    def projection(self, layer: int, cross: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return W_O [d_z d_model] and b_O of a layer's attention, times the LayerScale that follows them.

        Raises UnsupportedModelError where there is no such attention.
        """
        block = self.blocks[layer]
        module = self._module(block, "cross_attn.o" if cross else "attn.o")
        weight, bias = projection_weight(module), getattr(module, "bias", None)
        scale: Any = None if cross else self._find(block, "attn.scale")
        factor = 1.0 if scale is None else scale.lambda1.detach()
        return weight * factor, None if bias is None else bias.detach() * factor

    def sample(self, other_last: bool = False) -> dict[str, Tensor]:
        """Return a few random inputs, the same at every call; `other_last`: with another last position."""
        generator = torch.Generator().manual_seed(0)
        config = self.source.config
        step = 1 if other_last else 0
        out: dict[str, Tensor] = {}
        if self.takes == "pictures":
            height, width = self.picture_size
            out["pixel_values"] = torch.randn(
                2, getattr(config, "num_channels", 3), height, width, generator=generator
            )
            out["pixel_values"][..., -1, -1] += step
        elif self.takes == "speech":
            out["input_features"] = torch.randn(1, config.num_mel_bins, self.frames, generator=generator)
            out["input_features"][..., -1] += step if self.part == "encoder" else 0
        if self.cfg.d_vocab:
            shape = (1 if self.part else 2, min(_POSITIONS, self.cfg.n_ctx))
            ids = torch.randint(self.cfg.d_vocab, shape, generator=generator)
            ids[:, -1] = (ids[:, -1] + step) % self.cfg.d_vocab
            out["decoder_input_ids" if self.part else "input_ids"] = ids
        return {name: self.placed(value) for name, value in out.items()}

    def placed(self, value: Tensor) -> Tensor:
        """Return an input on the model's device; floating point inputs in the model's dtype."""
        parameter = next(self.parameters())
        return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)

    @property
    def frames(self) -> int:
        """Log-mel frames of an input of speech: twice the encoder's positions."""
        return 2 * int(self.source.config.max_source_positions)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a picture: what the folder's processor makes, else the configuration's."""
        for size in (getattr(self.processor, name, None) for name in ("crop_size", "size")):
            if size and "height" in size and "width" in size:
                return int(size["height"]), int(size["width"])
        size = self.source.config.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch."""
        size = self.source.config.patch_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def forward(self, **inputs: Tensor) -> Any:
        """Call transformers' model."""
        return self.root(**inputs)

    def _positions(self) -> int:
        if self.takes == "pictures":
            (height, width), (down, across) = self.picture_size, self.patch_size
            return (height // down) * (width // across)
        names = {"encoder": ("max_source_positions",), "decoder": ("max_target_positions",)}
        found = self._first(*names.get(self.part, ("max_position_embeddings",)))
        if not found:
            raise UnsupportedModelError(f"{type(self.source).__name__} names no number of positions")
        return found

    def _first(self, *names: str) -> int:
        values = (getattr(self.source.config, name, None) for name in names)
        return next((int(value) for value in values if isinstance(value, int)), 0)

    def _find(self, block: nn.Module, role: str) -> nn.Module | None:
        for path in _PATHS[role]:
            found: Any = block
            for name in path.split("."):
                found = found._modules.get(name) if isinstance(found, nn.Module) else None
            if isinstance(found, nn.Module):
                return found
        return None

    def _module(self, block: nn.Module, role: str) -> nn.Module:
        found = self._find(block, role)
        if found is None:
            kind = "cross-attention" if role == "cross_attn.o" else "attention"
            raise UnsupportedModelError(f"{type(self.source).__name__} has no {kind}, so no W_O of it")
        return found


_SIDES = ("in", "out")


def projection_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear module as [d_in d_out]. Raises UnsupportedModelError without one."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnsupportedModelError(f"the output projection is a {type(module).__name__} without a matrix")
    return weight.detach().T


def wrong_inputs(model: PlainModel) -> OptionError:
    """Return the error for token ids given to a model of pictures or speech."""
    return OptionError(
        f"token ids are not allowed here: {model.cfg.model_name} takes {model.takes}; make its inputs with "
        "load_inputs(data, model)"
    )
