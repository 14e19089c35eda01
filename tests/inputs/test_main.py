"""The command that checks a model: its table, and an exit status that a script can use."""

from __future__ import annotations

from typing import Any

import pytest

from asi_lens.inputs.__main__ import main


@pytest.mark.model_facing
def test_a_model_that_holds(tiny_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_folder("llama")), "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert "logits" in shown
    assert "attn" in shown


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["/no/such/folder"]) == 1
    assert "/no/such/folder" in capsys.readouterr().err
