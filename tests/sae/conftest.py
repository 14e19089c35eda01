"""Rows that a start takes, and their spectrum."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def sample() -> Any:
    """2,000 rows of `small_starts`."""
    from small_starts import rows

    return rows()


@pytest.fixture(scope="module")
def spectrum(sample: Any) -> Any:
    from asi_lens.activations.spectrum import Spectrum

    return Spectrum.of(sample)
