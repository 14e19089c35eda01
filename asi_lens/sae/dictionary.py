"""The sparse autoencoder: configuration, parameters, encoding and decoding.

Methods take and return raw activations (model units). The weights work on normalized activations x_n =
(x - input_mean) * input_scale, whose mean square norm is d_in:

    pre  = (x_n - b_dec) W_enc + b_enc            [batch d_sae]
    acts = TopK(ReLU(pre))
    reconstruction = (acts W_dec + b_dec) / input_scale + input_mean

Decoder rows have unit norm. `folded` returns weights of the same function on raw activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from asi_lens.activations.pairs import Pair, PairedStores
from asi_lens.activations.store import ActivationStore
from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, OptionError, require, require_keys, require_known, require_whole
from asi_lens.base.metadata import plain_metadata
from asi_lens.kernels.codes import SparseCode, stack_codes
from asi_lens.kernels.draws import draw_gaussian, unit_rows_
from asi_lens.kernels.gradients import decode_sum
from asi_lens.sae.finite import require_finite_rows, require_master
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.kinds.kind import Weights
from asi_lens.sae.read_site import site_read
from asi_lens.sae.splice import Place, Spliced

# Rows encoded at a time outside of training.
_BLOCK = 4096


@checked
@dataclass(frozen=True)
class SAEConfig:
    """Sizes and kind of a dictionary. Raises OptionError or UnknownNameError for invalid values.

    Attributes:
        d_in: width of the activations.
        d_sae: number of features.
        k: features that fire on one token, 1 to d_sae: at most k (topk), k on average (batchtopk), or the
            target of `sparsity` (jumprelu, relu, gated).
        activation: name in `kinds.KINDS`.
        seed: seed of the random directions.
        d_out: width of a transcoder's output; None for an autoencoder.
        metadata: origin of the activations (model, site, hook_name, layer, corpus ...); JSON values.
    """

    d_in: int
    d_sae: int
    k: int = 32
    activation: str = "topk"
    seed: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    d_out: int | None = None

    def __post_init__(self) -> None:
        for key in ("d_in", "d_sae", "k", "seed", *(["d_out"] if self.d_out is not None else [])):
            require_whole(key, getattr(self, key), 0 if key == "seed" else 1)
        require(self.k <= self.d_sae, "k", self.k, f"from 1 to d_sae={self.d_sae}")
        require_known([self.activation], KINDS, "activation")
        object.__setattr__(self, "metadata", plain_metadata(self.metadata))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SAEConfig:
        """Return the configuration in `values`. Raises UnknownNameError for an unknown key."""
        require_known(values, [f.name for f in fields(cls)], "SAEConfig key")
        require_keys(values, ("d_in", "d_sae"), "SAEConfig")
        return cls(**values)


@checked
class SparseAutoencoder(Weights, Spliced):
    """A dictionary of `d_sae` directions, and the encoder that picks the features of an activation.

    Parameters: `W_enc [d_in d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae d_in]`, `b_dec [d_in]`. W_enc is a
    transposed view, so a feature's weights are contiguous in encoder (`encoder_rows`) and decoder, and work
    on the rows that fired is cheap. Buffers: `input_mean [d_in]`, `input_scale []`.

    A new dictionary has Gaussian unit directions drawn from `config.seed`, a tied encoder and zero biases.
    `draw=False` leaves the weights undefined. `initialize` sets all weights for training.
    """

    config: SAEConfig
    b_dec: nn.Parameter
    input_mean: Tensor
    input_scale: Tensor

    is_transcoder = False
    """Whether the output is another site than the input, as for a `transcoder.Transcoder`."""

    def __init__(self, config: SAEConfig, *, draw: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        require_master(dtype)
        if self.is_transcoder != (config.d_out is not None):
            allowed = (
                "a whole number for a Transcoder" if self.is_transcoder else "None: only a Transcoder has one"
            )
            raise OptionError(f"d_out={config.d_out} is not allowed; d_out must be {allowed}")
        self.config = config
        d_in, d_sae, d_out = config.d_in, config.d_sae, config.d_out or config.d_in
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in, dtype=dtype).T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_out, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_out, dtype=dtype))
        self.register_buffer("input_mean", torch.zeros(d_in, dtype=dtype))
        self.register_buffer("input_scale", torch.ones((), dtype=dtype))
        self.activation = KINDS[config.activation](config).to(dtype)
        self.initialization: dict[str, Any] = {"method": "random", "seed": config.seed}
        """Options of the initialization (JSON values), set by `initialize`."""
        if draw:
            draw_gaussian(self.W_dec.data, config.seed)
            unit_rows_(self.W_dec.data)
            if not self.is_transcoder:
                self.encoder_rows.copy_(self.W_dec.data)

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.config.d_in

    @property
    def written_normalization(self) -> tuple[Float[Tensor, " d_out"], Float[Tensor, ""]]:
        """Mean and scale of the activations that the decoder writes."""
        return self.input_mean, self.input_scale

    @property
    def is_normalized(self) -> bool:
        """Whether the input normalization differs from mean 0 and scale 1."""
        return bool((self.input_scale != 1) | (self.input_mean != 0).any())

    @torch.no_grad()
    def set_normalization(self, mean: Float[Tensor, " d_in"], scale: float) -> None:
        """Set `input_mean` (raw units) and `input_scale`. Raises OptionError unless finite, scale above 0."""
        require(mean.shape == (self.d_in,), "mean", tuple(mean.shape), f"of shape ({self.d_in},)")
        require(bool(torch.isfinite(mean).all()), "mean", "not finite", "finite")
        require(0 < float(scale) < float("inf"), "scale", scale, "finite and above 0")
        self.input_mean.copy_(mean)
        self.input_scale.fill_(float(scale))

    def normalize(self, x: Num[Tensor, "*batch d_in"], checked: bool = True) -> Float[Tensor, "n d_in"]:
        """Return x_n = (x - input_mean) * input_scale as rows, in the weights' dtype.

        Raises DataError if `x` is not d_in wide, is complex, or (if `checked`) holds NaN or infinity.
        """
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise DataError(
                f"activations have shape {tuple(x.shape)}; a dictionary with d_in={self.d_in} takes [..., "
                f"{self.d_in}]"
            )
        if x.is_complex():
            raise DataError(f"activations must be real numbers, not {x.dtype}")
        rows = x.reshape(-1, self.d_in).to(self.input_mean)
        normalized = (rows - self.input_mean).mul_(self.input_scale)
        if checked and not bool(torch.isfinite(normalized.sum())):
            require_finite_rows(normalized, "activation")
        return normalized

    def centered(self, x: Num[Tensor, "*batch d_in"], checked: bool = True) -> Float[Tensor, "n d_in"]:
        """Return the encoder's input, x_n - b_dec, as rows. Raises as `normalize`."""
        return self.normalize(x, checked).sub_(self.b_dec)

    def prepare(self, store: ActivationStore | PairedStores, *, first: bool) -> None:
        """Prepare for training on `store`. On the `first` call, a dictionary without normalization takes the
        store's mean and scale. Raises OptionError for data that the dictionary cannot be trained on."""
        one = not isinstance(store, PairedStores)
        require(one, "store", "PairedStores", "rows of one site for an autoencoder")
        assert not isinstance(store, PairedStores)
        if first and not self.is_normalized:
            self.set_normalization(store.mean, store.scale)

    def check_batch(self, batch: Tensor | Pair) -> None:
        """Raise DataError unless `batch` is rows to train on."""
        if not isinstance(batch, Tensor) or batch.ndim != 2 or len(batch) == 0:
            found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise DataError(f"the batch is {found}; it must be rows [n {self.d_in}] with n at least 1")

    def sides(
        self, batch: Tensor | Pair, checked: bool = True
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Return the encoder's input and the target of acts W_dec; for an autoencoder both are the same."""
        self.check_batch(batch)
        assert isinstance(batch, Tensor)
        x = self.centered(batch, checked)
        return x, x

    def encode(self, x: Num[Tensor, "*batch d_in"]) -> SparseCode:
        """Return features and values for raw activations, each [*batch k]; value zero means not fired.

        The order of features is unspecified. Raises DataError as `normalize` does.
        """
        blocks = self.centered(x).split(_BLOCK)
        codes = [self.activation.code(block, self.W_enc.T, self.b_enc) for block in blocks]
        indices, values = stack_codes(codes)
        shape = (*x.shape[:-1], indices.shape[1])
        return SparseCode(indices.view(shape), values.view(shape))

    def encode_dense(self, x: Num[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return the code of raw activations as a dense array, with zeros for features that did not fire."""
        code = self.encode(x)
        dense = code.values.new_zeros(*x.shape[:-1], self.d_sae)
        # Codes padded with zeros may name a feature twice.
        return dense.scatter_add(-1, code.indices, code.values)

    def decode(self, code: SparseCode) -> Float[Tensor, "*batch d_out"]:
        """Return raw activations [*batch d_out] from a code [*batch k]."""
        flat = SparseCode(*(part.reshape(-1, part.shape[-1]) for part in code))
        mean, scale = self.written_normalization
        raw = (decode_sum(flat, self.W_dec) + self.b_dec) / scale + mean
        return raw.view(*code.indices.shape[:-1], self.d_out)

    def forward(self, x: Num[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Return the reconstruction of raw activations, in raw units."""
        return self.decode(self.encode(x))

    def scan(
        self, data: ActivationStore | PairedStores | Num[Tensor, "n d_in"] | Pair
    ) -> Iterator[tuple[Float[Tensor, "n d_out"], Float[Tensor, "n d_out"], SparseCode]]:
        """Yield targets, reconstructions and codes [n k] of all rows in order, a few thousand at a time."""
        for batch in data.split(_BLOCK) if isinstance(data, Tensor | Pair) else data.in_order(_BLOCK):
            x, target = (batch.x, batch.y) if isinstance(batch, Pair) else (batch, batch)
            code = self.encode(x)
            yield target, self.decode(code), code

    def place_in(self, model: nn.Module, metadata: Mapping[str, Any]) -> Place | None:
        """See `Spliced.place_in`. Metadata name site and layer, a hook (SAELens) or a module (sparsify)."""
        where = site_read(model, metadata)
        return None if where is None else Place.of(model, where)

    @torch.no_grad()
    def folded(self) -> dict[str, Tensor]:
        """Return `W_enc [d_in d_sae]`, `b_enc`, `W_dec`, `b_dec` of the same function on raw activations.

        acts = TopK(ReLU((x - b_dec) W_enc + b_enc)), reconstruction = acts W_dec + b_dec. Decoder rows keep
        unit norm, and acts are in raw units (the values of `encode` divided by `input_scale`). This is the
        convention of SAELens with `apply_b_dec_to_input` and of sparsify. The result also holds the
        activation function's parameters. W_enc and W_dec share memory with the dictionary's.
        """
        scale = self.input_scale
        return {
            **self.activation.folded(scale),
            "W_enc": self.W_enc.detach(),
            "b_enc": self.b_enc.detach() / scale,
            "W_dec": self.W_dec.detach(),
            "b_dec": self.b_dec.detach() / scale + self.input_mean,
        }

    def save(self, folder: Path | str) -> None:
        """Write a folder that SAELens and sparsify can read too (see `formats.save_folder`)."""
        from asi_lens.sae.formats import save_folder

        save_folder(self, folder)

    @classmethod
    def load(cls, folder: Path | str) -> SparseAutoencoder:
        """Read a folder written by `save`, by SAELens or by sparsify (see `formats.load_folder`)."""
        from asi_lens.sae.formats import load_folder

        return load_folder(folder)

    def extra_repr(self) -> str:
        """Return the sizes that `print` shows."""
        return f"d_in={self.d_in}, d_sae={self.d_sae}, k={self.k}, activation={self.config.activation!r}"
