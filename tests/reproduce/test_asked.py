"""What notebooks ask for is seen without running a model, and what cannot be seen is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import runs

from asi_lens.activations import split
from asi_lens.base.errors import DataError
from asi_lens.experiments import page as real
from asi_lens.inputs.corpora import Tokens
from asi_lens.reproduce.asked import PAGE_LOADS, PAGE_LOADS_NOTHING, AskedText, Blank, asked_by
from asi_lens.reproduce.parameters import choose, merged_parameters, profile_names

VALUES: dict[str, Any] = {
    "model": "m",
    "context": 16,
    "main_corpus": "t",
    "n_tokens": 70,
    "n_tokens_held_out": 40,
    "n_tokens_loss": 16,
    "store_budget_gb": 1,
    "dtype": "auto",
}
DEFAULTS = "".join(f"{name} = {value!r}\n" for name, value in VALUES.items() if name != "model")
START = """
import asi_lens as al
import pandas as pd
page = al.Page("01_one", globals())
lens = page.load_model()
"""


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a notebook of these cells asks for."""
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))

    def one(*cells: str, **parameters: Any) -> Any:
        runs.notebook(tmp_path / "notebooks" / "01_one.ipynb", *cells, parameters=runs.PARAMETERS + DEFAULTS)
        return asked_by({"01_one": {**VALUES, **parameters}})

    return one


def test_calls_that_load_are_noted_once_with_their_parameters(ask: Callable[..., Any]) -> None:
    found = ask(
        START + "first = page.load_tokens(lens, n_tokens, what='a')",
        "second = page.load_tokens(lens, 33, 'other', after=first)\nagain = page.load_tokens(lens, n_tokens)",
        "third = page.load_tokens(lens, 32, after=first[: len(first) // 2])",
        "data = page.harvest(lens, [('attn_out', al.layer_at(lens, 0.5))])",
    )
    assert found.models == ["m"]
    assert found.texts == [
        AskedText("t", "m", 70, 16),
        AskedText("other", "m", 33, 16, 4),
        AskedText("t", "m", 32, 16, 2),
        AskedText("t", "m", 40, 16, 4),
    ]


def test_a_tokenizer_of_the_texts_own_is_no_model(ask: Callable[..., Any]) -> None:
    cell = "own = page.small_tokenizer(300)\nfirst = page.load_tokens(own, n_tokens)"
    found = ask(START + cell, "page.load_tokens(own, 33, 'other', after=first)\npage.load_tokens(lens, 32)")
    own: dict[str, Any] = {"model": "", "context": 16, "vocab": 300, "trained_on": "t"}
    assert found.models == ["m"]
    assert found.texts == [
        AskedText("t", n_tokens=70, **own),
        AskedText("other", n_tokens=33, offset=4, **own),
        AskedText("t", "m", 32, 16),
    ]


def test_data_for_whatever_a_model_takes(ask: Callable[..., Any]) -> None:
    names = {"pictures": "p", "speech": "s", "sequences": "q"}
    more = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    cell = "first = page.load_inputs(lens, 64)\npage.load_inputs(lens, 32, after=first, what='held out')"
    found = ask(START + more + cell, **names)
    media = tuple(names.items())
    assert found.texts == [
        AskedText("t", "m", 64, 16, media=media),
        AskedText("t", "m", 32, 16, 4, media=media),
    ]


def test_the_package_itself_may_be_asked(ask: Callable[..., Any]) -> None:
    cell = "import asi_lens as al\nlens = al.load_model('n')\nal.load_tokens('x', lens, 64, context=8)"
    found = ask(cell)
    assert (found.models, found.texts) == (["n"], [AskedText("x", "n", 64, 8)])


def test_loops_over_parameters_run_and_results_of_any_shape_are_stood_in_for(ask: Callable[..., Any]) -> None:
    found = ask(
        START + "loaded = {}",
        "for name in ['a', 'b']:\n"
        "    loaded[name] = page.load_model(name)\n"
        "    spectra = al.collect_spectra(loaded[name], page.load_tokens(loaded[name], 16, name))\n",
        "table = page.table([row for s in spectra.values() for row in s.records()])",
        "rho, low, high = table.x.corr(table.y)[0]\n"
        "print(f'{rho:.2f} {len(table):,} {round(high)}', -low + 1 - table.z @ table.w)",
        "; ".join(["limits = {k: v for k, v in table.groupby(['a'])}", "table.loc[0] = 1", "{**limits}"]),
        "page.figure(table.plot(), '; '.join([page.setting(lens, table), 'more']))\npage.done()",
    )
    assert found.models == ["m", "a", "b"]
    assert [(text.source, text.model) for text in found.texts] == [("a", "a"), ("b", "b")]


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("page.load_tokens(lens, al.find_size(lens))", r"cell 2: DataError: n_tokens is Blank here"),
        ("page.load_tokens(lens, 64, lens.best_corpus)", "corpus is Blank here"),
        ("page.load_model(page.rows(1)[0].name)", "model is Blank here"),
        ("page.load_tokens(page.small_tokenizer(lens.vocab), 64)", "vocab is Blank here"),
        ("page.load_anything()", "page.load_anything is not known here"),
        ("al.load_tokens('a', lens, 64, seed=3)", "load_tokens with seed is not bundled"),
        ("1 / 0", "cannot find out what 01_one asks for: cell 2: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_found_out_is_told(ask: Callable[..., Any], cell: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        ask(START + cell)


def test_a_stand_in_is_an_empty_sequence_that_takes_anything() -> None:
    blank = Blank()
    assert [list(blank), len(blank), bool(blank), f"{blank:.3f}"] == [[], 0, True, ""]
    used = [blank.a.b(1, x=2), blank[3:4, "x"], blank + 1, 1 - blank, blank > 2, -blank, round(blank)]
    assert all(isinstance(one, Blank) for one in used)
    assert {blank: 1}[blank] == 1
    with blank as inner:
        assert isinstance(inner, Blank)


def test_the_stand_in_of_a_page_knows_all_of_a_page() -> None:
    public = {name for name in vars(real.Page) if not name.startswith("_")}
    public |= {"folder", "notebook", "parameters", "profile", "seeds"}  # set by `__init__`
    assert public == {*PAGE_LOADS, *PAGE_LOADS_NOTHING}


def test_it_asks_as_the_page_does(ask: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    called: list[AskedText] = []

    def load_tokens(source: str, model: Any, n_tokens: int, *, context: int, offset: int = 0) -> Tokens:
        called.append(AskedText(source, "m", n_tokens, context, offset))
        return Tokens(torch.zeros(n_tokens // context, context, dtype=torch.int64), source, "t", context)

    for module in (real, split):
        monkeypatch.setattr(module, "load_tokens", load_tokens)
    monkeypatch.setattr(split, "harvest_stores", lambda *_, **__: {})
    loads = "first = page.load_tokens(lens, 64, 'a')\npage.load_tokens(lens, 32, after=first)\n"
    found = ask(START + loads + "page.harvest(lens, [])")
    page = real.Page("01_one", {**VALUES, "profile": "quick", "seed": 0, "output_folder": "x"})
    model = torch.nn.Module()
    first = page.load_tokens(model, 64, "a")
    page.load_tokens(model, 32, after=first)
    page.harvest(model, [])
    assert found.texts == called


@pytest.mark.parametrize("profile", profile_names())
def test_every_notebook_can_be_asked(profile: str) -> None:
    plans = {
        name: merged_parameters(name, model="smollm2-135m", profile=profile, output_folder=Path())
        for name in choose(["all"])
    }
    found = asked_by(plans)
    assert found.models[0] == "smollm2-135m"
    corpora = {values["main_corpus"] for values in plans.values()}
    assert corpora <= {text.source for text in found.texts}
    for name in choose(["all"]):
        alone = asked_by({name: plans[name]})
        assert alone.models, f"{name} loads no model"
        assert alone.texts, f"{name} loads no text"
