"""Every cached number against everything that it depends on: a change is measured anew, nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from asi_lens.activations.harvest_store import harvest_store
from asi_lens.activations.spectrum import Spectrum
from asi_lens.collapse.interventions import truncation_sweep
from asi_lens.collapse.output_projection import counterfactual_records
from asi_lens.collapse.spectra import collect_spectra, rank_growth
from asi_lens.inputs import fingerprint, models, twin, verify
from asi_lens.inputs.corpora import Tokens, load_tokens

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")

TEXT = ["Some words of a text, and more of them; they stand in a row. " * 20]
Z = Spectrum(torch.linspace(2, 1, 24).double(), torch.zeros(24).double(), 500, lambda: torch.eye(24).double())


class Given:
    """What a number is made of: a folder of a model, how it is loaded, how a text is cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dtype = "float32"
        self.edit: Callable[[Any], None] = lambda model: None
        self.text: dict[str, Any] = {"n_tokens": 96, "context": 16}
        self.options: dict[str, Any] = {}

    def model_and_tokens(self) -> tuple[Any, Tokens]:
        model = models.load_model(self.folder, dtype=self.dtype, device="cpu")
        with torch.no_grad():
            self.edit(model)
        return model, load_tokens(TEXT, model, **self.text)


def spectra(given: Given) -> None:
    model, tokens = given.model_and_tokens()
    collect_spectra(model, tokens, ["attn_out"], [0], progress=False, **given.options)


def growth(given: Given) -> None:
    model, tokens = given.model_and_tokens()
    rank_growth(model, tokens, ["attn_out"], [0], progress=False, **{"steps": 2, **given.options})


def store(given: Given) -> None:
    model, tokens = given.model_and_tokens()
    harvest_store(model, tokens, "attn_out", 0, progress=False, **given.options)


def losses(given: Given) -> None:
    model, tokens = given.model_and_tokens()
    sizes: dict[str, Any] = {"ranks": [0.5], "random_seeds": (), "progress": False, **given.options}
    truncation_sweep(model, tokens, {("attn_out", 0): Z}, **sizes)


def projection(given: Given) -> None:
    model, tokens = given.model_and_tokens()
    found = collect_spectra(model, tokens, ["z"], [0], progress=False)
    counterfactual_records(model, found, **{"draws": 1, **given.options})


def verification(given: Given) -> None:
    verify.verification(given.model_and_tokens()[0])


NUMBERS = {
    spectra: ({"drop_first": False}, {"batch_tokens": 48}),
    growth: ({"drop_first": False}, {"batch_tokens": 48}, {"steps": 3}),
    store: ({"drop_first": False}, {"drop_massive": False}, {"dtype": "float32"}),
    losses: ({"ranks": [0.25]}, {"batch_tokens": 48}, {"random_seeds": (0,)}),
    projection: ({"draws": 2}, {"seed": 5}),
    verification: (),
}


KIND = {
    spectra: "moments",
    growth: "moments",
    store: "stores",
    losses: "losses",
    projection: "output_projection",
    verification: "verifications",
}
"""Number -> the folder of the cache that holds it."""


def a_byte_of_a_weight(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(model: Any) -> None:
        model.original_model.model.layers[2].mlp.up_proj.weight.view(torch.uint8).view(-1)[-1] ^= 1

    given.edit = edit


def a_buffer(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    given.edit = lambda model: next(model.original_model.buffers()).mul_(1.001)


def the_configuration(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    path = given.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))


def an_attribute(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(model: Any) -> None:
        twin.original(model.blocks[0].attn).scaling *= 2

    given.edit = edit


def the_dtype(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    given.dtype = "bfloat16"


def a_version(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = {**fingerprint.versions(), "transformers": "99.0"}
    monkeypatch.setattr(fingerprint, "versions", lambda: newer)


def the_checks(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that an older version let through is checked again."""
    monkeypatch.setattr(verify, "_source", lambda: "another")


MODEL_CHANGES = [a_byte_of_a_weight, a_buffer, the_configuration, an_attribute, the_dtype, a_version]


def a_tokenizer_rule(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    path = given.folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(rules))


def fewer_tokens(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    given.text["n_tokens"] = 80


def another_context(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    given.text["context"] = 12


def no_bos(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    given.text["prepend_bos"] = False


TEXT_CHANGES = [a_tokenizer_rule, fewer_tokens, another_context, no_bos]


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Given:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    return Given(tiny_models.build("llama", tmp_path / "model"))


def measured(number: Callable[[Given], None], given: Given, cache: Path) -> set[Path]:
    """The files that a call adds to the cache, those of texts left out."""
    before = set(cache.rglob("*"))
    number(given)
    return {
        path
        for path in set(cache.rglob("*")) - before
        if path.is_file() and path.suffix != ".lock" and "corpora" not in path.parts
    }


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.__name__)
def test_each_change_is_measured_anew(
    number: Callable[[Given], None], given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert measured(number, given, cache)
    assert not measured(number, given, cache), "the same again comes from the cache"
    files = {path: path.read_bytes() for path in given.folder.iterdir()}
    changes = MODEL_CHANGES + ([the_checks] if number is verification else TEXT_CHANGES)
    for change in changes:
        with monkeypatch.context() as patch:
            changed = Given(given.folder)
            change(changed, patch)
            kinds = {path.relative_to(cache).parts[0] for path in measured(number, changed, cache)}
            assert KIND[number] in kinds, f"{change.__name__} is in no key"
            for path, content in files.items():
                path.write_bytes(content)
    for options in NUMBERS[number]:
        given.options = options
        assert measured(number, given, cache), f"{options} is in no key"


def test_another_spectrum_gives_another_truncation(given: Given, tmp_path: Path) -> None:
    model, tokens = given.model_and_tokens()
    found = []
    for size in (24, 23):
        eigenvalues = torch.linspace(2, 1, 24).double()
        eigenvalues[size - 1] *= 0.5
        one = Spectrum(eigenvalues, Z.mean, Z.n, lambda: torch.eye(24).double())
        rows = truncation_sweep(model, tokens, {("attn_out", 0): one}, [0.5], random_seeds=(), progress=False)
        found.append(len(list((tmp_path / "cache" / "losses").glob("*.json"))))
        assert rows
    assert found == [2, 3], "the clean loss and one file for each spectrum"


def test_ids_that_somebody_edits_are_other_tokens(given: Given, tmp_path: Path) -> None:
    model, tokens = given.model_and_tokens()
    seen = []
    for edit in (lambda: None, lambda: tokens.ids[3, 5:].fill_(8)):
        edit()
        collect_spectra(model, tokens, ["attn_out"], [0], progress=False)
        seen.append(sum(path.is_dir() for path in (tmp_path / "cache" / "moments").iterdir()))
    assert seen == [1, 2]
