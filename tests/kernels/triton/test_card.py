"""What is said where the kernels cannot run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from asi_lens.kernels.triton import language
from asi_lens.kernels.triton.card import UnsupportedError, require_card, require_contiguous

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(triton="3.6.0", capability=(9, 0))` is one with such a card, none of whose memory is used."""

    def of(triton: str | None = "3.6.0", capability: tuple[int, int] = (9, 0), interpret: str = "0") -> None:
        found = None if triton is None else SimpleNamespace(__version__=triton)
        monkeypatch.setattr(language, "triton", found)
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card 7")

    return of


@pytest.mark.parametrize(
    ("given", "device", "message"),
    [
        ({"triton": None}, CUDA, "Triton is not installed.*pip install 'triton>=3.6'"),
        ({"triton": "3.5.1"}, CUDA, "Triton 3.5.1 is too old; the kernels need 3.6 or newer"),
        ({"triton": "2.10.0"}, CUDA, "Triton 2.10.0 is too old"),
        ({}, torch.device("cpu"), "an NVIDIA card, not on cpu"),
        ({"capability": (8, 0)}, CUDA, r"9.x \(H100, H200\), and Card 7 has 8.0"),
        ({"capability": (12, 0)}, CUDA, "Card 7 has 12.0"),
        ({"interpret": "1"}, CUDA, "not on cuda:0; unset the variable"),
    ],
)
def test_where_the_kernels_do_not_run(machine: Any, given: Any, device: torch.device, message: str) -> None:
    machine(**given)
    with pytest.raises(UnsupportedError, match=message):
        require_card(device)


def test_amd_is_refused(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(UnsupportedError, match="built for AMD's"):
        require_card(CUDA)


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1+git123", "4.0"])
def test_where_they_run(machine: Any, version: str) -> None:
    machine(triton=version)
    require_card(CUDA)
    machine(triton=version, interpret="1")
    require_card(torch.device("cpu"))


def test_tensors_that_the_kernels_would_misread_are_refused() -> None:
    rows = torch.zeros(3, 4)
    require_contiguous(x=rows)
    with pytest.raises(ValueError, match=r"encoder of shape \(4, 3\) is not contiguous"):
        require_contiguous(x=rows, encoder=rows.T)
