"""Ranks for tests: processes of a command with a file, as torchrun would start them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from asi_lens.training.metrics import read_metrics


def file_of(folder: Path, content: dict[str, Any], name: str = "run.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


class Launched:
    """Ranks, each a process with a command of its own."""

    def __init__(self, commands: Sequence[Sequence[str]]):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        shared |= {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
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
