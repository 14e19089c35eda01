"""On an NVIDIA card: the numbers of the CPU, from the model to the trained dictionary. Skipped where none is.

`ASI_LENS_TEST_CARD=cpu` holds the CPU against itself, which says that the tests themselves run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import small_fits
import small_lorsas
import small_starts
import torch
from small_trainings import quick

import asi_lens as al
from asi_lens.collapse.output_projection import counterfactual_records, overlap_records
from asi_lens.sae.kinds import KINDS
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.starts import STARTS

CARD = torch.device(os.environ.get("ASI_LENS_TEST_CARD", "cuda"))
if CARD.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

CPU = torch.device("cpu")
X = small_starts.rows()
CLOSE: dict[str, Any] = {"rel": 1e-3}
"""Float32 sums run in another order on a card."""


def on(device: torch.device, folder: Path) -> Any:
    """The model of a folder, on a device."""
    return al.load_model(folder, dtype="float32", device=device)


def trained(device: torch.device, kind: str, **changes: Any) -> tuple[al.Trainer, list[float]]:
    """A dictionary of a kind after 20 steps on a device, and its FVU of every step."""
    prefixes = changes.pop("prefixes", ())
    options = {"penalty": "l0"} if kind == "jumprelu" else {}
    sae = al.SparseAutoencoder(al.SAEConfig(small_starts.D_IN, small_starts.D_SAE, small_starts.K, kind))
    store = al.ActivationStore.from_tensor(X)
    al.initialize(sae, "asi", store.spectrum, 12, store.sample(500))
    trainer = al.Trainer(
        sae.to(device), quick(kernels="plain", **changes), SparsityConfig(prefixes=prefixes, **options)
    )
    return trainer, [trainer.step(batch.to(device)).fvu for batch in X.split(100)]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in KINDS),
        ("topk", {"aux_k": 8, "dead_window": 200}),
        ("topk", {"clip_norm": 0.1}),
        ("topk", {"optimizer": "sparse_adam"}),
        ("topk", {"optimizer": "sparse_adam_decay"}),
        ("batchtopk", {"prefixes": (50, 150)}),
    ],
    ids=str,
)
def test_kinds_learn_as_on_the_cpu(kind: str, changes: dict[str, Any]) -> None:
    there, theirs = trained(CARD, kind, **changes)
    here, ours = trained(CPU, kind, **changes)
    assert there.sae.W_dec.device.type == CARD.type
    assert theirs == pytest.approx(ours, **CLOSE)
    torch.testing.assert_close(there.sae.W_dec.cpu(), here.sae.W_dec, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("method", STARTS)
def test_starts_are_those_of_the_cpu(method: str) -> None:
    store, found = al.ActivationStore.from_tensor(X), []
    for device in (CPU, CARD):
        sae = small_starts.make().to(device)
        d_init = 12 if STARTS[method].subspace else None
        al.initialize(sae, method, store.spectrum, d_init, store.sample(500))
        found.append((sae.W_dec.cpu(), sae.W_enc.cpu(), sae.b_enc.cpu(), sae.b_dec.cpu()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_the_same_bytes_twice_and_after_a_stop(tmp_path: Path) -> None:
    from small_trainings import Stop, make, same_bits, small_store, stop_at

    def one() -> al.Trainer:
        return al.Trainer(make().to(CARD), quick(kernels="plain", aux_k=8))

    store, (once, again, stopped, resumed) = small_store(), (one() for _ in range(4))
    options: dict[str, Any] = {"progress": False, "log_every": 1, "checkpoint_every": 64 * 10}
    once.fit(store, **options)
    again.fit(store, **options)
    with pytest.raises(Stop):
        stopped.fit(store, folder=tmp_path, on_log=stop_at(11), **options)
    resumed.fit(store, folder=tmp_path, **options)
    assert same_bits(once, again)
    assert same_bits(once, resumed)


@pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
def test_spectra_losses_and_ranks_are_those_of_the_cpu(
    tiny_folder: Any, tiny_tokens: al.Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, float]] = []
    for name, device in (("here", CPU), ("there", CARD)):
        monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / name))  # nothing is read that the other computed
        model = on(device, tiny_folder("llama"))
        spectra = al.collect_spectra(model, tiny_tokens, [*al.SITES, "z"], progress=False)
        numbers = {f"{site} {layer}": one.effective_rank for (site, layer), one in spectra.items()}
        some = {("attn_out", 1): spectra["attn_out", 1]}
        rows = al.truncation_sweep(model, tiny_tokens, some, [0.25, 0.5], progress=False)
        numbers |= {f"loss {row['subspace']} {row['rank']}": float(row["cross_entropy"]) for row in rows}  # type: ignore[arg-type]
        for row in counterfactual_records(model, spectra, draws=1):
            numbers[f"W_O {row['layer']} {row['variant']}"] = float(row["effective_rank_fraction"])  # type: ignore[arg-type]
        for row in overlap_records(model, spectra):
            numbers[f"overlap {row['layer']} {row['head_a']} {row['head_b']}"] = float(row["mean_cosine"])  # type: ignore[arg-type]
        store = al.harvest_store(
            model, tiny_tokens, "attn_out", 1, folder=tmp_path / name / "store", dtype="float32"
        )
        numbers["mean"] = store.spectrum.mean.norm().item()
        sae = al.SparseAutoencoder(al.SAEConfig(store.d, 60, 4)).to(device)
        al.initialize(sae, "asi", store.spectrum, 8, store.sample(200))
        measured = al.evaluate(
            sae, store, model=model, tokens=tiny_tokens, where=("attn_out", 1), progress=False
        )
        assert measured.losses is not None
        numbers |= {"fvu": measured.fvu, "delta": measured.losses.cross_entropy_delta}
        found.append(numbers)
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)


def test_a_lorsa_learns_as_on_the_cpu(tiny_folder: Any, tiny_tokens: al.Tokens) -> None:
    found = []
    for device in (CPU, CARD):
        model = on(device, tiny_folder("llama"))
        pairs = al.harvest_pairs(model, tiny_tokens, small_lorsas.LAYER, progress=False)
        lorsa = small_lorsas.started(model, pairs).to(device)
        trainer = al.LorsaTrainer(lorsa, small_lorsas.quick(steps=10))
        trainer.fit(pairs, progress=False)
        end = al.evaluate_lorsa(
            lorsa, pairs, model=model, tokens=tiny_tokens, layer=small_lorsas.LAYER, progress=False
        )
        assert end.losses is not None
        found.append((end.fvu, end.losses.cross_entropy_delta, end.dead_fraction))
    assert found[1] == pytest.approx(found[0], rel=1e-2, abs=1e-4)


def test_a_small_transformer_learns_as_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, device in (("here", CPU), ("there", CARD)):
        monkeypatch.setattr(small_fits, "CPU", device)
        model = small_fits.trained(tmp_path / name).model
        with torch.no_grad():
            found.append([parameter.norm().item() for parameter in model.parameters()])
    assert found[1] == pytest.approx(found[0], **CLOSE)


def test_a_transcoder_learns_as_on_the_cpu() -> None:
    draw, found = torch.Generator().manual_seed(1), []
    y = (X @ torch.randn(small_starts.D_IN, 6, generator=draw)).relu() @ torch.randn(6, 20, generator=draw)
    stores = al.PairedStores(*map(al.ActivationStore.from_tensor, (X, y)))
    for device in (CPU, CARD):
        sae = al.Transcoder(al.SAEConfig(small_starts.D_IN, small_starts.D_SAE, small_starts.K, d_out=20))
        sae.to(device)
        al.initialize_transcoder(sae, stores, "asi", d_init=6)
        trainer = al.Trainer(sae, quick(batch_size=100, n_tokens=2000))
        trainer.fit(stores, progress=False)
        measured = al.evaluate_transcoder(sae, stores)
        found.append((measured.fvu, measured.l0))
    assert found[1] == pytest.approx(found[0], rel=1e-2)
