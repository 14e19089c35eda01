"""Batches are read one ahead, in order, and pinned only on their way from a CPU to a GPU."""

from __future__ import annotations

import threading

import pytest
import torch

from asi_lens.activations.ahead import copied, moved, pinned, read_ahead, room


def test_one_batch_is_read_ahead_in_another_thread() -> None:
    read, threads = [], set()

    def one(index: int) -> int:
        read.append(index)
        threads.add(threading.get_ident())
        return -index

    stream = read_ahead(one, iter([3, 1, 2]))
    assert next(stream) == -3
    stream.close()  # waits for what is under way
    assert read == [3, 1]
    assert list(read_ahead(one, [5, 4])) == [-5, -4]
    assert list(read_ahead(one, [])) == []
    assert threading.get_ident() not in threads


def test_an_error_is_raised_where_its_batch_is_due() -> None:
    def one(index: int) -> int:
        if index == 2:
            raise OSError("the disk is gone")
        return index

    stream = read_ahead(one, [1, 2, 3])
    assert next(stream) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


@pytest.mark.parametrize(("device", "told"), [(None, False), ("cpu", False), ("cuda", True)])
def test_rows_for_a_gpu_are_pinned(device: str | None, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, copy = torch.zeros(2), torch.ones(2)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copy)
    target = None if device is None else torch.device(device)
    assert (pinned(rows, target) is copy) == told
    assert (pinned(rows, target) is rows) != told
    there = torch.zeros(2, device="meta")
    assert pinned(there, target) is there, "rows that are on a device already"


def test_rows_move_only_to_a_device_that_is_named() -> None:
    rows = torch.zeros(2)
    assert moved(rows, None) is rows
    assert moved(rows, torch.device("cpu")) is rows
    assert moved(rows, torch.device("meta")).device.type == "meta"


def test_half_of_what_is_free_on_a_gpu_is_room_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert room(gpu) == 515
    assert room(None) == room(torch.device("cpu")) == 0
    assert copied([torch.zeros(2, 3)], None) is copied([torch.zeros(2, 3)], torch.device("cpu")) is None
    assert copied([torch.zeros(130, 1)], gpu) is None  # 520 bytes
