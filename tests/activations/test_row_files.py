"""Rows in the files of other tools: the same rows, in order, mapped, or an error that names the file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_stores import everything
from torch import Tensor

from asi_lens.activations.moments import Moments
from asi_lens.activations.row_files import open_rows
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def same_as(store: ActivationStore, rows: Tensor) -> None:
    """The store holds these rows, with their moments."""
    assert torch.equal(everything(store), rows)
    expected = Moments.of(rows.double())
    torch.testing.assert_close(store.mean, expected.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(store.moments.covariance, expected.covariance, rtol=1e-4, atol=1e-4)
    square = expected.covariance.diagonal().sum().item()
    assert store.scale == pytest.approx((store.d / square) ** 0.5, rel=1e-5)


def test_a_folder_is_read_in_the_order_of_numbers(tmp_path: Path) -> None:
    rows = drawn(300, 5)
    for number in (10, 9, 2):
        part = {2: rows[:100], 9: rows[100:250], 10: rows[250:]}[number]
        np.save(tmp_path / f"acts-{number}.npy", part.numpy())
    (tmp_path / "notes.txt").write_text("other files are left alone")
    store = ActivationStore.open(tmp_path)
    same_as(store, rows)
    assert store.metadata == {"file": tmp_path.name}
    index = torch.tensor([299, 0, 99, 100, 260])
    assert torch.equal(store.rows(index), rows[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = drawn(64, 6).to(dtype)
    save_file({"activations": rows, "norms": torch.ones(64)}, tmp_path / "a.safetensors")
    same_as(ActivationStore.open(tmp_path / "a.safetensors"), rows)
    same_as(ActivationStore.open(str(tmp_path)), rows)


def test_sequences_have_positions(tmp_path: Path) -> None:
    sequences = drawn(7, 4, 3)
    save_file({"x": sequences}, tmp_path / "x.safetensors")
    store = ActivationStore.open(tmp_path / "x.safetensors")
    same_as(store, sequences.reshape(-1, 3))
    index = torch.tensor([0, 5, 27])
    places = store.positions(index)
    assert torch.equal(sequences[places[:, 0], places[:, 1]], store.rows(index))


@pytest.mark.parametrize("hook", ["blocks.3.hook_attn_out", "blocks.3.ln1.hook_normalized", "mine"])
def test_data_sets_as_saelens_caches_them(tmp_path: Path, hook: str) -> None:
    """The columns of SAELens' `CacheActivationsRunner`, saved in several files as it saves them."""
    import datasets

    sequences = drawn(9, 4, 6)
    features = datasets.Features(
        {
            hook: datasets.Array2D(shape=(4, 6), dtype="float32"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=4),
        }
    )
    columns: dict[str, Any] = {hook: sequences.numpy(), "token_ids": np.zeros((9, 4), np.int32)}
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "acts"), num_shards=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = ActivationStore.open(tmp_path / "acts")
    same_as(store, sequences.reshape(-1, 6))
    site = {"blocks.3.hook_attn_out": "attn_out"}.get(hook, hook)
    expected = {"layer": 3, "site": site} if hook != "mine" else {}
    assert store.metadata == {"file": "acts", "hook_name": hook, "context": 4, "drop_first": 0} | expected


def test_a_run_file_trains_on_them(tmp_path: Path) -> None:
    from asi_lens.sae.__main__ import main
    from asi_lens.sae.dictionary import SparseAutoencoder

    np.save(tmp_path / "rows.npy", drawn(600, 8).numpy())
    (tmp_path / "run.yaml").write_text(
        "{store: rows.npy, output: out, sae: {d_sae: 16, k: 2}, initialize: {sample: 100},"
        " train: {n_tokens: 1200, batch_size: 60}}"
    )
    assert main([str(tmp_path / "run.yaml"), "--quiet"]) == 0
    assert SparseAutoencoder.load(tmp_path / "out" / "sae").config.metadata["file"] == "rows.npy"


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        open_rows(tmp_path / "none")
    (tmp_path / "rows.csv").write_text("1,2")
    with pytest.raises(
        DataError, match=r"rows\.csv is not a file of rows; rows are in \.npy or \.safetensors"
    ):
        open_rows(tmp_path / "rows.csv")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="neither an activation store nor files of rows"):
        open_rows(empty)
    for name, array in (("ints", np.zeros((3, 2), int)), ("flat", np.zeros(3)), ("none", np.zeros((0, 2)))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(DataError, match=rf"{name}\.npy holds .* of shape .*, not rows"):
            open_rows(tmp_path / f"{name}.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "ints.npy").read_bytes()[:40])
    (tmp_path / "cut.safetensors").write_bytes(b"no")
    for name in ("cut.npy", "cut.safetensors"):
        with pytest.raises(DataError, match=name):
            open_rows(tmp_path / name)
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"one tensor of rows .*, not a \[2, 2\], b \[2, 2\]"):
        open_rows(tmp_path / "two.safetensors")


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, 2), np.float32))
    np.save(tmp_path / "b.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(
        DataError, match=r"do not belong together \(a\.npy: float32 of shape \(3, 2\); b\.npy"
    ):
        open_rows(tmp_path)
    np.save(tmp_path / "b.npy", np.zeros((3, 2), np.float16))
    with pytest.raises(DataError, match="do not belong together"):
        open_rows(tmp_path)
    np.save(tmp_path / "b.npy", np.zeros((3, 5, 2), np.float32))
    with pytest.raises(DataError, match="do not belong together"):
        open_rows(tmp_path)
    save_file({"x": torch.zeros(3, 2)}, tmp_path / "c.safetensors")
    with pytest.raises(DataError, match="several formats"):
        open_rows(tmp_path)
    bad = drawn(50, 3)
    bad[30, 1] = torch.inf
    folder = tmp_path / "bad"
    folder.mkdir()
    for number, part in enumerate(bad.split(20)):
        np.save(folder / f"{number}.npy", part.numpy())
    with pytest.raises(DataError, match="row 30 holds NaN or infinity"):
        ActivationStore.open(folder)


def test_data_sets_without_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa

    texts = datasets.Dataset.from_dict({"text": ["a", "b"]})
    texts.save_to_disk(str(tmp_path / "texts"))
    with pytest.raises(DataError, match=r"one column of arrays \[position d\].*'text'"):
        open_rows(tmp_path / "texts")
    features = datasets.Features({"blocks.0.hook_attn_out": datasets.Array2D((4, 8), "float32")})
    for name, rows, told in (("none", [], "not a data set"), ("empty", [np.zeros((4, 8))], "holds no rows")):
        made = datasets.Dataset.from_dict({"blocks.0.hook_attn_out": rows}, features=features)
        made.save_to_disk(str(tmp_path / name))
        for file in (tmp_path / name).glob("*.arrow"):  # as a stream to which nothing was written
            pa.ipc.new_stream(str(file), made.data.schema).close()
        with pytest.raises(DataError, match=told):
            open_rows(tmp_path / name)
    (tmp_path / "texts" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not a data set"):
        open_rows(tmp_path / "texts")
