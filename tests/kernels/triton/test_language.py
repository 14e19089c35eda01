"""Triton where it is installed, and device code that stays plain Python where it is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from asi_lens.kernels.triton import language
from asi_lens.kernels.triton.language import interpreted, jit, next_power_of_2

WITHOUT = """
import sys
sys.modules["triton"] = None  # an ImportError for whoever imports it
import torch
from asi_lens.kernels.triton import decode, encode, language, picks, select, update
from asi_lens.kernels.triton.card import UnsupportedError, require_card
assert language.triton is None and not language.interpreted()
try:
    require_card(torch.device("cuda"))
except UnsupportedError as error:
    print(error)
"""


def test_the_kernels_import_without_triton_and_say_what_is_missing() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout
    assert "pip install 'triton>=3.6'" in done.stdout


def test_without_triton_a_kernel_stays_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "triton", None)

    def double(x: int) -> int:
        return 2 * x

    assert jit(do_not_specialize=("x",))(double) is double


def test_the_interpreter_needs_triton_and_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, value, expected in [(None, "1", False), (object(), "0", False), (object(), "1", True)]:
        monkeypatch.setattr(language, "triton", installed)
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert interpreted() is expected


def test_powers_of_two() -> None:
    assert [next_power_of_2(n) for n in (1, 2, 3, 4, 5, 576, 1024)] == [1, 2, 4, 4, 8, 1024, 1024]
