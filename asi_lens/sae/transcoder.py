"""Transcoders: dictionaries that read one site and write another, such as a layer's input and output.

Methods take and return raw inputs and outputs. The weights work on normalized ones: each side has its own
normalization, to mean square norm d_in (inputs) and d_out (outputs):

    pre  = x_n W_enc + b_enc                      x_n = (x - input_mean) * input_scale
    acts = the activation function of pre
    y    = (acts W_dec + b_dec) / output_scale + output_mean

`Trainer` trains transcoders on `PairedStores`, with every activation function, optimizer and AuxK.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from asi_lens.activations.pairs import Pair, PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, require
from asi_lens.kernels.draws import draw_gaussian, other_stream, unit_rows_
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.finite import require_finite_rows
from asi_lens.sae.read_site import site_read
from asi_lens.sae.splice import Place


@checked
class Transcoder(SparseAutoencoder):
    """A `SparseAutoencoder` whose decoder writes another site: `W_dec [d_sae d_out]`, `b_dec [d_out]`.

    Further buffers: `output_mean [d_out]`, `output_scale []`. A new transcoder has Gaussian unit directions,
    drawn separately for encoder and decoder. `initialize_transcoder` sets all weights for training.
    """

    is_transcoder = True
    place_is_given_by = "stores whose metadata name both sites and layers"

    output_mean: Tensor
    output_scale: Tensor

    def __init__(self, config: SAEConfig, *, draw: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__(config, draw=draw, dtype=dtype)
        self.register_buffer("output_mean", torch.zeros(self.d_out, dtype=dtype))
        self.register_buffer("output_scale", torch.ones((), dtype=dtype))
        if draw:
            draw_gaussian(self.encoder_rows, other_stream(config.seed))
            unit_rows_(self.encoder_rows)

    @torch.no_grad()
    def set_output_normalization(self, mean: Float[Tensor, " d_out"], scale: float) -> None:
        """Set `output_mean` (raw units) and `output_scale`. Raises OptionError as `set_normalization`."""
        require(mean.shape == (self.d_out,), "mean", tuple(mean.shape), f"of shape ({self.d_out},)")
        require(bool(torch.isfinite(mean).all()), "mean", "not finite", "finite")
        require(0 < float(scale) < math.inf, "scale", scale, "finite and above 0")
        self.output_mean.copy_(mean)
        self.output_scale.fill_(float(scale))

    def normalize_output(
        self, y: Num[Tensor, "*batch d_out"], checked: bool = True
    ) -> Float[Tensor, "n d_out"]:
        """Return the target, (y - output_mean) * output_scale, as rows.

        Raises DataError if `y` is not d_out wide, or (if `checked`) holds NaN or infinity.
        """
        if y.ndim == 0 or y.shape[-1] != self.d_out:
            raise DataError(
                f"outputs have shape {tuple(y.shape)}; a transcoder with d_out={self.d_out} takes [..., "
                f"{self.d_out}]"
            )
        normalized = (y.reshape(-1, self.d_out).to(self.output_mean) - self.output_mean) * self.output_scale
        if checked and not bool(torch.isfinite(normalized.sum())):
            require_finite_rows(normalized, "output")
        return normalized

    def centered(self, x: Num[Tensor, "*batch d_in"], checked: bool = True) -> Float[Tensor, "n d_in"]:
        """Return the encoder's input, x_n, as rows."""
        return self.normalize(x, checked)

    def prepare(self, store: ActivationStore | PairedStores, *, first: bool) -> None:
        """See `SparseAutoencoder.prepare`. Normalizes both sides."""
        require(isinstance(store, PairedStores), "store", type(store).__name__, "PairedStores")
        assert isinstance(store, PairedStores)
        require(
            store.d_out == self.d_out,
            "store",
            f"with outputs {store.d_out} wide",
            f"with outputs {self.d_out} wide",
        )
        super().prepare(store.inputs, first=first)
        plain = not bool((self.output_scale != 1) | (self.output_mean != 0).any())
        if first and plain:
            self.set_output_normalization(store.outputs.mean, store.outputs.scale)

    def check_batch(self, batch: Tensor | Pair) -> None:
        """Raise DataError unless `batch` is a pair of rows to train on."""
        if not isinstance(batch, Pair) or len(batch.x) != len(batch.y) or len(batch) == 0:
            sizes = [tuple(side.shape) for side in (batch.x, batch.y)] if isinstance(batch, Pair) else None
            found = sizes or type(batch).__name__
            raise DataError(
                f"the batch is {found}; it must be a Pair of rows [n {self.d_in}] and [n {self.d_out}], n at "
                "least 1"
            )

    def sides(
        self, batch: Tensor | Pair, checked: bool = True
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """See `SparseAutoencoder.sides`."""
        self.check_batch(batch)
        assert isinstance(batch, Pair)
        return self.normalize(batch.x, checked), self.normalize_output(batch.y, checked) - self.b_dec

    @property
    def written_normalization(self) -> tuple[Float[Tensor, " d_out"], Float[Tensor, ""]]:
        """See `SparseAutoencoder.written_normalization`."""
        return self.output_mean, self.output_scale

    def place_in(self, model: nn.Module, metadata: Mapping[str, Any]) -> Place | None:
        """See `Spliced.place_in`. Metadata name both sites, as those of `PairedStores` do."""
        writes, reads = site_read(model, metadata), site_read(model, metadata.get("reads") or {})
        return None if writes is None or reads is None else Place.of(model, writes, reads)

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """Return weights of the same function on raw activations.

        acts = f(x W_enc + b_enc), y = acts W_dec + b_dec. Decoder rows keep unit norm, and acts are in raw
        units of the output. This is the convention of the transcoders of sparsify and SAELens.
        """
        raw = 1 / self.output_scale
        shift = (self.input_mean * self.input_scale) @ self.W_enc
        return {
            **self.activation.folded(self.output_scale, shift),
            "W_enc": self.W_enc.detach() * (self.input_scale * raw),
            "b_enc": (self.b_enc - shift) * raw,
            "W_dec": self.W_dec.detach().clone(),
            "b_dec": self.b_dec.detach() * raw + self.output_mean,
        }
