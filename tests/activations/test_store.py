"""Stores opened and read: what was asked for, undamaged, shuffled over the whole store, in memory too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_stores import OPTIONS, everything, files

from asi_lens.activations import ahead
from asi_lens.activations import store as store_module
from asi_lens.activations.harvest_store import harvest_store
from asi_lens.activations.shard_writer import ShardWriter
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import DataError, OptionError
from asi_lens.inputs.corpora import Tokens
from asi_lens.training.mesh import Mesh, MeshConfig

# Tiny stores: too few tokens for a rank is what they always have.
pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


@pytest.fixture
def small(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> ActivationStore:
    return harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=tmp_path / "small", **OPTIONS)


# --- opening ----------------------------------------------------------------------------------------


def test_a_folder_that_holds_another_store(
    small: ActivationStore, tiny_llama: Any, tiny_tokens: Tokens
) -> None:
    before = files(small.folder) if small.folder else {}
    with pytest.raises(OptionError, match=r"holds attn_out of layer 1 .*, not z of layer 1"):
        harvest_store(tiny_llama, tiny_tokens, "z", 1, folder=small.folder, **OPTIONS)
    with pytest.raises(OptionError, match="tokens_fingerprint"):
        harvest_store(tiny_llama, tiny_tokens[:4], "attn_out", 1, folder=small.folder, **OPTIONS)
    with pytest.raises(OptionError, match="dtype 'bfloat16', not 'float32'"):
        harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=small.folder, dtype="float32", **OPTIONS)
    assert small.folder is not None
    assert files(small.folder) == before


# --- reading ----------------------------------------------------------------------------------------


@pytest.fixture(params=["disk", "memory"])
def numbered(request: pytest.FixtureRequest, tmp_path: Path) -> ActivationStore:
    """1,000 rows whose first entry is their number (exact in float32), in ten shards or in memory."""
    rows = torch.stack([torch.arange(1000.0), -torch.arange(1000.0)], 1)
    if request.param == "memory":
        return ActivationStore.from_tensor(rows)
    writer = ShardWriter(tmp_path / "n", {}, n_total=1000, d=2, dtype="float32", shard_rows=100)
    for part in rows.split(50):
        writer.append(part)
    writer.finish()
    return ActivationStore.open(tmp_path / "n")


def numbers(batches: Iterator[torch.Tensor]) -> list[int]:
    return torch.cat(list(batches))[:, 0].int().tolist()


def test_an_epoch_holds_every_row_once_and_the_next_in_another_order(numbered: ActivationStore) -> None:
    stream = numbers(numbered.batches(64, seed=3, n_tokens=2000))
    first, second = stream[:1000], stream[1000:]
    assert sorted(first) == sorted(second) == list(range(1000))
    assert first != second
    assert first != sorted(first)


def test_the_stream_is_a_function_of_seed_and_position_alone(numbered: ActivationStore) -> None:
    stream = numbers(numbered.batches(64, seed=3, n_tokens=2500))
    assert numbers(numbered.batches(7, seed=3, n_tokens=2500)) == stream
    assert numbers(numbered.batches(100, seed=3, start=950, n_tokens=2500)) == stream[950:]
    assert numbers(numbered.batches(1500, seed=3, n_tokens=2500)) == stream
    assert numbers(numbered.batches(64, seed=4, n_tokens=2500)) != stream
    assert [len(batch) for batch in numbered.batches(64, n_tokens=150)] == [64, 64, 22]
    assert list(numbered.batches(64, start=150, n_tokens=150)) == []


def test_a_stream_without_an_end_goes_on(numbered: ActivationStore) -> None:
    batches = numbered.batches(300)
    for _ in range(11):
        assert next(batches).shape == (300, 2)


def test_the_next_batch_is_read_while_one_is_worked_on(
    numbered: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read = numbered._read

    def counted(index: torch.Tensor) -> Any:
        sizes.append(len(index))
        return read(index)

    monkeypatch.setattr(numbered, "_read", counted)
    batches = numbered.batches(5, n_tokens=17)
    next(batches)
    batches.close()  # waits for what is under way
    assert sizes == [5, 5]
    assert [len(batch) for batch in numbered.batches(5, n_tokens=17)] == [5, 5, 5, 2]


def test_an_error_of_reading_ahead_is_raised(
    numbered: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(index: torch.Tensor) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(numbered, "_read", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(numbered.batches(5))


def test_every_batch_mixes_the_whole_store(numbered: ActivationStore) -> None:
    stream = torch.tensor(numbers(numbered.batches(100, seed=0, n_tokens=1000)))
    for batch in stream.split(100):
        # about ten rows of every tenth of the store, never more than 25 or fewer than 1
        counts = torch.bincount(batch // 100, minlength=10)
        assert counts.min() >= 1
        assert counts.max() <= 25
    # rows that were neighbours in the text are not neighbours in the stream
    assert ((stream[1:] - stream[:-1]).abs() == 1).sum() < 15


def test_shares_of_a_batch_are_the_batch(numbered: ActivationStore) -> None:
    options = {"seed": 3, "start": 20, "n_tokens": 155}
    whole = list(numbered.batches(30, **options))
    parts = []
    for rank in range(4):
        mesh = Mesh()
        mesh.config, mesh.data_rank = MeshConfig(data=4), rank
        parts.append(list(numbered.batches(30, share=mesh.tokens, **options)))
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat(shares), batch)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_batches_drawn_from_a_copy_are_those_that_are_read(
    numbered: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    options: dict[str, Any] = {"start": 3, "n_tokens": 2 * numbered.n + 5, "device": cpu}
    shared = options | {"share": lambda n: (1, n), "dtype": None}
    read = [list(numbered.batches(7, **given)) for given in (options, shared)]
    needed = numbered.n * numbered.d * numbered.dtype.itemsize
    copies: list[torch.Tensor] = []

    def copy(parts: Any, device: Any) -> Any:
        copies.append(ahead.copied(parts, device))
        return copies[-1]

    monkeypatch.setattr(store_module, "copied", copy)
    for room in (needed - 1, needed):
        monkeypatch.setattr(ahead, "room", lambda device, room=room: room)
        drawn = [list(numbered.batches(7, **given)) for given in (options, shared)]
        for ours, theirs in zip(drawn, read, strict=True):
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
    # Rows that lie there already need no room.
    assert [copied is None for copied in copies] == [numbered.folder is not None] * 2 + [False] * 2


def test_batches_have_the_dtype_asked_for(small: ActivationStore) -> None:
    assert next(small.batches(8)).dtype == torch.float32
    assert next(small.batches(8, dtype=None)).dtype == torch.bfloat16
    assert torch.equal(next(small.batches(8, dtype=None)).float(), next(small.batches(8)))


def test_rows_by_index(numbered: ActivationStore) -> None:
    index = torch.tensor([999, 0, 500, 0, 100, 99])
    assert numbered.rows(index)[:, 0].tolist() == index.tolist()
    for bad in ([1000], [-1]):
        with pytest.raises(OptionError, match="not allowed; 0 to 999 are"):
            numbered.rows(torch.tensor(bad))
    with pytest.raises(OptionError, match="not harvested from tokens"):
        numbered.positions(index)


def test_a_sample_has_different_rows_and_depends_on_its_seed(numbered: ActivationStore) -> None:
    sample = numbered.sample(1000, seed=1)[:, 0].int().tolist()
    assert sorted(sample) == list(range(1000))
    assert numbered.sample(50, seed=1)[:, 0].int().tolist() == sample[:50]
    assert numbered.sample(50, seed=2)[:, 0].int().tolist() != sample[:50]
    assert next(numbered.batches(50, seed=1))[:, 0].int().tolist() != sample[:50]
    with pytest.raises(OptionError, match="n=1001"):
        numbered.sample(1001)


def test_reading_in_order_copies_nothing(numbered: ActivationStore) -> None:
    parts = list(numbered.in_order(64))
    assert torch.cat(parts)[:, 0].tolist() == list(range(1000))
    again = list(numbered.in_order(64))
    assert [part.data_ptr() for part in parts] == [part.data_ptr() for part in again]


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"start": -1}, {"seed": -1}, {"start": 10, "n_tokens": 9}]
)
def test_batches_out_of_range(numbered: ActivationStore, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        numbered.batches(**{"batch_size": 4, **options})


def test_fingerprints_follow_the_rows(small: ActivationStore) -> None:
    assert small.folder is not None
    assert ActivationStore.open(small.folder).fingerprint == small.fingerprint
    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    prints = {
        ActivationStore.from_tensor(x).fingerprint
        for x in (rows, rows.clone(), rows + 1e-3, rows[:99], rows.flip(0))
    }
    assert len(prints) == 4


# --- in memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npy_files_are_mapped(tmp_path: Path, dtype: type) -> None:
    rows = np.random.default_rng(0).normal(3.0, 2.0, (500, 6)).astype(dtype)
    np.save(tmp_path / "rows.npy", rows)
    found = ActivationStore.from_tensor(tmp_path / "rows.npy", {"site": "attn_out"})
    assert torch.equal(everything(found), torch.from_numpy(rows))
    np.testing.assert_allclose(found.mean.numpy(), rows.astype(float).mean(0), rtol=1e-5)
    assert next(found.batches(8)).dtype == torch.float32
    assert found.metadata == {"site": "attn_out", "file": "rows.npy"}
    assert found.spectrum.d == 6


def test_tensors_and_arrays_in_any_layout() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for form in (
        rows,
        rows.detach().numpy(),
        np.asfortranarray(rows.detach().numpy()),
        rows.T.contiguous().T,
    ):
        assert torch.equal(everything(ActivationStore.from_tensor(form)), rows.detach())


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    rows = torch.zeros(20, 3)
    with pytest.raises(DataError, match="do not vary"):
        _ = ActivationStore.from_tensor(rows).scale
    rows[17, 1] = float("nan")
    with pytest.raises(DataError, match="row 17 holds NaN"):
        ActivationStore.from_tensor(rows)
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, 4)):
        with pytest.raises(DataError, match="matrix"):
            ActivationStore.from_tensor(bad)
    with pytest.raises(DataError, match="floating point"):
        ActivationStore.from_tensor(torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(DataError, match="masked array"):
        ActivationStore.from_tensor(np.ma.masked_greater(np.random.default_rng(0).normal(size=(9, 3)), 0))
    np.save(tmp_path / "objects.npy", np.array([[1, "a"]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="plain numbers"):
        ActivationStore.from_tensor(tmp_path / "objects.npy")
    with pytest.raises(FileNotFoundError):
        ActivationStore.from_tensor(tmp_path / "none.npy")
    np.save(tmp_path / "words.npy", np.array([["a", "b"]]))
    with pytest.raises(DataError, match="plain numbers"):
        ActivationStore.from_tensor(tmp_path / "words.npy")
    with pytest.raises(DataError, match="cannot be read"):
        ActivationStore.from_tensor(np.array([["a", "b"]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_are_copied_to_a_gpu_ahead() -> None:
    for rows in (torch.randn(300, 6).bfloat16(), torch.randn(300, 6).bfloat16().cuda()):
        store = ActivationStore.from_tensor(rows)
        on_gpu = list(store.batches(64, n_tokens=200, device=torch.device("cuda")))
        here = list(store.batches(64, n_tokens=200))
        assert {batch.device.type for batch in on_gpu} == {"cuda"}
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(on_gpu, here, strict=True))
