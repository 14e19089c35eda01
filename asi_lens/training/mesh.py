"""Distribution of the features and tokens of one training: on this process, or over a mesh of ranks.

A mesh has two dimensions. Ranks along `model` hold different features (rows of W_enc and W_dec, their moments
and firings) and read the same tokens; ranks along `data` hold the same features and read different tokens.
On one process no method communicates, so `Trainer.step` is written only once.

In a step of B tokens, k picks and width d, with D ranks along `data` and M along `model`, a rank receives
(numbers of 4 bytes; an all_reduce counts as 2 (M - 1) / M of the tensor that is summed):

- along `model`: values of picks, (M - 1) k B / D; partial reconstructions, 2 (M - 1) / M d B / D; the
  gradient of b_dec through the encoder and a few sums, 2 (M - 1) / M (d + 4).
- along `data`: inputs, residuals and picks of the other ranks' tokens, (D - 1) / D B (2 d + 3 k). That is
  less than the gradients of all rows that fired, up to 2 d k B. Every rank then sums the same rows in the
  same order as one process does.

The picks of a token are the k largest of its ranks' picks, joined by `topk.merge_topk` like those of chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from asi_lens.base.errors import OptionError, require, require_whole
from asi_lens.base.ranks import Ranks
from asi_lens.kernels.codes import SparseCode
from asi_lens.kernels.topk import merge_topk


@dataclass(frozen=True)
class MeshConfig:
    """Numbers of ranks along `data` and `model`. Raises OptionError for numbers below one."""

    data: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        for key in ("data", "model"):
            require_whole(key, getattr(self, key), 1)

    @property
    def size(self) -> int:
        """Total number of ranks."""
        return self.data * self.model


@dataclass(frozen=True)
class Part:
    """This rank's rows of a batch of `n` tokens; `len` returns `n`."""

    rows: Float[Tensor, "part d"]
    n: int

    def __len__(self) -> int:
        return self.n


class Mesh:
    """Mesh of one process.

    Attributes:
        config: size of the mesh. data_rank, model_rank: place of this process. bytes_received: bytes that
            this process received in collectives. ranks: processes of the mesh. device: device of the
            tensors that are sent.
    """

    config = MeshConfig()
    data_rank = model_rank = 0
    bytes_received = 0
    ranks = Ranks()
    device = torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this rank does the work that is done only once: bars, tables, names of files."""
        return self.ranks.rank == 0

    def features(self, d_sae: int) -> tuple[int, int]:
        """Return this rank's features as (first, after the last). Raises OptionError for unequal shares."""
        n = self.config.model
        require(d_sae % n == 0, "d_sae", d_sae, f"a multiple of model={n}")
        return self.model_rank * (d_sae // n), (self.model_rank + 1) * (d_sae // n)

    def tokens(self, n: int) -> tuple[int, int]:
        """Return this rank's rows in a batch of `n` tokens as (first, after the last)."""
        share, rest = divmod(n, self.config.data)
        first = self.data_rank * share + min(self.data_rank, rest)
        return first, first + share + (self.data_rank < rest)

    def pick(self, code: SparseCode, k: int) -> SparseCode:
        """Return this rank's code, with zeros for picks that are not among the k largest of a token."""
        return code

    def over_features(self, tensor: Tensor) -> Tensor:
        """Return the sum of `tensor` over the ranks along `model`."""
        return tensor

    def count(self, n: int) -> int:
        """Return the sum of `n` over the ranks along `model`."""
        return n

    def largest(self, number: float) -> float:
        """Return the largest `number` of the ranks along `model`."""
        return number

    def any(self, condition: bool) -> bool:
        """Return whether `condition` holds on any rank."""
        return condition

    def shared_out(self, tensor: Tensor) -> Tensor:
        """Wrap this rank's rows (one per feature) as a shard of the full tensor over all ranks."""
        return tensor

    def whole(self, rows: Tensor, n: int) -> Tensor:
        """Return the rows of all `n` tokens of a batch, in order, gathered from the ranks along `data`."""
        return rows

    def whole_code(self, code: SparseCode, n: int) -> SparseCode:
        """Return the code of all `n` tokens of a batch, gathered as in `whole`."""
        return SparseCode(self.whole(code.indices, n), self.whole(code.values, n))


class RankMesh(Mesh):
    """Mesh of several processes, with this process as one of `ranks` (`ranks.joined`)."""

    def __init__(self, config: MeshConfig, ranks: Ranks, device: torch.device | str = "cpu"):
        """Join the mesh. Raises OptionError if the number of processes is not the size of the mesh."""
        from torch.distributed.device_mesh import DeviceMesh

        if ranks.size != config.size:
            raise OptionError(
                f"a mesh of data={config.data} x model={config.model} needs {config.size} processes, "
                f"but there are {ranks.size}"
            )
        self.config = config
        self.ranks = ranks
        self.device = torch.device(device)
        places = torch.arange(config.size, device="cpu").view(config.data, config.model)
        limit = timedelta(seconds=ranks.timeout_s)
        with ranks.talking():
            self._data, _ = dist.new_subgroups_by_enumeration(places.T.tolist(), timeout=limit)
            self._model, _ = dist.new_subgroups_by_enumeration(places.tolist(), timeout=limit)
            self.device_mesh = DeviceMesh.from_group(
                [self._data, self._model],
                self.device.type,
                mesh=places,
                mesh_dim_names=("data", "model"),
            )
        self.data_rank, self.model_rank = divmod(ranks.rank, config.model)
        self.bytes_received = 0

    def pick(self, code: SparseCode, k: int) -> SparseCode:
        """See `Mesh.pick`."""
        ranks = self.config.model
        if ranks == 1:
            return code
        # A shard may have fewer features than k, and none if only dead features may be picked.
        width = code.values.shape[1]
        mine = torch.nn.functional.pad(code.values, (0, max(0, k - width)), value=-1.0).contiguous()
        gathered = [torch.empty_like(mine) for _ in range(ranks)]
        with self.ranks.talking():
            dist.all_gather(gathered, mine, group=self._model)
        self._count(mine, ranks - 1)
        places = torch.arange(mine.shape[1], device=mine.device).expand_as(mine)
        every = [SparseCode(places + rank * mine.shape[1], found) for rank, found in enumerate(gathered)]
        chosen = merge_topk(every, k).indices - self.model_rank * mine.shape[1]
        kept = torch.zeros(len(mine), mine.shape[1] + 1, dtype=torch.bool, device=mine.device)
        # Picks of other ranks are marked in an extra column, which is removed.
        own = (chosen >= 0) & (chosen < mine.shape[1])
        kept.scatter_(1, torch.where(own, chosen, mine.shape[1]), value=True)
        return SparseCode(code.indices, code.values * kept[:, :width])

    def over_features(self, tensor: Tensor) -> Tensor:
        """See `Mesh.over_features`."""
        ranks = self.config.model
        if ranks == 1:
            return tensor
        total = tensor.contiguous()
        with self.ranks.talking():
            dist.all_reduce(total, group=self._model)
        self._count(total, 2 * (ranks - 1) / ranks)
        return total

    def count(self, n: int) -> int:
        """See `Mesh.count`."""
        return int(self.over_features(torch.tensor(n, device=self.device)))

    def largest(self, number: float) -> float:
        """See `Mesh.largest`."""
        found = torch.tensor(number, dtype=torch.float64, device=self.device)
        with self.ranks.talking():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._model)
        return found.item()

    def any(self, condition: bool) -> bool:
        """See `Mesh.any`."""
        found = torch.tensor(condition, dtype=torch.int32, device=self.device)
        with self.ranks.talking():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def shared_out(self, tensor: Tensor) -> Tensor:
        """See `Mesh.shared_out`."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        return DTensor.from_local(tensor, self.device_mesh, [Replicate(), Shard(0)], run_check=False)

    def whole(self, rows: Float[Tensor, "part ..."], n: int) -> Float[Tensor, "n ..."]:
        """See `Mesh.whole`."""
        ranks = self.config.data
        if ranks == 1:
            return rows
        shares = [n // ranks + (rank < n % ranks) for rank in range(ranks)]
        # Shares differ by one row at most; all_gather needs equal shares.
        mine = rows.new_zeros(shares[0], *rows.shape[1:])
        mine[: len(rows)] = rows
        gathered = [torch.empty_like(mine) for _ in range(ranks)]
        with self.ranks.talking():
            dist.all_gather(gathered, mine, group=self._data)
        self._count(mine, ranks - 1)
        return torch.cat([found[:share] for found, share in zip(gathered, shares, strict=True)])

    def _count(self, tensor: Tensor, times: float) -> None:
        self.bytes_received += round(tensor.numel() * tensor.element_size() * times)
