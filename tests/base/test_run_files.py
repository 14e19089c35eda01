"""Commands of one YAML file: what the file may hold, and how an error is told."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from asi_lens.base import run_files
from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.base.ranks import Ranks


def read(path: Path, text: str) -> dict[str, Any]:
    path.write_text(text, encoding="utf-8")
    return run_files.read_yaml(
        path, ("store", "train", "output"), ("store", "output"), ("train",), ("output",)
    )


def test_keys_sections_and_folders_are_read(tmp_path: Path) -> None:
    found = read(tmp_path / "run.yaml", "store: s\ntrain: {lr: 0.1}\noutput: out\n")
    assert found == {"store": "s", "train": {"lr": 0.1}, "output": tmp_path / "out"}
    assert read(tmp_path / "run.yaml", "store: s\noutput: /far\n")["output"] == Path("/far")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("a: [", DataError, r"run\.yaml cannot be read"),
        ("just words", DataError, r"run\.yaml must hold keys and values"),
        ("stor: s", UnknownNameError, r"key in run\.yaml 'stor'; did you mean 'store'"),
        ("store: s", OptionError, r"run\.yaml has no key 'output'"),
        ("{store: s, output: o, train: [1]}", OptionError, r"train=\[1\] .* keys and values"),
        ("{store: s, output: }", OptionError, r"output=None .* the path of a folder"),
        ("{store: s, output: o, train: {lr: 1e-3}}", OptionError, r"as text; write 0\.001$"),
        ("{store: s, output: o, train: {n: 1e6}}", OptionError, r"write 1000000\.0 or, .*, 1_000_000$"),
    ],
)
def test_what_a_file_may_not_hold(tmp_path: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path / "run.yaml", text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml cannot be read"):
        run_files.read_yaml(tmp_path / "none.yaml", (), (), (), ())


@pytest.mark.parametrize(
    ("device", "timeout_s", "told"),
    [("tpu", 1, "device='tpu'"), ("cpu", 0, "timeout_s=0"), ("cpu", True, "timeout_s")],
)
def test_a_machine_that_cannot_be(device: str, timeout_s: Any, told: str) -> None:
    run_files.require_machine("cuda", 0.5)
    with pytest.raises(OptionError, match=told):
        run_files.require_machine(device, timeout_s)


@pytest.mark.parametrize(("n", "rank", "told"), [(0, "0", "no GPU"), (2, "2", "2 GPUs")])
def test_a_gpu_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, n: int, rank: str, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert run_files.device_here("cpu") == "cpu"
    with pytest.raises(OptionError, match=rf"device='cuda:{rank}' is not allowed.*finds {told}"):
        run_files.device_here("cuda")


def test_ranks_agree_from_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name == "asi_lens":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(run_files, "version", installed)
    run_files.agree(Ranks(), {"k": 1})


@dataclass
class Config:
    """A file with nothing but its machine."""

    device: str = "cpu"
    timeout_s: float = 1


@pytest.mark.parametrize(
    ("error", "told"),
    [(None, ""), (OptionError("k=0"), "OptionError: k=0\n"), (OSError("full"), "OSError: full\n")],
)
def test_a_command_ends_with_a_status_and_says_why(
    error: Exception | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    seen: list[tuple[Path, bool]] = []

    def run(path: Path, ranks: Ranks, progress: bool) -> None:
        seen.append((path, progress))
        if error is not None:
            raise error

    code = run_files.command(
        "do", "It does.", lambda path: Config(), lambda c, r, p: run(Path("x"), r, p), ["x", "--quiet"]
    )
    assert (code, seen) == (0 if error is None else 1, [(Path("x"), False)])
    assert capsys.readouterr().err == told
