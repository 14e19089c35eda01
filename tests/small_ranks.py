"""Ranks for tests: processes of a command with a file, as torchrun would start them.

A fork server imports torch and the model's libraries once. Its ranks start in a tenth of a second instead of
seconds, and are processes of their own, which can be stopped and killed.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import yaml

from asi_lens.training.metrics import read_metrics

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch.distributed.checkpoint",
        "torch.distributed.device_mesh",
        "transformer_lens",
        "asi_lens.activations.harvest_store",
        "asi_lens.sae.initialize",
        "asi_lens.sae.shard",
        "asi_lens.sae.train",
    ]
)


def file_of(folder: Path, content: dict[str, Any], name: str = "run.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


def _run(command: Sequence[str], environment: Mapping[str, str], said: str) -> None:
    """Run `python <command>` in this process, whose output goes to the file `said`."""
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    option, what, *arguments = command
    sys.argv = [what, *arguments]
    if option == "-c":
        exec(compile(what, "<rank>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(what, run_name="__main__", alter_sys=True)


class Rank:
    """A process of a command (`-c code` or `-m module ...`), with the methods of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
        with pytest.MonkeyPatch.context() as patch:
            # The server imports what this process would.
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
        handle, said = tempfile.mkstemp()
        os.close(handle)
        self._said = Path(said)
        self._process = _CONTEXT.Process(target=_run, args=(list(command), dict(environment), said))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a rank", timeout or 0)
        return self._said.read_text(), None

    def forget(self) -> None:
        self._said.unlink(missing_ok=True)


class Launched:
    """Ranks, each a process with a command of its own."""

    def __init__(self, commands: Sequence[Sequence[str]]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {**os.environ, "OMP_NUM_THREADS": "1"}
        shared |= {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = [
            Rank(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, command in enumerate(commands)
        ]

    @classmethod
    def with_files(cls, files: Sequence[Path], module: str = "asi_lens.sae") -> Launched:
        """Ranks of a command, each with a file of its own."""
        return cls([["-m", module, str(path), "--quiet"] for path in files])

    def ended(self, timeout: float = 120) -> tuple[list[int], str]:
        """Exit statuses, and all that was said."""
        until = time.monotonic() + timeout
        said = [process.communicate(timeout=until - time.monotonic())[0] for process in self.processes]
        return [process.returncode for process in self.processes], "\n".join(said)

    def finish(self, timeout: float = 120) -> tuple[list[int], str]:
        """What `ended` returns; then they are gone, also after an error."""
        try:
            return self.ended(timeout)
        finally:
            self.close()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds, while they run."""
        until = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < until
            assert self.processes[0].poll() is None, self.ended()
            time.sleep(0.002)

    def at_step(self, output: Path, step: int) -> None:
        """Until the step of a training is logged."""
        self.wait_for(lambda: any((row["step"] or 0) >= step for row in read_metrics(output / "metrics.csv")))

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
            process.forget()
