"""Every notebook end to end, on a tiny model and tiny texts: what it leaves; a second run is free."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny_models

from asi_lens.reproduce.__main__ import reproduce
from asi_lens.reproduce.parameters import merged_parameters, notebook_names
from asi_lens.results import provenance
from asi_lens.results.claims import read_claims
from asi_lens.results.rows import (
    DeadFeatureRow,
    DictionaryRow,
    DriftRow,
    HeadOverlapRow,
    LossRow,
    OutputProjectionRow,
    RankedDeadFeatureRow,
    RankRow,
    read_rows,
)

pytestmark = pytest.mark.notebooks

TABLES = {
    "00_explore": RankRow,
    "01_rank_curves": RankRow,
    "01_rank_vs_tokens": RankRow,
    "02_downstream_loss": LossRow,
    "03_wo_ablation": OutputProjectionRow,
    "03_head_overlap": HeadOverlapRow,
    "04_dead_feature_curves": DeadFeatureRow,
    "05_d_init": DeadFeatureRow,
    "06_dictionary_size": DeadFeatureRow,
    "07_layers_and_sites": RankedDeadFeatureRow,
    "08_jumprelu_schedule": DriftRow,
    "09_lorsa": DeadFeatureRow,
    "10_dictionaries": DictionaryRow,
    "11_inside_the_subspace": DeadFeatureRow,
    "12_transcoders": DeadFeatureRow,
    "13_learning_rate": DeadFeatureRow,
}
CLAIMS = [
    ("C1", "01"),
    ("C2", "01"),
    ("C3", "02"),
    ("C4", "03"),
    ("C5", "03"),
    ("C6", "07"),
    ("C7", "04"),
    ("C7", "06"),
    ("C8", "05"),
    ("C9", "04"),
    ("C10", "09"),
    ("C11", "07"),
    ("C12", "08"),
]
SHARED = {"context": 16, "n_tokens": 1_024, "dtype": "float32"}
TRAINING = {
    "n_tokens_held_out": 128,
    "n_tokens_loss": 32,
    "k": 4,
    "batch_size": 64,
    "n_tokens_train": 1_280,
    "dead_window": 256,
    "log_every": 2,
}
NO_LOSSES = {key: value for key, value in TRAINING.items() if key != "n_tokens_loss"}
OWN: dict[str, dict[str, Any]] = {
    "00_explore": {},
    "01_rank_curves": {"n_tokens_other": 512, "beside_models": []},
    "02_downstream_loss": {
        "n_tokens_loss": 128,
        "ranks": [0.25, 1.0],
        "random_ranks": [0.5],
        "layer_fractions": [0.0, 1.0],
    },
    "03_wo_ablation": {"random_draws": 2},
    "04_dead_feature_curves": {**TRAINING, "d_sae": 48, "n_seeds": 2},
    "11_inside_the_subspace": {**TRAINING, "d_sae": 48, "n_seeds": 2},
    "05_d_init": {**TRAINING, "d_sae": 48, "sites": ["attn_out", "mlp_out"], "d_init_fractions": [0.25, 0.5]},
    "06_dictionary_size": {**TRAINING, "d_sae": [32, 64]},
    "07_layers_and_sites": {**NO_LOSSES, "d_sae": 48, "layer_fractions": [0.0, 0.9]},
    "08_jumprelu_schedule": {**TRAINING, "d_sae": 48, "n_seeds": 2, "high_l0": 12},
    "09_lorsa": {**TRAINING, "units_per_head": 12, "n_seeds": 2, "n_units_shown": 2},
    "10_dictionaries": {**TRAINING, "d_sae": 48, "n_seeds": 2},
    "12_transcoders": {**TRAINING, "d_sae": 48},
    "13_learning_rate": {**NO_LOSSES, "d_sae": 48, "lr": {"random": [4e-3], "ASI": [1e-3, 4e-3]}},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with everything that the notebooks leave, and how to run them once more."""
    folder = tmp_path_factory.mktemp("notebooks")
    texts = []
    for name, step in (("plain", 7), ("other", 11)):
        characters = tiny_models.CHARACTERS
        text = "".join(characters[(i * i * step + i) % len(characters)] for i in range(3_000))
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        texts.append(str(path))
    model = tiny_models.build("gemma2", folder / "tiny-gemma2")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASI_LENS_CACHE", str(folder / "cache"))
        patch.setenv("ASI_LENS_FIGURES", str(folder / "figures"))

        def run() -> float:
            began = time.monotonic()
            for name in notebook_names():
                given = {**SHARED, **OWN[name], "main_corpus": texts[0]}
                if name == "01_rank_curves":
                    given["other_corpora"] = texts[1:]
                reproduce(str(model), "smoke", [name], given=given)
            return time.monotonic() - began

        run()
        yield folder / "figures" / "tiny-gemma2" / "smoke", run


def test_tables_have_their_columns(ran: Any) -> None:
    folder, _ = ran
    for stem, row_type in TABLES.items():
        assert read_rows(folder / f"{stem}.csv", row_type), stem
    ranks = pd.read_csv(folder / "01_rank_curves.csv")
    assert set(ranks.site) == {"attn_out", "mlp_out", "resid_post", "z"}
    assert set(ranks.layer) == {0, 1, 2}
    assert ranks.corpus.nunique() == 2
    assert ranks.effective_rank_fraction.between(0, 1).all()


def test_truncating_nothing_recovers_everything(ran: Any) -> None:
    folder, _ = ran
    rows = read_rows(folder / "02_downstream_loss.csv", LossRow)
    whole = [row for row in rows if row.rank_fraction == 1.0]
    assert whole
    for row in whole:
        assert row.cross_entropy == pytest.approx(row.cross_entropy_clean, rel=1e-3)


def test_the_closed_form_is_before_gemmas_norm(ran: Any) -> None:
    folder, _ = ran
    told = (folder / ".executed" / "03_wo_ablation.ipynb").read_text(encoding="utf-8")
    assert "largest difference 0.00" in told


def test_a_smoke_run_claims_nothing(ran: Any) -> None:
    folder, _ = ran
    claims = read_claims(folder)
    assert [(row.claim, row.notebook[:2]) for row in claims] == CLAIMS
    assert {row.verdict for row in claims} == {"not testable here"}


def test_every_figure_is_there_and_says_what_it_is(ran: Any) -> None:
    folder, _ = ran
    figures = provenance.read_run(folder)["figures"]
    assert {stem[:2] for stem in figures} == {name[:2] for name in notebook_names()}
    for stem, entry in figures.items():
        assert (folder / f"{stem}.html").is_file()
        assert (folder / f"{stem}.png").is_file() == entry["png"]
        assert "tiny-gemma2" in entry["caption"], stem
        assert "tokens" in entry["caption"], stem


def test_provenance_names_weights_texts_and_seeds(ran: Any) -> None:
    folder, _ = ran
    told = provenance.read_run(folder)["notebooks"]
    assert sorted(told) == notebook_names()
    for name, entry in told.items():
        assert entry["seeds"] == ([0, 1] if "n_seeds" in OWN[name] else [0])
        assert len(entry["sources"]) >= 2, name
        assert entry["parameters"]["context"] == 16


def test_a_second_run_does_nothing(ran: Any) -> None:
    folder, run = ran
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix in (".csv", ".html")}
    run()
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("profile", ["smoke", "quick", "full", "paper"])
@pytest.mark.parametrize("model", ["smollm2-135m", "gemma3-270m", "llama-3.1-8b"])
def test_every_profile_fits_every_notebook(profile: str, model: str, tmp_path: Path) -> None:
    for name in notebook_names():
        merged = merged_parameters(name, model=model, profile=profile, output_folder=tmp_path)
        assert merged["profile"] == profile
        assert merged["model"].lower().endswith(model)


def test_the_notebooks_own_defaults_are_the_quick_profile(tmp_path: Path) -> None:
    from asi_lens.reproduce.parameters import notebook_defaults

    for name in notebook_names():
        defaults = notebook_defaults(name)
        merged = merged_parameters(name, model="smollm2-135m", profile="quick", output_folder=tmp_path)
        assert {**merged, "output_folder": ""} == defaults
