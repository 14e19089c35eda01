"""Cores shared by several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from asi_lens.base import threads


@pytest.fixture
def thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_short_steps_have_a_share_of_the_cores(thread_count: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 8)
    for told, inside in ((None, 6), ("2", 4), ("3", 2), ("100", 1)):
        if told is None:
            monkeypatch.delenv("ASI_LENS_JOBS", raising=False)
        else:
            monkeypatch.setenv("ASI_LENS_JOBS", told)
        torch.set_num_threads(6)
        with threads.short_steps():
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 6


def test_threads_come_back_after_an_error(thread_count: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.setenv("ASI_LENS_JOBS", "8")
    torch.set_num_threads(5)
    with pytest.raises(KeyError), threads.short_steps():
        raise KeyError
    assert torch.get_num_threads() == 5


def test_processes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"GOMP_SPINCOUNT": "7"}
    monkeypatch.setattr(threads.os, "environ", environment)
    threads.share_cores(3)
    assert environment == {"ASI_LENS_JOBS": "3", "GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "0"}
