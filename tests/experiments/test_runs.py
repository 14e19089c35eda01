"""Recipes side by side: trained once, on the same batches, to the rows of the tables."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import split_of
from small_trainings import D_IN, quick
from small_trainings import rows as draw

from asi_lens.activations.pairs import PairedStores
from asi_lens.activations.shaped import ShapedStore, power_gains
from asi_lens.activations.store import ActivationStore
from asi_lens.base.errors import CacheError, OptionError, UnknownNameError
from asi_lens.experiments import rows, runs
from asi_lens.experiments.recipes import Recipe
from asi_lens.experiments.rows import budget, dead_feature_rows, drift_rows, relative_times, seen_fvu
from asi_lens.experiments.runs import TrainedRun, train_recipes
from asi_lens.sae.dictionary import SAEConfig, SparseAutoencoder
from asi_lens.sae.drift import Drift
from asi_lens.sae.evaluate import evaluate, evaluate_together, evaluate_transcoder
from asi_lens.sae.initialize import auto_d_init, initialize
from asi_lens.sae.sparsity import SparsityConfig
from asi_lens.sae.subspace import SubspaceStore, expand
from asi_lens.sae.train import Trainer
from asi_lens.sae.transcoder import Transcoder
from asi_lens.sae.transcoder_init import initialize_transcoder
from asi_lens.training import sharded_checkpoint
from asi_lens.training.loop import train_together

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")

ABOUT = {"model": "m", "corpus": "news", "site": "attn_out", "layer": 15}
OPTIONS: dict[str, Any] = {
    "d_sae": 64,
    "k": 4,
    "train": quick(n_tokens=640),
    "log_every": 2,
    "progress": False,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store() -> ActivationStore:
    return ActivationStore.from_tensor(draw(1200)[:1000], metadata=ABOUT)


@pytest.fixture
def held_out() -> ActivationStore:
    return ActivationStore.from_tensor(draw(1200)[1000:], metadata=ABOUT)


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("trained or evaluated again")


def test_a_run_is_the_training_that_its_recipe_says(store: ActivationStore) -> None:
    (run,) = train_recipes(store, ["ASI + sparse Adam"], seeds=[3], **OPTIONS)
    sae = SparseAutoencoder(SAEConfig(D_IN, 64, 4, seed=3))
    d_init = auto_d_init(store.spectrum)
    initialize(sae, "asi", store.spectrum, d_init, store.sample(1000))
    Trainer(sae, replace(OPTIONS["train"], optimizer="sparse_adam", seed=3)).fit(store, progress=False)
    assert (run.d_init, run.seed) == (d_init, 3)
    found = run.sae()
    torch.testing.assert_close(found(draw(50)), sae(draw(50)))
    assert [row["tokens"] for row in run.history()] == [64, 128, 256, 384, 512, 640]


def test_finished_runs_are_read_not_trained(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded_checkpoint, "write", refuse)  # of what is saved at once
    first = train_recipes(store, ["random", "ASI"], seeds=[0, 1], **OPTIONS)
    assert [(run.seed, run.recipe.name) for run in first] == [
        (s, n) for s in (0, 1) for n in ("random", "ASI")
    ]
    monkeypatch.setattr(runs, "train_together", refuse)
    again = train_recipes(store, ["ASI", "random"], seeds=[1], **OPTIONS)
    assert [run.folder for run in again] == [first[3].folder, first[2].folder]
    assert not list(first[0].folder.glob("checkpoint*")), "moments stay behind"


def test_a_run_that_an_earlier_version_finished_is_read(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = train_recipes(store, ["random"], **OPTIONS)
    told = (run.folder / "finished.json").read_text()
    (run.folder / "finished.json").rename(run.folder / "run.json")
    monkeypatch.setattr(runs, "train_together", refuse)
    assert train_recipes(store, ["random"], **OPTIONS) == [run]
    assert (run.folder / "finished.json").read_text() == told
    assert not (run.folder / "run.json").exists()


def test_recipes_of_the_same_options_are_one_run(store: ActivationStore) -> None:
    named = Recipe("by hand", "asi", auto_d_init(store.spectrum))
    runs = train_recipes(store, ["ASI", named], **OPTIONS)
    assert runs[0].folder == runs[1].folder
    assert [run.recipe.name for run in runs] == ["ASI", "by hand"]


@pytest.mark.parametrize(
    "change",
    [
        {"d_sae": 96},
        {"k": 5},
        {"train": quick(n_tokens=640, lr=1e-3)},
        {"train": quick(n_tokens=640, dead_window=128)},
        {"log_every": 5},
        {"windows": [128]},
    ],
)
def test_every_option_is_in_the_key(store: ActivationStore, change: dict[str, Any]) -> None:
    (one,) = train_recipes(store, ["random"], **OPTIONS)
    (other,) = train_recipes(store, ["random"], **{**OPTIONS, **change})
    assert one.folder != other.folder


def test_other_rows_are_another_run(store: ActivationStore, held_out: ActivationStore) -> None:
    (one,) = train_recipes(store, ["random"], **OPTIONS)
    (other,) = train_recipes(held_out, ["random"], **OPTIONS)
    assert one.folder != other.folder


def test_a_run_that_was_stopped_goes_on(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = train_recipes(store, ["ASI"], **OPTIONS)
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "second"))

    def stop(trainers: Any, *args: Any, **kwargs: Any) -> None:
        seen: list[int] = []

        def count(trainer: Trainer, output: Any) -> None:
            seen.append(output.step)
            if output.step >= 4:
                raise KeyboardInterrupt

        train_together(trainers, *args, **{**kwargs, "on_log": count})

    with monkeypatch.context() as patch:
        patch.setattr(runs, "train_together", stop)
        with pytest.raises(KeyboardInterrupt):
            train_recipes(store, ["ASI"], checkpoint_every=64, **OPTIONS)
    (resumed,) = train_recipes(store, ["ASI"], **OPTIONS)
    assert resumed.folder != whole.folder
    assert torch.equal(resumed.sae().W_dec, whole.sae().W_dec)
    same = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in resumed.history()]
    assert same == [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in whole.history()]


def test_a_search_is_part_of_the_run_and_of_what_is_said_of_it(tiny_llama: Any, tmp_path: Path) -> None:
    x = torch.randn(1000, 96, generator=torch.Generator().manual_seed(0)) * 0.85 ** torch.arange(96)
    store = ActivationStore.from_tensor(x, metadata=ABOUT)
    recipe = Recipe("ASI", "asi", 20)
    # Fewer features are cheaper to score than to search, and so they are where bfloat16 is fast.
    options = {**OPTIONS, "d_sae": 4096, "train": replace(OPTIONS["train"], compute_dtype="float32")}
    exact, found = train_recipes(store, [recipe, replace(recipe, search="subspace")], **options)
    assert exact.folder != found.folder
    sae = SparseAutoencoder(SAEConfig(96, 4096, 4))
    initialize(sae, "asi", store.spectrum, 20, store.sample(1000))
    history = Trainer(sae, options["train"], search="subspace").fit(store, progress=False, log_every=2)
    assert torch.equal(found.sae().W_dec, sae.W_dec)
    assert [row["search_mass"] for row in found.history()] == [row["search_mass"] for row in history]
    assert history[-1]["search_r"] < 96, "it has given up, so nothing was searched"
    data = split_of(tiny_llama, tmp_path)
    told = [budget(tiny_llama, [run], data) for run in (exact, found)]
    least = min(row["search_mass"] for row in history)
    assert f"top k searched in the active subspace (at least {least:.2%} of their mass found)" in told[1]
    assert "searched" not in told[0]


def test_inside_the_subspace_a_run_is_a_training_on_coordinates(
    store: ActivationStore, held_out: ActivationStore
) -> None:
    whole, inside = train_recipes(
        store, [Recipe("ASI", "asi", 6), Recipe("inside", "asi", 6, inside=True)], **OPTIONS
    )
    assert whole.folder != inside.folder
    coordinates = SubspaceStore(store, 6)
    sae = SparseAutoencoder(SAEConfig(6, 64, 4))
    initialize(sae, "random", coordinates.spectrum, None, coordinates.sample(1000))
    history = Trainer(sae, OPTIONS["train"]).fit(coordinates, progress=False, log_every=2)
    x = draw(50)
    torch.testing.assert_close(
        inside.sae()(x), expand(sae, coordinates.basis, coordinates.center)(x), rtol=1e-4, atol=1e-4
    )
    floor = coordinates.discarded
    assert 0 < floor < 1
    for mine, theirs in zip(inside.history(), history, strict=True):
        assert mine["fvu"] == pytest.approx(floor + (1 - floor) * theirs["fvu"])
    ends = [row for row in dead_feature_rows([whole, inside], held_out) if row.split == "held_out"]
    assert [(row.method, row.d_init) for row in ends] == [("ASI", 6), ("inside", 6)]
    assert ends[1].fvu > 0.5 * floor


def test_a_whitened_run_is_a_dictionary_of_raw_activations(
    store: ActivationStore, held_out: ActivationStore
) -> None:
    plain, white = train_recipes(store, ["random", Recipe("whitened", whiten=0.0)], **OPTIONS)
    assert plain.folder != white.folder
    shaped = ShapedStore(store, power_gains(store.spectrum, 0.0))
    sae = SparseAutoencoder(SAEConfig(D_IN, 64, 4))
    initialize(sae, "random", shaped.spectrum, None, shaped.sample(1000))
    Trainer(sae, OPTIONS["train"]).fit(shaped, progress=False, log_every=2)
    x = draw(50)
    raw = expand(sae, shaped.matrix, shaped.center, shaped.inverse)
    torch.testing.assert_close(white.sae()(x), raw(x), rtol=1e-3, atol=1e-3)
    assert all(row["fvu"] is None for row in white.history()), "a step's FVU is of white rows"
    ends = [row for row in dead_feature_rows([plain, white], held_out) if row.split == "held_out"]
    assert ends[1].fvu == pytest.approx(evaluate(raw, held_out, progress=False).fvu, rel=1e-3)
    with pytest.raises(OptionError, match="whiten="):
        Recipe("both", "asi", 4, whiten=0.5, inside=True)


def test_transcoders_are_compared_on_paired_stores(store: ActivationStore, held_out: ActivationStore) -> None:
    pairs, held = PairedStores(store, store), PairedStores(held_out, held_out)
    compared = [Recipe("a", "asi", "auto", reader="regression"), Recipe("b", reader="random")]
    runs = train_recipes(pairs, compared, **OPTIONS)
    d_init = auto_d_init(store.spectrum)
    assert [run.d_init for run in runs] == [d_init, None]
    sae = Transcoder(SAEConfig(D_IN, 64, 4, d_out=D_IN))
    initialize_transcoder(sae, pairs, "asi", "regression", d_init)
    Trainer(sae, OPTIONS["train"]).fit(pairs, progress=False)
    torch.testing.assert_close(runs[0].sae()(draw(50)), sae(draw(50)))
    ends = {row.method: row for row in dead_feature_rows(runs, held) if row.split == "held_out"}
    assert ends["a"].fvu == pytest.approx(evaluate_transcoder(sae, held).fvu)
    assert (ends["b"].d_init, ends["b"].site, ends["b"].dead_window_tokens) == (None, "attn_out", 200)
    with pytest.raises(OptionError, match="reader=None"):
        train_recipes(pairs, ["random"], **OPTIONS)
    with pytest.raises(OptionError, match="reader='random'"):
        train_recipes(store, compared[1:], **OPTIONS)


def test_without_centering_the_mean_stays_in(store: ActivationStore) -> None:
    (run,) = train_recipes(store, ["random, not centered"], **OPTIONS)
    assert not run.sae().input_mean.any()
    (centered,) = train_recipes(store, ["random"], **OPTIONS)
    assert centered.sae().input_mean.any()


def test_a_finished_run_without_its_dictionary_is_an_error(store: ActivationStore) -> None:
    (run,) = train_recipes(store, ["random"], **OPTIONS)
    (run.folder / "metrics.csv").unlink()
    with pytest.raises(CacheError, match=r"metrics\.csv is missing; delete"):
        train_recipes(store, ["random"], **OPTIONS)


def test_rows_hold_curves_and_held_out_numbers(store: ActivationStore, held_out: ActivationStore) -> None:
    runs = train_recipes(store, ["random", "random + AuxK"], seeds=[0, 1], windows=[128], **OPTIONS)
    found = dead_feature_rows(runs, held_out)
    assert {(row.model, row.corpus, row.site, row.layer) for row in found} == {("m", "news", "attn_out", 15)}
    curve = [row for row in found if row.split == "train" and row.method == "random" and row.seed == 0]
    # Windows of 128 and 256 tokens: no row before they were full.
    assert [(row.tokens, row.dead_window_tokens) for row in curve] == [
        (128, 128),
        *((tokens, window) for tokens in (256, 384, 512, 640) for window in (128, 256)),
    ]
    history = {row["tokens"]: row for row in runs[0].history()}
    for row in curve:
        assert row.dead_fraction == history[row.tokens][f"dead_fraction_{row.dead_window_tokens}"]
        assert row.cross_entropy_delta is None
    ends = [row for row in found if row.split == "held_out"]
    assert [(row.method, row.seed, row.aux_k) for row in ends] == [
        (name, seed, aux) for seed in (0, 1) for name, aux in (("random", 0), ("random + AuxK", D_IN // 2))
    ]
    sae, x = runs[0].sae(), held_out.rows(torch.arange(held_out.n))
    fired = sae.encode_dense(x).gt(0).any(0)
    assert ends[0].dead_fraction == pytest.approx(1 - fired.double().mean().item())
    error = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert ends[0].fvu == pytest.approx(error.item(), rel=1e-4)
    assert (ends[0].tokens, ends[0].dead_window_tokens) == (640, 200)


def test_drift_stands_beside_dead_features(store: ActivationStore, held_out: ActivationStore) -> None:
    sparsity = SparsityConfig(initial_l0=8, bandwidth=0.5)
    jump = Recipe("jump", "asi", 5, activation="jumprelu", sparsity=sparsity)
    runs = train_recipes(store, ["random", jump], **OPTIONS)
    found = drift_rows(runs, held_out)
    plain = dead_feature_rows(runs, held_out)
    names = [field.name for field in fields(plain[0])]
    assert [[getattr(row, name) for name in names] for row in found] == [
        [getattr(row, name) for name in names] for row in plain
    ]
    last = {row.method: row for row in found if row.split == "held_out"}
    automatic = auto_d_init(store.spectrum)
    assert (last["jump"].d_active, last["random"].d_active) == (5, automatic)
    assert (last["jump"].activation, last["jump"].initial_l0) == ("jumprelu", 8)
    for run in runs:
        shares = Drift(store.spectrum, run.d_active)(run.sae())
        assert last[run.recipe.name].decoder_inside == pytest.approx(shares["decoder_inside"], abs=1e-6)
        assert last[run.recipe.name].encoder_inside_p10 == pytest.approx(
            shares["encoder_inside_p10"], abs=1e-6
        )


def test_without_curves_the_last_moment_is_left(store: ActivationStore, held_out: ActivationStore) -> None:
    found = dead_feature_rows(train_recipes(store, ["random"], **OPTIONS), held_out, curves=False)
    assert [(row.split, row.tokens) for row in found] == [("train", 640), ("held_out", 640)]


def test_time_of_a_step_is_over_that_of_the_first_method(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = train_recipes(store, ["random", "ASI"], seeds=[0, 1], **OPTIONS)
    speeds = {("random", 0): [1.0, 8.0], ("random", 1): [2.0], ("ASI", 0): [4.0], ("ASI", 1): [4.0]}
    monkeypatch.setattr(
        TrainedRun, "history", lambda run: [{"tokens_per_s": s} for s in speeds[run.recipe.name, run.seed]]
    )
    times = relative_times(runs)
    assert list(times.index) == ["random", "ASI"], "in the order given, not of the alphabet"
    assert times["time per step"].tolist() == [1.0, 0.5]


def test_fvu_on_text_that_was_trained_on(store: ActivationStore) -> None:
    runs = train_recipes(store, ["random", "ASI"], seeds=[0, 1], **OPTIONS)
    whole = seen_fvu(runs, store, 10 * store.n, progress=False)
    expected = [evaluate(run.sae(), store.sample(store.n)).fvu for run in runs]
    assert list(whole.index) == ["random", "ASI"]
    assert whole.tolist() == pytest.approx([(expected[0] + expected[2]) / 2, (expected[1] + expected[3]) / 2])
    assert seen_fvu(runs, store, 64, progress=False).tolist() != pytest.approx(whole.tolist())


def test_evaluations_are_kept(
    store: ActivationStore, held_out: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = train_recipes(store, ["random", "ASI"], **OPTIONS)
    first = dead_feature_rows(runs[:1], held_out)
    judged = []

    def watch(saes: list[SparseAutoencoder], *given: Any, **options: Any) -> Any:
        judged.append(len(saes))
        return evaluate_together(saes, *given, **options)

    monkeypatch.setattr(rows, "evaluate_together", watch)
    both = dead_feature_rows(runs, held_out)
    assert both[: len(first)] == first
    assert judged == [1], "the other one has been judged before"
    monkeypatch.setattr(rows, "evaluate_together", refuse)
    assert dead_feature_rows(runs, held_out) == both
    with pytest.raises(AssertionError, match="again"):
        dead_feature_rows(runs, store)


@pytest.mark.parametrize("variable", ["ASI_LENS_CACHE", "ASI_LENS_BUNDLE"])
def test_a_read_only_cache_serves_runs_and_evaluations(
    store: ActivationStore,
    held_out: ActivationStore,
    tmp_path: Path,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    refuse_writes: Any,
) -> None:
    runs = train_recipes(store, ["random", "ASI"], **OPTIONS)
    found = dead_feature_rows(runs, held_out)
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv(variable, str(tmp_path / "cache"))
    refuse_writes()
    assert train_recipes(store, ["random", "ASI"], **OPTIONS) == runs
    assert dead_feature_rows(runs, held_out) == found
    with pytest.raises(OSError, match=r"cannot write .*: Read-only file system"):
        train_recipes(store, ["random"], seeds=[1], **OPTIONS)


def test_from_a_model_to_rows_with_losses(tiny_llama: Any, tmp_path: Path) -> None:
    data = split_of(tiny_llama, tmp_path)
    where = ("attn_out", 1)
    runs = train_recipes(data.train[where], ["random", "ASI"], **OPTIONS)
    found = dead_feature_rows(
        runs, data.held_out[where], model=tiny_llama, tokens=data.loss_tokens, progress=False
    )
    deltas = [row.cross_entropy_delta for row in found if row.split == "held_out"]
    assert len(deltas) == 2
    assert all(delta is not None and abs(delta) < 5 for delta in deltas)
    told = budget(tiny_llama, runs, data)
    for part in ("tiny-llama", "attn_out of layer 1 (width 24)", "64 features, k 4", "640 training tokens"):
        assert part in told
    assert "dead window 256 tokens" in told
    assert "losses (float32) on 32 of them, seed 0" in told
    assert "losses" not in budget(tiny_llama, runs, data, losses=False)


def test_a_budget_tells_of_its_own_places(tiny_llama: Any, tmp_path: Path) -> None:
    """Massive activations of a place that the runs were not trained on are not theirs."""
    data = split_of(tiny_llama, tmp_path, (("attn_out", 1), ("resid_post", 1)))
    for store, left_out in zip(data.train.values(), (3, 1_007), strict=True):
        store.metadata = {**store.metadata, "left_out": left_out}
    runs = [run for store in data.train.values() for run in train_recipes(store, ["random"], **OPTIONS)]
    both, own = (budget(tiny_llama, part, data) for part in (runs, runs[:1]))
    assert "training rows: 3 at attn_out 1, 1,007 at resid_post 1" in both
    assert "training rows: 3 at attn_out 1" in own
    assert "resid_post" not in own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipes": ["ASii"]}, "ASI"),
        ({"recipes": []}, "recipes"),
        ({"seeds": []}, "seeds"),
        ({"d_sae": 0}, "d_sae"),
        ({"recipes": [Recipe("far", "asi", 17)]}, "d_init"),
    ],
)
def test_bad_options_are_named(store: ActivationStore, arguments: dict[str, Any], message: str) -> None:
    given = {"recipes": ["random"], **OPTIONS, **arguments}
    with pytest.raises((OptionError, UnknownNameError), match=message):
        train_recipes(store, given.pop("recipes"), **given)
