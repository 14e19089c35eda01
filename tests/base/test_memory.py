"""Memory that tensors may still take."""

from __future__ import annotations

import pytest
import torch

from asi_lens.base.memory import free_bytes


def test_memory_that_pytorch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    assert free_bytes(torch.device("cuda", 0)) == 1030
    assert free_bytes(torch.device("cpu")) is None
