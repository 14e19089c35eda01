"""One command line: every command is named, runs, and hands on its arguments and exit status."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from asi_lens.__main__ import COMMANDS, main, usage


def test_help_names_every_command_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown == usage() + "\n"
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", shown, re.M)
        assert f"  asi-lens {name} " in shown
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_takes_its_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out
    assert callable(importlib.import_module(f"asi_lens.{COMMANDS[name].module}").main)


def test_arguments_and_exit_status_are_handed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err
    assert main(["trian", "x"]) == 2
    assert "unknown command 'trian'; did you mean 'train'" in capsys.readouterr().err


def test_version_is_quick() -> None:
    """Neither torch nor a notebook stack is imported for the version."""
    code = (
        "import sys; from asi_lens.__main__ import main; main(['--version']); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)
