"""Harvests from a file, by one process and by several: the same rows, whole or not at all."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from small_ranks import file_of
from small_stores import everything

from asi_lens.activations import shards
from asi_lens.activations.__main__ import HarvestConfig, main
from asi_lens.activations.harvest_store import harvest_store
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError, OptionError, UnknownNameError
from asi_lens.base.ranks import RankError, Ranks
from asi_lens.inputs.corpora import Tokens

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")

MODULE = "asi_lens.activations"
CONTEXT, SEQUENCES = 32, 150
SITES = [["attn_out", 1], ["z", 2]]


@pytest.fixture
def values(tiny_folder: Any, tmp_path: Path) -> dict[str, Any]:
    """A harvest of a tiny model: 2 sequences a forward batch, 10 a shard."""
    words = ["a", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "while", "it", "rains"]
    lines = (" ".join(words[(i * k) % len(words)] for k in range(1, 15)) for i in range(200))
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    return {
        "model": str(tiny_folder("llama")),
        "corpus": str(tmp_path / "text.txt"),
        "tokens": {"n_tokens": CONTEXT * SEQUENCES, "context": CONTEXT},
        "sites": SITES,
        "store": {"dtype": "float32", "batch_tokens": 2 * CONTEXT, "shard_tokens": 10 * (CONTEXT - 1)},
        "model_dtype": "float32",
        "output": "one",
        "timeout_s": 5,
    }


def test_two_processes_store_what_one_does(values: dict[str, Any], tmp_path: Path, launch: Any) -> None:
    assert main([str(file_of(tmp_path, values)), "--quiet"]) == 0
    path = file_of(tmp_path, {**values, "output": "two"}, "two.yaml")
    codes, said = launch(path, path, module=MODULE).ended()
    assert codes == [0, 0], said
    assert said.count("store of 2 sites") == 1
    for site, layer in SITES:
        one, two = (ActivationStore.open(tmp_path / out / f"{site}.{layer}") for out in ("one", "two"))
        # Sorted by position in the text they are the same; they lie so already.
        assert torch.equal(everything(two), everything(one))
        assert one.metadata == two.metadata
        index = torch.tensor([0, 1000, one.n - 1])
        assert torch.equal(two.positions(index), one.positions(index))
        torch.testing.assert_close(two.moments.scatter, one.moments.scatter, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(two.mean, one.mean, rtol=1e-10, atol=1e-12)
        two.verify()
        assert not shards.unfinished(tmp_path / "two" / f"{site}.{layer}")
    # Again: there already, and by one process too.
    assert main([str(path), "--quiet"]) == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_leaves_no_half_store(
    lost: int, values: dict[str, Any], tmp_path: Path, launch: Any
) -> None:
    path = file_of(tmp_path, values)
    folder = tmp_path / "one" / "attn_out.1"
    ranks = launch(path, path, module=MODULE)
    ranks.wait_for(lambda: len(list(folder.glob("part-*/shard-*.safetensors"))) >= 2)
    ranks.processes[lost].send_signal(signal.SIGKILL)
    codes, said = ranks.ended(40)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1, said
    assert "RankError" in said
    with pytest.raises((DataError, FileNotFoundError), match=r"not finished|not an activation store"):
        ActivationStore.open(folder)
    # By another number of processes it is cut otherwise.
    assert main([str(path), "--quiet"]) == 1
    codes, said = launch(path, path, module=MODULE).ended()
    assert codes == [0, 0], said
    store = ActivationStore.open(folder)
    assert store.n == SEQUENCES * (CONTEXT - 1)
    store.verify()


def test_a_part_that_was_changed_is_no_part(values: dict[str, Any], tmp_path: Path, launch: Any) -> None:
    path = file_of(tmp_path, values)
    codes, said = launch(path, path, module=MODULE).ended()
    assert codes == [0, 0], said
    folder = tmp_path / "one" / "attn_out.1"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["shards"][0]["file"] == "part-000/shard-00000.safetensors"
    (folder / "part-001" / "shard-00000.safetensors").unlink()
    with pytest.raises(RuntimeError, match=r"part-001/shard-00000.safetensors is missing"):
        ActivationStore.open(folder)


class Alone(Ranks):
    """One of several, which hears nothing of the others."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


def test_more_processes_than_forward_batches(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path, "batch_tokens": 64, "ranks": Alone(3, 7)}
    with pytest.raises(OptionError, match="12 sequences make 6 forward batches of 2, but 7 processes"):
        harvest_store(tiny_llama, tiny_tokens, "z", 1, **options)


def test_a_harvest_into_the_cache_waits_for_another(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    first = harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, progress=False)
    assert first.folder is not None
    found: list[ActivationStore] = []

    def again() -> None:
        found.append(harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, progress=False))

    shutil.rmtree(first.folder)  # a finished store is read without a lock
    with FileLock(first.folder.with_name(first.folder.name + ".lock")):
        other = threading.Thread(target=again)
        other.start()
        other.join(0.5)
        assert other.is_alive()
        # Several processes would stop waiting for each other at different times.
        with pytest.raises(RankError, match="rank 0: CacheError: another process is writing"):
            harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, ranks=Alone(0, 2), batch_tokens=64)
    other.join(60)
    assert found[0].folder == first.folder


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"modell": "x"}, UnknownNameError, "'modell'; did you mean 'model"),
        ({"corpus": None}, OptionError, "no key 'corpus'"),
        ({"tokens": {"context": 8}}, OptionError, "given with n_tokens"),
        ({"tokens": {"n_tokens": 8, "contexts": 8}}, UnknownNameError, "tokens key 'contexts'"),
        ({"store": {"folder": "x"}}, UnknownNameError, "store key 'folder'"),
        ({"sites": ["attn_out"]}, OptionError, r"sites=\['attn_out'\] is not allowed; sites must be a list"),
        ({"sites": []}, OptionError, "sites="),
        ({"device": "tpu"}, OptionError, "device='tpu'"),
    ],
)
def test_what_a_file_may_not_hold(
    change: dict[str, Any], error: type[Exception], message: str, values: dict[str, Any], tmp_path: Path
) -> None:
    content = {key: value for key, value in {**values, **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        HarvestConfig.read(file_of(tmp_path, content))


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("tokens", {"context": "32"}, "context='32' .* a whole number"),
        ("tokens", {"n_tokens": "1e6"}, "YAML reads 1e6 as text.* 1_000_000"),
        ("tokens", {"column": 3}, "column=3 .* text"),
        ("store", {"budget_gb": "20"}, "budget_gb='20' .* a number"),
        ("store", {"drop_first": 1}, "drop_first=1 .* True or False"),
        ("model", 3, "model=3 .* text"),
        ("model_dtype", 32, "model_dtype=32 .* text"),
    ],
)
def test_options_of_another_kind_are_told_before_anything_runs(
    values: dict[str, Any], tmp_path: Path, section: str, change: Any, told: str
) -> None:
    changed = {**values[section], **change} if isinstance(change, dict) else change
    with pytest.raises(OptionError, match=told):
        HarvestConfig.read(file_of(tmp_path, {**values, section: changed}))
