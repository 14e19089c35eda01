"""A TopK step by the kernels of `kernels.triton`: when it is possible, its forward pass and its update.

The plain path, in PyTorch, does everything else: other kinds and prefixes, AuxK, clipping, transcoders,
several ranks, `search="subspace"`, other dtypes than bfloat16 for the encoder's product, other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from asi_lens.base.errors import OptionError
from asi_lens.base.memory import free_bytes
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.triton.card import UnsupportedError, require_card
from asi_lens.kernels.triton.decode import decode
from asi_lens.kernels.triton.encode import encode
from asi_lens.kernels.triton.picks import Picks, sort_picks
from asi_lens.kernels.triton.plan import Plan
from asi_lens.kernels.triton.update import Adam, Moments, update
from asi_lens.sae.dictionary import SparseAutoencoder
from asi_lens.sae.finite import power
from asi_lens.sae.kinds.topk import TopK
from asi_lens.sae.optim import BETAS, EPS, RowAdam
from asi_lens.sae.passes import Pass
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.training.config import TrainConfig
from asi_lens.training.mesh import Mesh


def choose_kernels(
    sae: SparseAutoencoder,
    config: TrainConfig,
    sparsity: SparsityConfig,
    mesh: Mesh,
    search: str,
    compute_dtype: torch.dtype,
) -> tuple[Plan | None, str]:
    """Return the plan of a training by the kernels, or None and the reason for the plain path.

    Raises OptionError with the reason for `kernels="triton"` where the kernels cannot be used.
    """
    if config.kernels == "plain":
        return None, "kernels='plain'"
    device = sae.W_dec.device
    # What a training by the kernels is: TopK and Adam, nothing more.
    demands = {
        f"activation={sae.config.activation!r}; the kernels train 'topk'": isinstance(sae.activation, TopK),
        "a transcoder; the kernels train autoencoders": not sae.is_transcoder,
        f"prefixes={list(sparsity.prefixes)}; the kernels train without": not sparsity.prefixes,
        f"aux_k={config.aux_k!r}; the kernels train without AuxK": config.aux_k == 0,
        f"clip_norm={config.clip_norm}; the kernels do not clip": config.clip_norm is None,
        f"{mesh.config.size} ranks; the kernels train on one": mesh.config.size == 1,
        f"search={search!r}; the kernels search exactly": search == "exact",
        f"compute_dtype={compute_dtype}; the kernels multiply in bfloat16": compute_dtype == torch.bfloat16,
    }
    try:
        if config.kernels == "auto" and device.type != "cuda":
            raise UnsupportedError(f"the kernels run on an NVIDIA card, not on {device}")
        unmet = [text for text, met in demands.items() if not met]
        if unmet:
            raise UnsupportedError(unmet[0])
        require_card(device)
        plan = Plan.of(sae.d_in, sae.d_sae, sae.k)
        free = free_bytes(device)
        if free is not None:
            weights = sum(parameter.nbytes for parameter in sae.parameters())
            plan.require_memory(config.batch_size, free + weights)
    except UnsupportedError as error:
        if config.kernels == "triton":
            raise OptionError(f"kernels='triton' is not possible: {error}") from error
        return None, str(error)
    return plan, ""


class KernelAdam(RowAdam):
    """Adam whose update is one pass of the kernels over each feature. Its state is that of `RowAdam`.

    Attributes:
        low: bfloat16 copy of the encoder, [d_sae d_in], which every update renews. `refresh` makes it anew,
            as weights that something else has changed need it: at the first step, in `Trainer.prepare` and
            after `load_state`.
    """

    def __init__(self, sae: SparseAutoencoder, kind: str):
        super().__init__(sae, kind)
        self.low = sae.encoder_rows.bfloat16()

    def refresh(self) -> None:
        """Copy the encoder's weights."""
        self.low.copy_(self.sae.encoder_rows)

    @torch.no_grad()
    def update_picked(
        self,
        picks: Picks,
        grad: Float[Tensor, "batch d_in"],
        x: Float[Tensor, "batch d_in"],
        lr: float,
        encoder_lr: float = 1.0,
    ) -> None:
        """Update all parameters by the gradients of the picks. `grad` is the gradient in the reconstruction,
        `x` are the centered rows, `lr` and `encoder_lr` are as in `RowAdam.step`."""
        self.steps += 1
        weights = self._weights()
        encoder, decoder, bias = (
            Moments(weights[name], *self._moments[name]) for name in ("W_enc", "W_dec", "b_enc")
        )
        adam = Adam(self.steps, lr, *BETAS, EPS, encoder_lr)
        updated = self._updated if self.kind == "sparse_adam_decay" else None
        with torch.cuda.device_of(x):
            through = update(picks, grad, x, encoder, decoder, bias, self.low, adam, updated)
        # b_dec is added after the decoder and subtracted before the encoder.
        self._update(weights["b_dec"], *self._moments["b_dec"], grad.sum(0) - through, lr)

    def load_state(self, read: Callable[[str], Tensor] | Mapping[str, Tensor]) -> None:
        """See `RowAdam.load_state`. The dictionary's weights are loaded before."""
        super().load_state(read)
        self.refresh()


class Forward(NamedTuple):
    """What a forward pass computes."""

    code: SparseCode
    residual: Float[Tensor, "batch d_in"]
    error: Float[Tensor, ""]
    picks: Picks
    check: Float[Tensor, ""]
    overflow: Int[Tensor, ""]


class Recorded:
    """A forward pass as a CUDA graph, which is one launch. The next call overwrites the result."""

    def __init__(self, run: Callable[[Tensor], Forward], x: Float[Tensor, "batch d_in"]):
        self.x, self._graph = x.clone(), torch.cuda.CUDAGraph()
        # A thread that reads batches ahead goes on meanwhile.
        with torch.cuda.device_of(x), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self.found = run(self.x)

    def __call__(self, x: Float[Tensor, "batch d_in"]) -> Forward:
        self.x.copy_(x)
        self._graph.replay()
        return self.found


class KernelStep:
    """Passes and updates of one dictionary by the kernels.

    Attributes:
        config: options of training. plan: sizes. optimizer: moments and the bfloat16 copy. mended: batches
            that were encoded again by the plain path, since too many of the largest features of a row shared
            groups. Many of them make training slow, not wrong.
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig, plan: Plan):
        self.sae, self.config, self.plan = sae, config, plan
        self.optimizer = KernelAdam(sae, config.optimizer)
        self.mended = 0
        self._recorded: tuple[tuple[int, ...], Recorded] | None = None
        self._last: tuple[int, ...] = ()

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Pass:
        """Return the pass of centered rows. Nothing here waits for the device.

        If `overflow` is above 0, `again` must follow, before the next call: that may overwrite the result.
        """
        if self.optimizer.steps == 0:
            self.optimizer.refresh()
        if not x.is_cuda:
            return self._pass(x, self._forward(x))
        # What a graph reads: it holds as long as the weights stay where they are.
        weights = (self.optimizer.low, self.sae.b_enc.data, self.sae.W_dec.data)
        key = (len(x), *(tensor.data_ptr() for tensor in weights))
        if self._recorded is None or self._recorded[0] != key:
            if self._last != key:  # the first call compiles, and the last batch of all comes once
                self._last = key
                return self._pass(x, self._forward(x))
            self._recorded = None  # its memory is free for the next
            self._recorded = key, Recorded(self._forward, x)
        recorded = self._recorded[1]
        return self._pass(recorded.x, recorded(x))

    def again(self, before: Pass, code: SparseCode) -> Pass:
        """Return the pass of the same rows with a code of the plain path."""
        self.mended += 1
        return self._pass(before.x, self._decoded(code, before.x, torch.zeros_like(code.indices[0, 0])))

    def _forward(self, x: Tensor) -> Forward:
        with torch.cuda.device_of(x):  # Triton launches on the current card
            code, overflow = encode(x.bfloat16(), self.optimizer.low, self.sae.b_enc.data, self.plan)
        return self._decoded(code, x, overflow)

    def _decoded(self, code: SparseCode, x: Tensor, overflow: Tensor) -> Forward:
        short = SparseCode(code.indices.int(), code.values)
        code = SparseCode(code.indices.long(), code.values)
        with torch.cuda.device_of(x):
            missed = decode(short, self.sae.W_dec.data, x, 2 / len(x))
        picks = sort_picks(short, self.sae.d_sae, dense=self.optimizer.kind == "adam")
        # By Cauchy and Schwarz no gradient of a feature is above this product: it is a sum over rows of v r,
        # dot x, dot or v dot, with |dot| at most |r|.
        check = power(missed.residual).sqrt() * (power(x) + power(code.values) + len(x)).sqrt()
        return Forward(code, missed.residual, missed.error.sum(), picks, check, overflow)

    def _pass(self, x: Tensor, found: Forward) -> Pass:
        zero = torch.zeros_like(found.check)
        apply = partial(self._apply, found, x)
        return Pass(found.code, x, x, found.error, zero, zero, found.check, apply, found.overflow)

    def _apply(self, found: Forward, x: Tensor, lr: float, scale: float, l0: float) -> None:
        assert scale == 1.0  # nothing is clipped
        self.optimizer.update_picked(found.picks, found.residual, x, lr, self.config.encoder_lr)
