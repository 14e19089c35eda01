"""Low-rank sparse attention (Lorsa): an attention layer as many rank-1 units, of which few write at a time.

Query-key heads compute the attention patterns. Each head serves a group of units. A unit reads one direction
w_v at the positions its head attends to, and writes one direction w_o:

    x_n  = (x - input_mean) * input_scale
    z~_i = A_h(i) (x_n . w_v_i + b_v_i)          [batch position unit], A_h(i) the pattern of its head
    z    = TopK(ReLU(z~)) over the units of a position
    y    = (sum_i z_i w_o_i + b_o) / output_scale + output_mean

x is the attention layer's input (after its input norm), y its output (before any norm that follows). Rows w_o
have unit norm. Normalized inputs and outputs have mean square norm d_in. What units read, x_n . w_v + b_v, is
held as an array [batch n_ov position], so this module suits thousands of units, not a million.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from asi_lens.base.doors import checked
from asi_lens.base.errors import DataError, require, require_keys, require_known, require_whole
from asi_lens.base.metadata import plain_metadata
from asi_lens.base.safetensors_io import opened, save_tensors
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.draws import draw_gaussian, other_stream, unit_rows_
from asi_lens.kernels.gradients import decode_sum
from asi_lens.lorsa.attention import AttentionLayer, layer_place, origin, read_attention
from asi_lens.lorsa.data import SequencePairs
from asi_lens.lorsa.heads import PatternConfig, QueryKeyHeads
from asi_lens.lorsa.unit_values import largest_values
from asi_lens.sae.finite import require_master
from asi_lens.sae.splice import Place, Spliced

FORMAT, _HEADER = 1, "asi_lens_lorsa"
# Elements of what units read [batch n_ov position], at a time outside of training.
_BLOCK = 2**25
Sequences = Num[Tensor, "batch position d_in"]


@checked
@dataclass(frozen=True)
class LorsaConfig:
    """Sizes and rules of a Lorsa. Raises OptionError or UnknownNameError for invalid values.

    Attributes:
        d_in: width of the layer's input and output.
        d_qk: width of queries and keys.
        n_qk_heads: number of query-key heads, each with a pattern.
        n_ov: number of units, a multiple of n_qk_heads; unit i has head i // (n_ov / n_qk_heads).
        k: units that may write at one position, 1 to n_ov.
        pattern: rules that turn queries and keys into patterns.
        rectify: only values above zero are written. False: the k values of largest size, of either sign.
        seed: seed of the random directions.
        metadata: origin of the Lorsa (model, layer, hook names ...); JSON values.
    """

    d_in: int
    d_qk: int
    n_qk_heads: int
    n_ov: int
    k: int
    pattern: PatternConfig
    rectify: bool = True
    seed: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("d_in", "d_qk", "n_qk_heads", "n_ov", "k", "seed"):
            require_whole(key, getattr(self, key), 0 if key == "seed" else 1)
        require(self.k <= self.n_ov, "k", self.k, f"from 1 to n_ov={self.n_ov}")
        divisible = self.n_ov % self.n_qk_heads == 0
        require(divisible, "n_ov", self.n_ov, f"a multiple of n_qk_heads={self.n_qk_heads}")
        object.__setattr__(self, "metadata", plain_metadata(self.metadata))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LorsaConfig:
        """Return the configuration in `values`, as `dataclasses.asdict` writes it. Raises UnknownNameError
        for an unknown key."""
        require_keys(values, ("d_in", "d_qk", "n_qk_heads", "n_ov", "k", "pattern"), "LorsaConfig")
        require(isinstance(values["pattern"], Mapping), "pattern", values["pattern"], "keys and values")
        for kind, given in ((cls, values), (PatternConfig, values["pattern"])):
            require_known(given, [f.name for f in fields(kind)], f"{kind.__name__} key")
        return cls(**{**values, "pattern": PatternConfig(**values["pattern"])})

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layer: int,
        *,
        n_ov: int,
        k: int,
        context: int,
        n_qk_heads: int | None = None,
        rectify: bool = True,
        seed: int = 0,
    ) -> LorsaConfig:
        """Return the configuration for an attention layer of `model`, with that layer's rules for patterns.

        `n_qk_heads` is a multiple of the number of the layer's query heads (each head is copied as often);
        by default it is that number. Raises as `read_attention` does, and OptionError.
        """
        source = read_attention(model, layer, context)
        return config_for(
            source,
            n_ov=n_ov,
            k=k,
            n_qk_heads=n_qk_heads,
            rectify=rectify,
            seed=seed,
            metadata=origin(model, layer),
        )


def config_for(
    source: AttentionLayer,
    *,
    n_ov: int,
    k: int,
    n_qk_heads: int | None = None,
    rectify: bool = True,
    seed: int = 0,
    metadata: Mapping[str, Any] | None = None,
) -> LorsaConfig:
    """Return the configuration of a Lorsa for a layer that has been read; see `LorsaConfig.of`."""
    heads = source.n_heads if n_qk_heads is None else n_qk_heads
    multiple = heads > 0 and heads % source.n_heads == 0
    require(multiple, "n_qk_heads", n_qk_heads, f"a multiple of the layer's {source.n_heads} query heads")
    return LorsaConfig(
        source.d_in, source.d_head, heads, n_ov, k, source.pattern, rectify, seed, metadata or {}
    )


@checked
class Lorsa(Spliced):
    """Query-key heads and the units that share the heads.

    Parameters: `heads` (see `QueryKeyHeads`), `W_V`, `W_O [n_ov d_in]`, `b_V [n_ov]`, `b_O [d_in]`.
    Buffers: `input_mean`, `output_mean [d_in]`, `input_scale`, `output_scale []`.

    A new Lorsa has Gaussian unit rows drawn from `config.seed`. Its heads have zero weights and attend to all
    positions alike; `initialize_lorsa` copies heads from a model. `from_attention` returns the exact copy of
    a layer.
    """

    place_is_given_by = "layer=..."

    input_mean: Tensor
    input_scale: Tensor
    output_mean: Tensor
    output_scale: Tensor

    def __init__(self, config: LorsaConfig, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        require_master(dtype)
        self.config = config
        d_in, n_ov = config.d_in, config.n_ov
        self.heads = QueryKeyHeads(config.n_qk_heads, d_in, config.d_qk, config.pattern, dtype)
        self.W_V = nn.Parameter(torch.empty(n_ov, d_in, dtype=dtype))
        self.W_O = nn.Parameter(torch.empty(n_ov, d_in, dtype=dtype))
        self.b_V = nn.Parameter(torch.zeros(n_ov, dtype=dtype))
        self.b_O = nn.Parameter(torch.zeros(d_in, dtype=dtype))
        for name in ("input", "output"):
            self.register_buffer(f"{name}_mean", torch.zeros(d_in, dtype=dtype))
            self.register_buffer(f"{name}_scale", torch.ones((), dtype=dtype))
        self.initialization: dict[str, Any] = {}
        """Options of the initialization (JSON values), set by `initialize_lorsa`."""
        for rows, seed in ((self.W_V.data, config.seed), (self.W_O.data, other_stream(config.seed))):
            draw_gaussian(rows, seed)
            unit_rows_(rows)

    @property
    def d_in(self) -> int:
        """Width of inputs and outputs."""
        return self.config.d_in

    @property
    def d_out(self) -> int:
        """Width of outputs: that of the inputs."""
        return self.d_in

    @property
    def n_ov(self) -> int:
        """Number of units."""
        return self.config.n_ov

    @property
    def d_sae(self) -> int:
        """Number of units, under the name that other coders use."""
        return self.n_ov

    @property
    def target_scale(self) -> float:
        """Factor on raw targets in `scan`, which yields normalized targets."""
        return self.output_scale.double().item()

    @property
    def k(self) -> int:
        """Units that may write at one position."""
        return self.config.k

    @property
    def head_of_unit(self) -> list[int]:
        """The query-key head of each unit."""
        group = self.n_ov // self.config.n_qk_heads
        return [unit // group for unit in range(self.n_ov)]

    def normalize(self, x: Sequences, checked: bool = True) -> Float[Tensor, "batch position d_in"]:
        """Return (x - input_mean) * input_scale in the weights' dtype.

        Raises DataError for another width, no positions or too many, or (if `checked`) NaN or infinity.
        """
        self._require_sequences(x, "inputs", checked)
        return (x.to(self.input_mean) - self.input_mean) * self.input_scale

    def normalize_output(self, y: Sequences, checked: bool = True) -> Float[Tensor, "batch position d_in"]:
        """Return the target (y - output_mean) * output_scale in the weights' dtype. Raises as `normalize`."""
        self._require_sequences(y, "outputs", checked)
        return (y.to(self.output_mean) - self.output_mean) * self.output_scale

    def units(self, x: Sequences, checked: bool = True) -> Float[Tensor, "batch position n_ov"]:
        """Return z~, the units' values before the choice of k. Raises as `normalize`."""
        x_n = self.normalize(x, checked)
        patterns = self.heads(x_n)
        values = (x_n @ self.W_V.T + self.b_V).unflatten(-1, (self.config.n_qk_heads, -1))
        return (patterns @ values.transpose(1, 2)).transpose(1, 2).flatten(2)

    def encode(self, x: Sequences, checked: bool = True) -> SparseCode:
        """Return units and values for raw inputs, [batch position k]; a unit with value zero did not write.

        The order of units is unspecified. Raises DataError as `normalize` does.
        """
        x_n = self.normalize(x, checked)
        return largest_values(x_n, self.heads(x_n), self.W_V, self.b_V, self.k, self.config.rectify)

    def decode_normalized(self, code: SparseCode) -> Float[Tensor, "batch position d_in"]:
        """Return sum_i z_i w_o_i + b_o, the output in normalized units, from a code [batch position k]."""
        flat = SparseCode(*(part.flatten(0, 1) for part in code))
        return decode_sum(flat, self.W_O).view(*code.indices.shape[:2], -1) + self.b_O

    def decode(self, code: SparseCode) -> Float[Tensor, "batch position d_in"]:
        """Return raw outputs from a code [batch position k]."""
        return self.decode_normalized(code) / self.output_scale + self.output_mean

    def forward(self, x: Sequences) -> Float[Tensor, "batch position d_in"]:
        """Return the approximated output of the attention layer for its input x; both in raw units."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def scan(
        self, data: SequencePairs
    ) -> Iterator[tuple[Float[Tensor, "n position d_in"], Float[Tensor, "n position d_in"], SparseCode]]:
        """Yield normalized targets, reconstructions and codes at the positions that count, in order.

        A code is [positions k], and its values are absolute values. Each block is a few sequences, because
        memory bounds it.
        """
        at_once = max(1, _BLOCK // (data.context * self.n_ov))
        for block in data.blocks(at_once):
            code = SparseCode(*(part[:, 1:] for part in self.encode(block.x)))
            target = self.normalize_output(block.y)[:, 1:]
            sizes = SparseCode(code.indices.flatten(0, 1), code.values.abs().flatten(0, 1))
            yield target, self.decode_normalized(code), sizes

    def place_in(self, model: nn.Module, metadata: Mapping[str, Any]) -> Place | None:
        """See `Spliced.place_in`. Metadata name the layer."""
        layer = metadata.get("layer")
        return None if layer is None else layer_place(model, int(layer))

    def save(self, path: Path | str) -> None:
        """Write the Lorsa to a `.safetensors` file completely or not at all, replacing an existing one.

        Raises OptionError for another suffix or weights of half precision, OSError naming the file if it
        cannot be written.
        """
        path = _checked(path)
        require_master(self.W_O.dtype)
        about = {"format": FORMAT, "config": asdict(self.config), "initialization": self.initialization}
        save_tensors(path, self.state_dict(), {_HEADER: json.dumps(about, allow_nan=False)})

    @classmethod
    def load(cls, path: Path | str) -> Lorsa:
        """Return the Lorsa in a file of `save`, in the dtype of the file, on the CPU.

        Raises FileNotFoundError, OptionError for another suffix, and DataError for a file that is damaged,
        does not hold a Lorsa, or has another format.
        """
        path = _checked(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        with opened(path, DataError) as file:
            if (text := (file.metadata() or {}).get(_HEADER)) is None:
                raise DataError(f"{path} is not a file of a Lorsa")
            about = json.loads(text)
            if about.get("format") != FORMAT:
                raise DataError(f"{path} has format {about.get('format')!r}, but this version reads {FORMAT}")
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        dtype = state["W_O"].dtype if "W_O" in state else torch.float32
        lorsa = cls(LorsaConfig.from_dict(about["config"]), dtype=dtype)
        try:
            lorsa.load_state_dict(state)
        except RuntimeError as error:
            raise DataError(f"{path} holds other tensors than its configuration needs: {error}") from error
        lorsa.initialization = about["initialization"]
        return lorsa

    def extra_repr(self) -> str:
        """Return the sizes that `print` shows."""
        config = self.config
        return f"d_in={config.d_in}, n_qk_heads={config.n_qk_heads}, n_ov={config.n_ov}, k={config.k}"

    def _require_sequences(self, x: Tensor, what: str, finite: bool) -> None:
        if x.ndim != 3 or x.shape[-1] != self.d_in or x.numel() == 0:
            raise DataError(
                f"{what} have shape {tuple(x.shape)}; a Lorsa takes [batch position {self.d_in}], none 0"
            )
        context = self.config.pattern.context
        if x.shape[1] > context:
            raise DataError(f"sequences have {x.shape[1]} positions, more than the Lorsa's context={context}")
        if finite and not bool(torch.isfinite(x.sum(dtype=torch.float32))):
            bad = (~torch.isfinite(x)).flatten(1).any(1).sum().item()
            if bad:
                raise DataError(f"{bad} of {len(x)} sequences of {what} hold NaN or infinity")


def _checked(path: Path | str) -> Path:
    path = Path(path)
    require(path.suffix == ".safetensors", "path", str(path), "a `.safetensors` file")
    return path
