"""Ranks (processes that work together): messages between ranks, checks, and errors that name a lost rank.

`torchrun` starts the ranks, or any other program that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT;
without these variables there is a single process. Twice a second each rank writes a sign of life into
torch.distributed's key-value store, and whether the rank is waiting for others. A rank that loses its peers
reads there which peer died and which hangs. torch's `monitored_barrier` is not used: for a rank that died it
names a port, or rank 0, and it does not work with NCCL.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from asi_lens.base.errors import AsiLensError, require

# Seconds between two signs of life, and seconds without a sign after which a rank is lost.
_BEAT, _LATE = 0.5, 2.0
_POLL = 0.02
Result = TypeVar("Result")


class RankError(AsiLensError, RuntimeError):
    """A rank that failed, that hangs, or that was started with other options than the other ranks."""


class Ranks:
    """The single process of a run without torchrun; see `joined` for several.

    Attributes:
        rank, size: number of this process, and number of processes.
        timeout_s: seconds that a rank waits for another rank.
    """

    rank, size = 0, 1
    timeout_s = 600.0

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Context for code that waits for other ranks. Raises RankError naming the ranks that are lost."""
        yield

    def exchange(self, what: str, text: str, *, patient: bool = False) -> list[str]:
        """Send `text` to every rank; return every rank's text about `what`, in the order of the ranks.

        A `patient` rank waits as long as the other ranks call `advance`. Raises RankError naming a rank that
        does not answer within `timeout_s`.
        """
        return [text]

    def advance(self) -> None:
        """Signal progress to the ranks that wait in a `patient` exchange."""

    def share(self, tensor: Tensor) -> Tensor:
        """Copy rank 0's tensor into `tensor` on every rank (same shape, dtype and device) and return it."""
        return tensor

    def together(self, what: str, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank and return this rank's result.

        If `work` failed on any rank, raises RankError on every rank, with this rank's own error as the cause.
        """
        if self.size == 1:
            return work()
        own: Exception | None = None
        result: list[Result] = []
        try:
            result.append(work())
        except Exception as error:  # sent to every rank below
            own = error
        said = self.exchange(what, "" if own is None else f"{type(own).__name__}: {own}")
        failed = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text)
        if failed:
            raise RankError(f"{what} failed on {failed}") from own
        return result[0]

    def require_same(self, what: str, values: Mapping[str, object]) -> None:
        """Raise RankError on every rank, naming the values that differ, unless all ranks have the same."""
        every = [json.loads(said) for said in self.exchange(what, json.dumps(values, default=str))]
        differ = [
            f"{key} is {other[key]!r} on rank {rank}, {first!r} on rank 0"
            for key, first in every[0].items()
            for rank, other in enumerate(every)
            if other.get(key) != first
        ]
        if differ:
            raise RankError(f"the ranks have different {what}: {'; '.join(differ)}")


class _Joined(Ranks):
    """One of several ranks."""

    def __init__(self, rank: int, size: int, timeout_s: float):
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        # A separate connection: torch's own is busy while torch waits for other ranks.
        self._store = _common_store(timeout_s, "asi_lens", host=False)
        self._waiting = self._advances = 0
        self._exchanges = 0
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="signs of life", daemon=True).start()

    @contextmanager
    def talking(self) -> Iterator[None]:
        """See `Ranks.talking`."""
        self._waiting += 1
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:  # torch.distributed raises RuntimeError
            raise RankError(f"{self._who()} ({error})") from error
        finally:
            self._waiting -= 1

    def share(self, tensor: Tensor) -> Tensor:
        """See `Ranks.share`."""
        with self.talking():
            dist.broadcast(tensor, 0)
        return tensor

    def advance(self) -> None:
        """See `Ranks.advance`."""
        self._advances += 1

    def exchange(self, what: str, text: str, *, patient: bool = False) -> list[str]:
        """See `Ranks.exchange`."""
        self._exchanges += 1
        said = [f"said/{self._exchanges}/{rank}" for rank in range(self.size)]
        heard = [f"heard/{self._exchanges}/{rank}" for rank in range(self.size)]
        with self.talking():
            self._store.set(said[self.rank], text)
            self._await(what, said, patient=patient)
            texts = [self._store.get(key).decode() for key in said]
            self._store.set(heard[self.rank], "")
            if self.rank == 0:
                # Without torchrun, rank 0 holds the store, so the others must have read before it can end.
                self._await(what, heard)
            return texts

    def _await(self, what: str, keys: list[str], *, patient: bool = False) -> None:
        until, before = time.monotonic() + self.timeout_s, self._advanced() if patient else []
        while missing := [rank for rank, key in enumerate(keys) if not self._store.check([key])]:
            if patient:
                now = self._advanced()
                if all(now[rank] != before[rank] for rank in missing):
                    until, before = time.monotonic() + self.timeout_s, now
            failed = self._failed()
            if failed or time.monotonic() > until:
                silent = ", ".join(f"rank {rank}" for rank in missing)
                raise RankError(
                    f"{what}: " + (failed or f"{silent} did not answer within {self.timeout_s:g} s")
                )
            time.sleep(_POLL)

    def fail(self, error: BaseException) -> None:
        """Write this rank's error into the store, for the other ranks' errors."""
        with suppress(RuntimeError):
            self._store.set(f"failed/{self.rank}", f"{type(error).__name__}: {error}")

    def end(self) -> None:
        """Stop the signs of life."""
        self._ended.set()

    def _beat(self) -> None:
        count = 0
        while not self._ended.is_set():
            count += 1
            with suppress(RuntimeError):
                does = "waits" if self._waiting else "works"
                self._store.set(f"beat/{self.rank}", f"{count} {does} {self._advances}")
            self._ended.wait(_BEAT)

    def _failed(self) -> str:
        """Return the errors that other ranks have written into the store, or ""."""
        others = [rank for rank in range(self.size) if self._store.check([f"failed/{rank}"])]
        said = [f"rank {rank} stopped with {self._store.get(f'failed/{rank}').decode()}" for rank in others]
        return "; ".join(said)

    def _advanced(self) -> list[str]:
        return [beat[2] if beat else "" for beat in self._beats()]

    def _beats(self) -> list[list[str]]:
        keys = [f"beat/{rank}" for rank in range(self.size)]
        return [self._store.get(key).decode().split() if self._store.check([key]) else [] for key in keys]

    def _who(self) -> str:
        """Return a text that names the lost ranks.

        Lost ranks are those that wrote an error, else those without a new sign of life, else those that
        still work while the others wait.
        """
        try:
            before = self._beats()
            time.sleep(_LATE)
            if failed := self._failed():
                return failed
            pairs = [
                (rank, old, new)
                for rank, (old, new) in enumerate(zip(before, self._beats(), strict=True))
                if rank != self.rank
            ]
        except RuntimeError:
            return "the process that holds the ranks' common store is gone"
        gone = [f"rank {rank}" for rank, old, new in pairs if old == new]
        if gone:
            return f"{' and '.join(gone)} died or stands still"
        busy = [f"rank {rank}" for rank, _, new in pairs if new[1] == "works"]
        if busy:
            return f"{' and '.join(busy)} let the others wait for more than {self.timeout_s:g} s"
        return "the ranks lost their connection to each other"


def _common_store(timeout_s: float, name: str, *, host: bool) -> dist.Store:
    """Return the key-value store at MASTER_ADDR and MASTER_PORT."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=timeout_s)
    store = dist.TCPStore(address, port, is_master=host, wait_for_workers=False, timeout=limit)
    # torchrun restarts failed ranks with the same store, which still holds the failed ranks' entries.
    return dist.PrefixStore(f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def joined(device: str = "cpu", timeout_s: float | int = 600) -> Iterator[Ranks]:
    """Yield this process's `Ranks`: joined to the others that torchrun started, or a single process.

    Ranks communicate by gloo on CPUs and by NCCL on GPUs.

    Args:
        timeout_s: seconds that a rank waits for the others. After that (and up to 2 s more) the rank raises
            RankError naming the lost rank.

    An error on one rank ends the other ranks too, with a RankError that names the rank and its error.
    """
    require(timeout_s > 0, "timeout_s", timeout_s, "above 0")
    if "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # torchrun usually holds the store; without torchrun, rank 0 holds it.
    host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _common_store(timeout_s, "torch", host=host)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    ranks = _Joined(rank, size, float(timeout_s))
    try:
        yield ranks
        # The store must exist until every rank has finished reading it.
        with ranks.talking():
            dist.barrier()
    except RankError:
        raise
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        ranks.end()
        dist.destroy_process_group()
