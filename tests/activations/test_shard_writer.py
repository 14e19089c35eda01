"""Shards are written whole: a killed, stopped or refused harvest goes on behind them."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import OPTIONS, files

from asi_lens.activations.harvest_store import harvest_store
from asi_lens.activations.shard_writer import ShardWriter
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError, OptionError
from asi_lens.base.ranks import Ranks
from asi_lens.inputs.corpora import Tokens

# Tiny stores: too few tokens for a rank is what they always have.
pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


def test_a_killed_harvest_goes_on_at_the_last_whole_shard(
    tiny_folder: Any, tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(tiny_tokens.ids, tmp_path / "ids.pt")
    program = f"""
        import os, signal
        import torch
        torch.set_num_threads(1)
        from asi_lens import load_model
        from asi_lens.inputs.corpora import Tokens
        from asi_lens.activations.shard_writer import ShardWriter
        from asi_lens.activations.harvest_store import harvest_store
        model = load_model({str(tiny_folder("llama"))!r}, dtype="float32", device="cpu")
        real, calls = ShardWriter.append, []
        def append(self, *given):
            calls.append(1)
            if len(calls) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, *given)
        ShardWriter.append = append
        tokens = Tokens(torch.load({str(tmp_path / "ids.pt")!r}), "random", "tiny", 32)
        harvest_store(model, tokens, "attn_out", 1, folder={str(tmp_path / "s")!r}, **{OPTIONS!r})
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "s" / "shard-00001.safetensors.unfinished").exists()
    for name in ("whole", "s"):
        harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / name, **OPTIONS)
    # six batches in all, two per shard: the first shard was whole
    assert "1.79e-05 GB, 33% there already, in" in capsys.readouterr().out
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def finish_never(self: Any) -> None:
    raise KeyboardInterrupt


def test_a_stop_between_the_last_shard_and_the_manifest(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = harvest_store(tiny_llama, tiny_tokens, "z", 0, folder=tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", finish_never)
        with pytest.raises(KeyboardInterrupt):
            harvest_store(tiny_llama, tiny_tokens, "z", 0, folder=tmp_path / "s", **OPTIONS)
    with pytest.raises(DataError, match="372 rows so far"):
        ActivationStore.open(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", None)  # nothing is left to append
        found = harvest_store(tiny_llama, tiny_tokens, "z", 0, folder=tmp_path / "s", **OPTIONS)
    assert found.folder is not None
    assert whole.folder is not None
    assert files(found.folder) == files(whole.folder)


def test_the_beginning_of_another_store_is_not_gone_on_with(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", finish_never)
        with pytest.raises(KeyboardInterrupt):
            harvest_store(tiny_llama, tiny_tokens, "attn_out", 0, folder=tmp_path / "s", **OPTIONS)
    with pytest.raises(OptionError, match=r"beginning of another store .*layer 0, not 1"):
        harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "s", **OPTIONS)
    with pytest.raises(OptionError, match=r"dtype 'bfloat16', not 'float32'"):
        harvest_store(
            tiny_llama, tiny_tokens, "attn_out", 0, folder=tmp_path / "s", dtype="float32", **OPTIONS
        )


def test_a_part_is_not_gone_on_with_by_another_number_of_processes(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path
) -> None:
    class Part(Ranks):
        """A rank whose peers did as it did."""

        def __init__(self, rank: int, size: int):
            self.rank, self.size = rank, size

        def together(self, what: str, work: Any) -> Any:
            return work()

    def harvest(*part: int) -> ActivationStore:
        options = {**OPTIONS, "folder": tmp_path / "s", "ranks": Part(*part)}
        return harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, **options)

    # Of six batches rank 1 has the third and fourth of 3 processes, but the second and third of 4.
    for rank in (1, 2):
        with pytest.raises(DataError, match="is not finished"):  # its peers have not begun
            harvest(rank, 3)
    with pytest.raises(OptionError, match=r"beginning of another store \(first 124, not 62\)"):
        harvest(1, 4)
    whole = harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "whole", **OPTIONS)
    assert torch.equal(*(torch.cat(list(store.in_order(500))) for store in (harvest(0, 3), whole)))


def test_a_full_disk_keeps_whole_shards(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    real = Path.open

    class Full(io.BufferedWriter):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opening(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb" and self.name.startswith("shard-00001"):
            raw = io.FileIO(self, "wb")
            return Full(raw)
        return real(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opening)
        with pytest.raises(
            OSError, match=r"cannot write .*No space left.*; 124 of 372 rows are safe"
        ) as caught:
            harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=folder, **OPTIONS)
        assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in folder.iterdir()) == [
        "partial.safetensors",
        "shard-00000.safetensors",
    ]
    harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=folder, **OPTIONS).verify()
