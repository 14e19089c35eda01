"""Where the kernels run: the version of Triton, the card and its free memory."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from asi_lens.kernels.triton import language

OLDEST_TRITON = (3, 6)
"""Oldest Triton whose compiler is tested with these kernels."""
CAPABILITY = 9
"""Major compute capability that the kernels are compiled for in the tests: Hopper (H100, H200, GH200)."""
GIB = 2**30


class UnsupportedError(ValueError):
    """The kernels cannot do what is asked here. The text says what is missing and what would do."""


def require_card(device: torch.device) -> None:
    """Raise UnsupportedError unless the kernels run on `device`.

    They need Triton and a Hopper card. With TRITON_INTERPRET=1, which Triton reads when it is imported, they
    run on the CPU, thousands of times slower: for tests.
    """
    wanted = ".".join(map(str, OLDEST_TRITON))
    if language.triton is None:
        raise UnsupportedError(
            "Triton is not installed. It comes with PyTorch's builds for NVIDIA cards; "
            f"otherwise: pip install 'triton>={wanted}'"
        )
    found = language.triton.__version__
    if _version(found) < OLDEST_TRITON:
        raise UnsupportedError(f"Triton {found} is too old; the kernels need {wanted} or newer")
    if language.interpreted():
        if device.type != "cpu":
            raise UnsupportedError(
                f"TRITON_INTERPRET=1 runs the kernels on the CPU, not on {device}; unset the variable"
            )
        return
    if device.type != "cuda":
        raise UnsupportedError(f"the kernels run on an NVIDIA card, not on {device}")
    if torch.version.hip:
        raise UnsupportedError("the kernels run on NVIDIA cards, and this PyTorch is built for AMD's")
    major, minor = torch.cuda.get_device_capability(device)
    if major != CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UnsupportedError(
            f"the kernels are made for compute capability {CAPABILITY}.x (H100, H200), "
            f"and {name} has {major}.{minor}"
        )


def require_contiguous(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor that is not contiguous: the kernels would read other memory."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not contiguous")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
