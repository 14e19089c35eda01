"""Harvested stores: the rows of the hooks, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_stores import OPTIONS, PER_SEQUENCE, everything, files, hooked, sinking

from asi_lens.activations import harvest_store as module
from asi_lens.activations.harvest_store import harvest_store, harvest_stores
from asi_lens.activations.shard_writer import ShardWriter
from asi_lens.activations.spectrum import Spectrum
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import CacheError, DataError, OptionError, UnknownNameError
from asi_lens.inputs import models
from asi_lens.inputs.corpora import Tokens

# Tiny stores: too few tokens for a rank is what they always have.
pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


@pytest.fixture
def small(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> ActivationStore:
    return harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "small", **OPTIONS)


# --- what is stored ---------------------------------------------------------------------------------


@pytest.mark.model_facing
@pytest.mark.parametrize("site", models.SITES)
def test_rows_are_those_of_the_hooks(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, site: str) -> None:
    found = harvest_store(tiny_llama, tiny_tokens, site, 1, folder=tmp_path / "s", dtype="float32", **OPTIONS)
    assert torch.equal(everything(found), hooked(tiny_llama, tiny_tokens, site, 1))
    assert found.metadata["hook_name"] == models.hook_name(tiny_llama, site, 1)


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24)])
def test_rows_are_rounded_to_the_dtype_asked_for(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, dtype: str, bits: int
) -> None:
    found = harvest_store(
        tiny_llama, tiny_tokens, "mlp_out", 2, folder=tmp_path / "s", dtype=dtype, **OPTIONS
    )
    exact = hooked(tiny_llama, tiny_tokens, "mlp_out", 2)
    assert torch.equal(everything(found), exact.to(getattr(torch, dtype)))
    torch.testing.assert_close(everything(found).float(), exact, rtol=2.0**-bits, atol=1e-6)


def test_the_first_position_is_kept_on_request(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    found = harvest_store(
        tiny_llama,
        tiny_tokens,
        "attn_out",
        0,
        folder=tmp_path / "s",
        dtype="float32",
        drop_first=False,
        **OPTIONS,
    )
    exact = hooked(tiny_llama, tiny_tokens, "attn_out", 0, first=0)
    assert torch.equal(everything(found), exact)
    index = torch.tensor([0, 31, 32, 33])
    assert found.positions(index).tolist() == [[0, 0], [0, 31], [1, 0], [1, 1]]


def test_massive_rows_are_not_stored_however_the_text_is_cut(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, real = ("resid_post", 0), ShardWriter.append
    with sinking(tiny_llama, tiny_tokens) as (tokens, out):
        exact = hooked(tiny_llama, tokens, *where).bfloat16()

        def stored(name: str, **changes: Any) -> ActivationStore:
            options = {**OPTIONS, **changes}
            return harvest_store(tiny_llama, tokens, *where, folder=tmp_path / name, **options)

        whole, wide = stored("whole"), stored("wide", batch_tokens=6 * 32, shard_tokens=10**6)
        everything_kept = stored("all", drop_massive=False)
        calls: list[int] = []

        def stopping(self: Any, *given: Any) -> None:
            calls.append(1)
            if len(calls) == 6:  # behind the shard that holds the first massive rows
                raise KeyboardInterrupt
            real(self, *given)

        monkeypatch.setattr(ShardWriter, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            stored("stopped")
        stored("stopped")
        with pytest.raises(OptionError, match="drop_massive True, not False"):
            stored("whole", drop_massive=False)
    rest = torch.ones(len(exact), dtype=torch.bool).index_fill(0, out, value=False)
    for found in (whole, wide):
        found.verify()
        assert torch.equal(everything(found), exact[rest])
        assert found.left_out.tolist() == out.tolist()
        assert found.metadata["left_out"] == found.spectrum.left_out == 3
        assert found.positions(torch.arange(found.n))[90:93].tolist() == [[2, 29], [2, 30], [2, 31]]
        assert found.positions(torch.arange(found.n))[96:98].tolist() == [[3, 4], [3, 6]]
    assert [shard["n"] for shard in json.loads((tmp_path / "whole/manifest.json").read_text())["shards"]] == [
        4 * PER_SEQUENCE - 1,
        4 * PER_SEQUENCE - 2,
        4 * PER_SEQUENCE,
    ]
    assert torch.equal(everything(everything_kept), exact)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert "without 3 massive" in repr(whole)


def test_a_store_without_massive_rows_keeps_its_bytes_and_its_name(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path
) -> None:
    # Dictionaries trained before massive rows were left out keep their keys where there are none.
    one, two = (
        harvest_store(
            tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / str(drop), drop_massive=drop, **OPTIONS
        )
        for drop in (True, False)
    )
    assert one.fingerprint == two.fingerprint
    assert (one.metadata["left_out"], two.metadata["left_out"]) == (0, 0)


def test_positions_find_the_token_of_a_row(
    small: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    index = torch.tensor([0, 30, 31, 200])
    found = small.positions(index)
    assert found.tolist() == [[0, 1], [0, 31], [1, 1], [6, 15]]
    with torch.device("meta"):  # the user's default device is not the store's
        assert ActivationStore.open(small.folder).positions(index).tolist() == found.tolist()
    hook = models.hook_name(tiny_llama, "attn_out", 1)
    seen: list[torch.Tensor] = []
    models.forward(tiny_llama, tiny_tokens.ids, {hook: lambda x: seen.append(x.clone())})
    torch.testing.assert_close(
        small.rows(index).float(), seen[0][found[:, 0], found[:, 1]], rtol=2e-2, atol=1e-3
    )


def test_statistics_are_those_of_the_stored_rows(small: ActivationStore) -> None:
    rows = everything(small).double()
    centred = rows - rows.mean(0)
    assert small.n == len(small) == len(rows) == 12 * PER_SEQUENCE
    torch.testing.assert_close(small.mean, rows.mean(0), rtol=0, atol=1e-7)
    assert (centred * small.scale).square().sum(1).mean().item() == pytest.approx(small.d, rel=1e-6)
    direct = Spectrum.of(rows)
    torch.testing.assert_close(small.spectrum.eigenvalues, direct.eigenvalues, rtol=1e-4, atol=1e-9)
    assert small.moments.n == small.n


def test_the_manifest_says_what_the_rows_are(
    small: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    info = models.model_info(tiny_llama)
    assert small.folder is not None
    manifest = json.loads((small.folder / "manifest.json").read_text())
    origin = manifest["origin"]
    assert origin["weights_fingerprint"] == info.fingerprint
    assert origin["tokens_fingerprint"] == tiny_tokens.fingerprint
    assert (origin["model"], origin["site"], origin["layer"]) == (info.name, "attn_out", 1)
    assert [shard["n"] for shard in manifest["shards"]] == [4 * PER_SEQUENCE] * 3
    assert sorted(path.name for path in small.folder.iterdir()) == [
        "manifest.json",
        "moments.safetensors",
        *(f"shard-{k:05d}.safetensors" for k in range(3)),
    ]
    # any safetensors reader opens a shard
    shard = load_file(small.folder / "shard-00001.safetensors")
    assert list(shard) == ["rows"]
    assert shard["rows"].shape == (4 * PER_SEQUENCE, small.d)
    assert "attn_out of layer 1" in repr(small)


def test_several_sites_in_one_pass(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[Any] = []
    real = module.harvest

    def counting(model: Any, tokens: Any, consumers: Any, **options: Any) -> None:
        passes.append([where for consumer in consumers for where in consumer.wants])
        real(model, tokens, consumers, **options)

    monkeypatch.setattr(module, "harvest", counting)
    wheres = [("attn_out", 0), ("z", 2), ("resid_post", -1)]
    found = harvest_stores(tiny_llama, tiny_tokens, wheres, folder=tmp_path, dtype="float32", **OPTIONS)
    assert list(found) == [("attn_out", 0), ("z", 2), ("resid_post", 2)]
    for (site, layer), one in found.items():
        assert torch.equal(everything(one), hooked(tiny_llama, tiny_tokens, site, layer))
        assert one.folder == tmp_path / f"{site}.{layer}"
    # again: opened; one more: that one alone
    harvest_stores(tiny_llama, tiny_tokens, [("z", 2), ("z", 0)], folder=tmp_path, dtype="float32", **OPTIONS)
    assert passes == [[("attn_out", 0), ("z", 2), ("resid_post", 2)], [("z", 0)]]


def test_without_a_folder_it_goes_to_the_cache_under_a_key(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    one = harvest_store(tiny_llama, tiny_tokens, "attn_out", 0, **OPTIONS)
    same = harvest_stores(tiny_llama, tiny_tokens, [("attn_out", 0)], **OPTIONS)["attn_out", 0]
    other = harvest_store(tiny_llama, tiny_tokens[:4], "attn_out", 0, **OPTIONS)
    precise = harvest_store(tiny_llama, tiny_tokens, "attn_out", 0, dtype="float32", **OPTIONS)
    assert one.folder == same.folder
    assert len({one.folder, other.folder, precise.folder}) == 3
    assert one.folder is not None
    assert one.folder.is_relative_to(tmp_path / "stores")


@pytest.mark.parametrize("variable", ["ASI_LENS_CACHE", "ASI_LENS_BUNDLE"])
def test_a_read_only_cache_serves_what_it_has(
    tiny_llama: Any,
    tiny_tokens: Tokens,
    tmp_path: Path,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    refuse_writes: Any,
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))
    first = harvest_store(tiny_llama, tiny_tokens, "attn_out", 0, **OPTIONS)
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv(variable, str(tmp_path))
    refuse_writes()
    again = harvest_store(tiny_llama, tiny_tokens, "attn_out", 0, **OPTIONS)
    assert again.folder == first.folder
    assert torch.equal(again.sample(9), first.sample(9))
    with pytest.raises(OSError, match=r"cannot write .*attn_out.1: Read-only file system"):
        harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, **OPTIONS)


# --- a harvest that stops ---------------------------------------------------------------------------


def test_a_harvest_stopped_anywhere_goes_on_to_the_same_bytes(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheres = [("attn_out", 1), ("z", 2)]
    whole = tmp_path / "whole"
    harvest_stores(tiny_llama, tiny_tokens, wheres, folder=whole, **OPTIONS)
    folder = tmp_path / "stopped"
    real = ShardWriter.append
    calls = 0

    def stopping(self: Any, rows: Any, left_out: Any = None) -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 7, 12):
            raise KeyboardInterrupt
        real(self, rows, left_out)

    monkeypatch.setattr(ShardWriter, "append", stopping)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            harvest_stores(tiny_llama, tiny_tokens, wheres, folder=folder, **OPTIONS)
        assert not list(folder.glob("*/manifest.json"))
        with pytest.raises((DataError, FileNotFoundError), match=r"not finished|n[eo].* an activation store"):
            ActivationStore.open(folder / "attn_out.1")
    harvest_stores(tiny_llama, tiny_tokens, wheres, folder=folder, **OPTIONS)
    for name in ("attn_out.1", "z.2"):
        assert files(folder / name) == files(whole / name)


def test_no_room_is_said_before_anything_is_written(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(OSError, match=r"1.79e-05 GB are to be written to .*, 1e-06 GB are free"):
        harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "s", **OPTIONS)
    assert not list((tmp_path / "s").iterdir())


def test_a_read_only_folder(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(PermissionError, match=r"cannot write .*/s: Permission denied"):
        harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "s", **OPTIONS)


def test_two_harvests_on_one_folder(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    from filelock import FileLock

    with (
        FileLock(tmp_path / "s.lock"),
        pytest.raises(CacheError, match="another process is writing the store"),
    ):
        harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "s", **OPTIONS)
    harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "s", **OPTIONS)


# --- options ----------------------------------------------------------------------------------------


def test_the_size_is_stated_and_held_against_the_budget(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 372 * 24 * 2
    with pytest.raises(OptionError, match=r"1\.79e-05 GB, over budget_gb=1\.7e-05"):
        harvest_store(
            tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "s", budget_gb=1.7e-5, **OPTIONS
        )
    assert not list((tmp_path / "s").glob("*"))
    assert capsys.readouterr().out == ""
    harvest_store(
        tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "s", budget_gb=size / 1e9, **OPTIONS
    )
    assert "attn_out 1, 372 rows in bfloat16: 1.79e-05 GB" in capsys.readouterr().out
    with pytest.raises(OptionError, match="2 sites, 372 rows"):
        harvest_stores(
            tiny_llama, tiny_tokens, [("z", 0), ("z", 1)], folder=tmp_path, budget_gb=size / 1e9, **OPTIONS
        )


@pytest.mark.parametrize(
    "change", [{"dtype": "int8"}, {"budget_gb": 0}, {"shard_tokens": 0}, {"batch_tokens": 0}]
)
def test_options_out_of_range(
    tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match=next(iter(change))):
        harvest_store(tiny_llama, tiny_tokens, "z", 0, folder=tmp_path / "s", **{**OPTIONS, **change})


def test_sites_and_layers_that_do_not_exist(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="attn_out"):
        harvest_store(tiny_llama, tiny_tokens, "atn_out", 0, folder=tmp_path / "s")
    with pytest.raises(OptionError, match="layer"):
        harvest_stores(tiny_llama, tiny_tokens, [("z", 3)], folder=tmp_path / "s")
    with pytest.raises(OptionError, match=r"one or more .site, layer."):
        harvest_stores(tiny_llama, tiny_tokens, [], folder=tmp_path / "s")


def test_activations_that_are_not_finite(tiny_folder: Any, tiny_tokens: Tokens, tmp_path: Path) -> None:
    model = models.load_model(tiny_folder("llama"), dtype="float32", device="cpu")
    weight = models.output_projection(model, 0)  # a view of the model's own
    weight[0, 0, 0] = 1e6
    with pytest.raises(DataError, match="rows 0 to 62 are not finite in float16; store them in bfloat16"):
        harvest_store(model, tiny_tokens, "attn_out", 0, folder=tmp_path / "a", dtype="float16", **OPTIONS)
    weight[0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="attn_out of layer 0, batch 0: NaN or infinity"):
        harvest_store(model, tiny_tokens, "attn_out", 0, folder=tmp_path / "b", **OPTIONS)
    assert not list((tmp_path / "b").glob("*"))


# --- the real model ---------------------------------------------------------------------------------


@pytest.mark.packaged
def test_a_store_of_the_packaged_model(tmp_path: Path) -> None:
    from asi_lens.inputs.corpora import load_tokens

    model = models.load_model("smollm2-135m", dtype="float32", device="cpu")
    tokens = load_tokens("news-en", model, 2048, context=128)
    found = harvest_stores(
        model,
        tokens,
        [("attn_out", 2), ("z", 1)],
        folder=tmp_path,
        batch_tokens=512,
        shard_tokens=600,
        progress=False,
    )
    for (site, layer), one in found.items():
        one.verify()
        assert torch.equal(everything(one), hooked(model, tokens, site, layer, batch=4).bfloat16())
        assert (one.n, one.d) == (16 * 127, 576)
