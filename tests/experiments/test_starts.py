"""Starts side by side: what each run begins with, and what its rows say of its course."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_trainings import D_IN, quick, rows

from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import OptionError, UnknownNameError
from asi_lens.experiments.recipes import Recipe
from asi_lens.experiments.rows import dead_feature_rows
from asi_lens.experiments.runs import TrainedRun, started, train_recipes
from asi_lens.experiments.starts import LAYER, METHODS, TEXT, subspaces, tried_rows
from asi_lens.sae.drift import Drift

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
ABOUT = {"model": "m", "corpus": "news", "site": "attn_out", "layer": 3}
D_SAE = 64


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path))


@pytest.fixture
def store() -> ActivationStore:
    return ActivationStore.from_tensor(rows(), ABOUT)


@pytest.fixture
def others() -> dict[str, ActivationStore]:
    """Stores whose leading directions are the last ones of `store`, and every second one."""
    turned = rows().flip(1)
    mixed = rows()[:, torch.arange(D_IN).roll(3)]
    return {
        TEXT: ActivationStore.from_tensor(turned, ABOUT),
        LAYER: ActivationStore.from_tensor(mixed, ABOUT),
    }


def train(store: ActivationStore, methods: list[Recipe], **options: object) -> list[TrainedRun]:
    common = {"d_sae": D_SAE, "k": 4, "train": quick(n_tokens=640), "log_every": 2, "progress": False}
    return train_recipes(store, methods, **common, **options)  # type: ignore[arg-type]


def test_every_start_is_trained_and_told(store: ActivationStore, others: dict[str, ActivationStore]) -> None:
    runs = train(store, list(METHODS), subspaces=others)
    assert len({run.folder for run in runs}) == len(METHODS)
    found = tried_rows(runs, dead_feature_rows(runs, store))
    ends = {row.method: row for row in found if row.split == "held_out"}
    assert list(ends) == [recipe.name for recipe in METHODS]
    asi = ends["ASI"]
    assert asi.decoder_inside_start == pytest.approx(1, abs=0.01)
    assert ends["ASI + data points"].decoder_inside_start == pytest.approx(1, abs=0.01)
    for name in ("random", "ASI of another text", "ASI of another layer"):
        assert ends[name].decoder_inside_start < 0.9 * asi.decoder_inside_start
        assert ends[name].d_init == (None if name == "random" else asi.d_init)
    assert {ends[name].encoder_norm for name in ends if "aligned" in name} == {1.0}
    assert ends["ASI"].encoder_norm < 1
    for run in runs:
        row, last = ends[run.recipe.name], run.history()[-1]
        assert row.decoder_inside_end == last["decoder_inside"]
        slow, fast = (
            min(r["tokens_per_s"] for r in run.history()),
            max(r["tokens_per_s"] for r in run.history()),
        )
        assert 640 / fast - 0.01 <= row.train_seconds <= 640 / slow + 0.01


def test_a_start_elsewhere_lies_in_the_other_subspace(
    store: ActivationStore, others: dict[str, ActivationStore]
) -> None:
    recipe = Recipe("there", "asi", 4, subspace_of=TEXT)
    (run,) = train(store, [recipe], subspaces=others)
    trainer, about = started(run, store, torch.device("cpu"), None)
    inside, _ = Drift(others[TEXT].spectrum, 4).shares(trainer.sae)
    torch.testing.assert_close(inside, torch.ones(D_SAE))
    torch.testing.assert_close(trainer.sae.input_mean, store.mean.float())
    assert about["initialization"]["options"]["subspace_of"] == others[TEXT].spectrum.fingerprint
    # The same name for another store is another run.
    (other,) = train(store, [recipe], subspaces={TEXT: others[LAYER]})
    assert other.folder != run.folder
    with pytest.raises(UnknownNameError, match=r"unknown name in subspaces 'another text'"):
        train(store, [recipe])
    narrow = ActivationStore.from_tensor(rows()[:, :8], ABOUT)
    with pytest.raises(OptionError, match=f"subspace_of=.of width 8 .*of width d_in={D_IN}"):
        train(store, [replace(recipe, name="narrow")], subspaces={TEXT: narrow})


def test_aligned_at_the_start_and_all_through(store: ActivationStore) -> None:
    start, through = train(store, [Recipe("a", aligned="start"), Recipe("b", aligned="training")])
    for run in (start, through):
        sae = started(run, store, torch.device("cpu"), None)[0].sae
        torch.testing.assert_close(sae.encoder_rows, sae.W_dec.data)
    products = [(run.sae().encoder_rows * run.sae().W_dec).sum(1) for run in (start, through)]
    torch.testing.assert_close(products[1], torch.ones(D_SAE), rtol=0, atol=1e-5)
    assert (products[0] - 1).abs().max() > 0.01


def test_other_subspaces_are_of_another_text_and_layer(store: ActivationStore) -> None:
    text, layer = (
        ActivationStore.from_tensor(rows(), {**ABOUT, **one}) for one in ({"corpus": "c"}, {"layer": 9})
    )
    assert subspaces(store, text, layer) == {TEXT: text, LAYER: layer}
    with pytest.raises(OptionError, match=r"other_corpus='of corpus news' .* another corpus"):
        subspaces(store, store, layer)
    with pytest.raises(OptionError, match=r"other_layer_fraction='of layer 3' .* another layer"):
        subspaces(store, text, store)
