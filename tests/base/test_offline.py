"""Without a network nothing is asked for, and the error says what is missing."""

from __future__ import annotations

import os
import sys
import types

import pytest

from asi_lens.base.errors import OptionError
from asi_lens.base.offline import no_hub, offline, refused


@pytest.mark.parametrize(
    ("given", "told"), [("1", True), ("True", True), ("yes", True), ("0", False), ("", False), ("no", False)]
)
def test_yes_and_no(given: str, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_OFFLINE", given)
    assert offline() == told


def test_anything_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_OFFLINE", "perhaps")
    with pytest.raises(OptionError, match="ASI_LENS_OFFLINE='perhaps' is not allowed"):
        offline()


@pytest.mark.parametrize("chosen", [True, False])
def test_the_hubs_libraries_are_told_also_if_they_are_loaded(
    chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub.constants", loaded)
    monkeypatch.setitem(sys.modules, "datasets.config", types.SimpleNamespace())
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("ASI_LENS_OFFLINE", str(int(chosen)))
    assert no_hub() == chosen
    assert chosen == loaded.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == str(int(chosen))


def test_the_error_names_what_is_missing_and_how_to_bring_it() -> None:
    told = str(refused("the model 'a/b'", "Give a folder"))
    assert told.startswith("the model 'a/b' is not on this machine, and ASI_LENS_OFFLINE=1 refuses")
    assert "Give a folder, or make a bundle" in told
    assert "ASI_LENS_BUNDLE" in told
