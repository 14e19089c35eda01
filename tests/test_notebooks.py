"""Every notebook end to end, under the profile `smoke`: what it leaves; a second run is free."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small_plain
import tiny_models

import asi_lens as al
from asi_lens.experiments.released import NEEDED
from asi_lens.reproduce import __main__ as runner
from asi_lens.reproduce.__main__ import reproduce
from asi_lens.reproduce.parameters import merged_parameters, profile_names
from asi_lens.results import beyond_rows, rows, stability_rows, trained_rank_rows
from asi_lens.results.claims import CLAIMS_FILE, ClaimRow
from asi_lens.results.parameters_cell import notebook_defaults, notebook_names
from asi_lens.results.rows import LossRow, Row, columns, read_rows
from asi_lens.results.sidecar import figures_of, read_sidecars

pytestmark = pytest.mark.notebooks

MODEL = "smollm2-135m"
# Shows dictionaries from elsewhere; where none is named, it says what it needs.
EMPTY = {"22_released_dictionaries"}
ROWS = {
    tuple(columns(kind)): kind
    for module in (rows, beyond_rows, stability_rows, trained_rank_rows)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Row) and kind is not Row
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with everything that the notebooks leave.

    `ASI_LENS_SMOKE` names a figures folder in which they have run already.
    """
    given = os.environ.get("ASI_LENS_SMOKE")
    root = Path(given) if given else tmp_path_factory.mktemp("notebooks") / "figures"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASI_LENS_FIGURES", str(root))
        reproduce(MODEL, "smoke", ["all"])
        yield root / MODEL / "smoke"


@pytest.mark.packaged
def test_tables_are_rows_of_a_known_kind(ran: Path) -> None:
    for name, sidecar in read_sidecars(ran).items():
        assert bool(sidecar["tables"]) == (name not in EMPTY), name
        for stem in sidecar["tables"]:
            kind = ROWS[tuple(pd.read_csv(ran / f"{stem}.csv", nrows=0).columns)]
            assert read_rows(ran / f"{stem}.csv", kind), stem
    ranks = pd.read_csv(ran / "01_rank_curves.csv")
    assert set(ranks.site) == {"attn_out", "mlp_out", "resid_post", "z"}
    assert set(ranks.layer) == set(range(30))
    assert ranks.corpus.nunique() == 2
    assert ranks.effective_rank_fraction.between(0, 1).all()


@pytest.mark.packaged
def test_a_smoke_run_puts_every_claim_to_the_test_and_judges_none(ran: Path) -> None:
    claims = read_rows(ran / CLAIMS_FILE, ClaimRow)
    assert {row.claim for row in claims} == {f"C{n}" for n in range(1, 13)}
    assert {row.verdict for row in claims} == {"not testable here"}


@pytest.mark.packaged
def test_without_dictionaries_nothing_is_judged_and_the_need_is_told(ran: Path) -> None:
    (verdict,) = read_sidecars(ran)["22_released_dictionaries"]["verdicts"]
    assert (verdict["claim"], verdict["verdict"], verdict["numbers"]) == ("C6", "not testable here", [])
    assert NEEDED in verdict["budget"]


@pytest.mark.packaged
def test_dictionaries_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_FIGURES", str(tmp_path / "figures"))
    model = al.load_model(MODEL)
    tokens = al.load_tokens("news-en", model, 2_048, context=64)
    places = [("attn_out", 3), ("attn_out", 15), ("attn_out", 27), ("mlp_out", 15), ("resid_post", 15)]
    for (site, layer), store in al.harvest_stores(model, tokens, places, progress=False).items():
        for method in ("random", "asi") if site == "attn_out" else ("random",):
            sae = al.SparseAutoencoder(al.SAEConfig(store.d, 512, 16, metadata=store.metadata))
            d_init = "auto" if method == "asi" else None
            al.initialize(sae, method, spectrum=store.spectrum, d_init=d_init, sample=store.sample(1_024))
            sae.save(tmp_path / "saes" / f"{site}.{layer}.{method}")
    given = {"dictionaries": [str(tmp_path / "saes")]}
    reproduce(MODEL, "smoke", ["22"], given=given)
    folder = tmp_path / "figures" / MODEL / "smoke"
    table = read_rows(folder / "22_released_dictionaries.csv", beyond_rows.ReleasedRow)
    assert sorted((row.site, row.layer) for row in table) == sorted([*places, *places[:3]])
    assert [row.start for row in table].count("asi") == 3
    assert all(0 < row.fvu < 1 and row.n_tokens == 2_048 // 64 * 63 for row in table)
    (verdict,) = read_sidecars(folder)["22_released_dictionaries"]["verdicts"]
    assert verdict["over"] == "5 (layer, site) points of 512 features, resampled"
    assert "attn_out.27.asi (asi_lens): attn_out 27, 512 features (topk)" in verdict["budget"]
    assert "22_released_dictionaries" in figures_of(folder)


@pytest.mark.packaged
def test_every_figure_is_there_and_says_what_it_is(ran: Path) -> None:
    figures = figures_of(ran)
    assert {stem[:2] for stem in figures} == {name[:2] for name in set(notebook_names()) - EMPTY}
    for stem, entry in figures.items():
        assert (ran / f"{stem}.html").is_file()
        assert (ran / f"{stem}.png").is_file() == entry["png"]
        assert MODEL in entry["caption"], stem
        assert "tokens" in entry["caption"], stem


@pytest.mark.packaged
def test_records_name_weights_texts_seeds_and_the_parameters_that_ran(ran: Path, tmp_path: Path) -> None:
    told = read_sidecars(ran)
    assert sorted(told) == notebook_names()
    for name, entry in told.items():
        merged = merged_parameters(name, model=MODEL, profile="smoke", output_folder=tmp_path)
        assert entry["parameters"] == {k: v for k, v in merged.items() if k != "output_folder"}
        assert entry["seeds"] == list(range(merged["seed"], merged["seed"] + merged.get("n_seeds", 1)))
        assert len(entry["sources"]) >= 2, name


@pytest.mark.packaged
def test_a_second_run_does_nothing(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in ran.iterdir() if path.suffix in (".csv", ".html")}
    reproduce(MODEL, "smoke", ["all"])
    assert capsys.readouterr().out.count(": up to date") == len(notebook_names())
    del before[ran / "claims.csv"]  # joined in every run
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_folder_of_weights_and_a_file_of_text_do_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 2: what its attention writes is normalized before it is added; 03 looks before that norm."""
    characters = tiny_models.CHARACTERS
    path = tmp_path / "plain.txt"
    path.write_text("".join(characters[i * i * 7 % len(characters)] for i in range(3_000)), encoding="utf-8")
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ASI_LENS_FIGURES", str(tmp_path / "figures"))
    model = tiny_models.build("gemma2", tmp_path / "tiny-gemma2")
    given: dict[str, Any] = {"context": 16, "n_tokens": 1_024, "dtype": "float32", "main_corpus": str(path)}
    reproduce(str(model), "smoke", ["03"], given=given)
    [folder] = (tmp_path / "figures").glob("tiny-gemma2-*/smoke")
    told = (folder / ".executed" / "03_wo_ablation.ipynb").read_text(encoding="utf-8")
    found = re.search(r"largest difference ([0-9.]+) of d_model", told)
    assert found
    assert float(found[1]) < 0.005
    ranks = {"n_tokens_loss": 128, "ranks": [0.25, 1.0], "layer_fractions": [0.0, 1.0]}
    reproduce(str(model), "smoke", ["02"], given=given | ranks)
    whole = [row for row in read_rows(folder / "02_downstream_loss.csv", LossRow) if row.rank_fraction == 1.0]
    assert {row.layer for row in whole} == {0, 2}
    for row in whole:
        assert row.cross_entropy == pytest.approx(row.cross_entropy_clean, rel=1e-3)


@pytest.mark.parametrize("kind", ["vit", "bert-model"])
def test_architectures_that_no_notebook_names(
    kind: str, tmp_path: Path, plain_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """19 on a local folder of a vision transformer and of an encoder, with data of one's own."""
    from PIL import Image

    monkeypatch.setenv("ASI_LENS_FIGURES", str(tmp_path / "figures"))
    draw = np.random.default_rng(0)
    (tmp_path / "own").mkdir()
    for i in range(90):
        pixels = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "own" / f"{i:02}.png")
    letters = draw.choice(list(small_plain.LETTERS), (90, 20))
    (tmp_path / "own.txt").write_text("\n".join("".join(row) for row in letters))
    given: dict[str, Any] = {
        "beside_models": [],
        "decoder": "",
        "n_rows": 600,
        "n_tokens": 600,
        "n_tokens_held_out": 200,
    }
    given |= {"pictures": str(tmp_path / "own"), "sequences": str(tmp_path / "own.txt"), "d_sae": 64, "k": 4}
    model = plain_folder(kind)
    reproduce(str(model), "smoke", ["19"], given=given)
    [folder] = (tmp_path / "figures").glob(f"tiny-{kind}-*/smoke")
    ranks = pd.read_csv(folder / "19_architectures.csv")
    assert set(ranks.site) == {"attn_out", "mlp_out", "resid_post", "z"}
    assert set(ranks.corpus) == {f"own{'' if kind == 'vit' else '.txt'}, part {i}" for i in (1, 2)}
    # Items are whole: 75 pictures of 16 patches hold two parts of 37, 60 sequences of 20 residues two of 30.
    assert set(ranks.n_tokens) == {37 * 16 if kind == "vit" else 30 * 20}
    answers = pd.read_csv(folder / "19_answers.csv").set_index("question").answer
    assert len(answers) == 4


def test_the_headline_of_the_gpu_profile_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """06 as on a GPU: all methods of a size on one stream of batches, each with its own optimizer."""
    characters = tiny_models.CHARACTERS
    path = tmp_path / "plain.txt"
    path.write_text("".join(characters[(i * i * 7 + i) % len(characters)] for i in range(3_000)), "utf-8")
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ASI_LENS_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setattr(runner, "require_machine", lambda profile: None)
    model = tiny_models.build("llama", tmp_path / "tiny-llama")
    given: dict[str, Any] = {"context": 16, "n_tokens": 1_024, "n_tokens_held_out": 256, "n_tokens_loss": 64}
    given |= {"dtype": "float32", "main_corpus": str(path), "d_sae": [64, 128], "k": 4, "log_every": 4}
    given |= {"n_tokens_train": 2_048, "batch_size": 128, "dead_window": 1_024}
    reproduce(str(model), "gpu", ["06"], given=given)
    [table] = (tmp_path / "figures").glob("tiny-llama-*/gpu/06_dictionary_size.csv")
    found = pd.read_csv(table)
    assert set(found.d_sae) == {64, 128}
    optimizers = found.groupby("method").optimizer.unique().map(list).to_dict()
    assert optimizers == {"random": ["adam"], "ASI": ["adam"], "ASI + sparse Adam": ["sparse_adam"]}


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("model", [MODEL, "gemma3-270m", "llama-3.1-8b"])
def test_every_profile_fits_every_notebook(profile: str, model: str, tmp_path: Path) -> None:
    for name in notebook_names():
        merged = merged_parameters(name, model=model, profile=profile, output_folder=tmp_path)
        assert merged["profile"] == profile
        assert merged["model"].lower().endswith(model)


def test_the_quick_profile_is_the_notebooks_own_defaults(tmp_path: Path) -> None:
    for name in notebook_names():
        merged = merged_parameters(name, model=MODEL, profile="quick", output_folder=tmp_path)
        assert {**merged, "output_folder": ""} == notebook_defaults(name)
