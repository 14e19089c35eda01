"""Memory that tensors may still take."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from asi_lens.base import memory
from asi_lens.base.memory import free_bytes, host_bytes


def test_memory_that_pytorch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert free_bytes(torch.device("cuda", 0)) == 1030
    assert free_bytes(torch.device("cpu")) is None


MIB = 2**20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 100 MiB of free memory."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 999999 kB\nMemAvailable:   102400 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("")
    return tmp_path


def limited(folder: Path, limit: int | str, used: int, names: tuple[str, str], files: int = 0) -> None:
    """A control group, as Linux shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, used), strict=True):
        (folder / f"memory.{name}").write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 7\n")


def test_main_memory_is_what_the_machine_has(machine: Path) -> None:
    assert host_bytes() == 100 * MIB
    (machine / "proc/meminfo").unlink()
    assert host_bytes() is None


def test_main_memory_is_what_a_batch_job_may_take(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("0::/jobs/7\n")
    names = ("max", "current")
    limited(machine / "sys/fs/cgroup/jobs/7", "max", 10 * MIB, names)
    assert host_bytes() == 100 * MIB, "no limit"
    limited(machine / "sys/fs/cgroup/jobs", 60 * MIB, 50 * MIB, names, files=20 * MIB)
    assert host_bytes() == 30 * MIB, "the limit of a group around it; copies of files give way"
    limited(machine / "sys/fs/cgroup/jobs/7", 20 * MIB, 10 * MIB, names)
    assert host_bytes() == 10 * MIB


def test_main_memory_in_a_container_of_the_older_kind(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("4:memory:/docker/abc\n3:cpuset:/\n0::/\n")
    limited(machine / "sys/fs/cgroup/memory", 40 * MIB, 10 * MIB, ("limit_in_bytes", "usage_in_bytes"))
    assert host_bytes() == 30 * MIB
