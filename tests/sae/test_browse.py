"""Cards as HTML: everything on them, escaped; the widget's parts do what they say."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from small_stores import OPTIONS

import asi_lens as al
from asi_lens.base.errors import OptionError
from asi_lens.inputs.corpora import Tokens
from asi_lens.lorsa.browse import main
from asi_lens.sae.browse import Browser, card_html, write_page
from asi_lens.sae.cards import Card, Context
from asi_lens.sae.features import Features

pytestmark = pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")


class Texts(HTMLParser):
    """Texts, classes and links of a page; fails on tags that do not close."""

    def __init__(self, page: str):
        super().__init__()
        self.texts: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def features(tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path) -> Features:
    folder = tmp_path / "store"
    store = al.harvest_store(tiny_llama, tiny_tokens, "attn_out", 1, folder=folder, **OPTIONS)
    sae = al.SparseAutoencoder(al.SAEConfig(store.d, 40, 3, metadata=store.metadata))
    al.initialize(sae, "asi", store.spectrum, 8, store.sample(100))
    return Features(sae, store, tiny_tokens, tiny_llama, top=4, sampled=3, progress=False)


def test_a_card_is_escaped() -> None:
    context = Context(["<b>", " a\n", "&amp;"], [0.0, 2.0, 1.0], 1, 3, 9)
    card = Card(5, "x & y", 0.25, 1.5, 0.75, [context], [context], [("<i>", 0.5)], [], "", [(7, 0.5)])
    page = card_html(card)
    assert "<b>" not in page.replace("<b>25", "").replace("<b>1.50", "").replace("<b>75", "")
    found = Texts(page)
    for text in ("<b>", " a↵", "&amp;", "<i>", "x & y"):
        assert text in found.texts
    assert "sequence 3, position 9" in page
    assert "0.70)" in page  # the largest value is shaded most
    assert found.links == []  # feature 7 is not on this page


def test_a_page_opens_from_disk(features: Features, tmp_path: Path) -> None:
    groups = features.choice(3)
    path = write_page(tmp_path / "features.html", features, groups, "Features of <tiny>", "Budget & text")
    page = path.read_text(encoding="utf-8")
    found = Texts(page)
    assert "http" not in page.replace("http-equiv", "")
    for name, numbers in groups.items():
        assert name in found.texts
        for number in numbers:
            assert f'id="feature-{number}"' in page
    shown = {f"#feature-{number}" for numbers in groups.values() for number in numbers}
    assert set(found.links) == shown
    assert "Budget & text" in found.texts


def test_the_browser(features: Features) -> None:
    browser = Browser(features)
    counts = features.firings.counts
    assert counts[browser.number.value] == counts.max()
    assert f"Feature {browser.number.value}" in browser.out.value
    browser.number.value = 5
    assert "Feature 5" in browser.out.value
    browser.rank.value = 1
    assert counts[browser.number.value] == counts.sort(descending=True).values[1]
    word = features.contexts(int(counts.argmax()))[0]
    browser.box.value = word.tokens[word.at]
    assert not browser.found.disabled
    browser.found.value = browser.found.options[-1]
    assert browser.number.value == browser.found.options[-1]
    browser.box.value = "no such token"
    assert browser.found.disabled
    assert browser.box.description == "nothing on"
    with pytest.raises(OptionError, match="feature=40"):
        browser.show(40)
    bundle = browser._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "shows no widgets" in bundle["text/html"]
    assert f"Feature {browser.number.value}" in bundle["text/html"]


def test_browse_takes_text_or_a_store(
    features: Features, tiny_llama: Any, tiny_tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    by_text = al.browse(features.sae, tiny_tokens, tiny_llama, progress=False)
    assert torch.equal(by_text.features.firings.counts, features.firings.counts)
    by_store = al.browse(features.sae, features.store, tiny_llama, tiny_tokens, progress=False, top=2)
    assert by_store.features.firings.top.rows.shape == (40, 2)
    with pytest.raises(OptionError, match="tokens=None"):
        al.browse(features.sae, features.store, tiny_llama)
    nameless = al.SparseAutoencoder(al.SAEConfig(features.sae.d_in, 40, 3))
    with pytest.raises(OptionError, match="does not say its site"):
        al.browse(nameless, tiny_tokens, tiny_llama)


@pytest.mark.parametrize(
    ("metadata", "theirs"),
    [({"hook_name": "blocks.1.hook_attn_out"}, "sae_weights"), ({}, "sae")],
    ids=["SAELens", "sparsify"],
)
def test_folders_of_other_libraries(
    features: Features,
    tiny_llama: Any,
    tiny_tokens: Tokens,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    metadata: dict[str, Any],
    theirs: str,
) -> None:
    """They name a hook without a layer, or a module by the folder's name."""
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "layers.1.self_attn"
    sae = al.SparseAutoencoder(al.SAEConfig(features.sae.d_in, 40, 3, metadata=metadata))
    sae.load_state_dict(features.sae.state_dict())
    sae.save(folder)
    if theirs == "sae":
        about = {"activation": "topk", "num_latents": 40, "k": 3, "d_in": sae.d_in}
        (folder / "cfg.json").write_text(json.dumps(about))
    for file in folder.glob("*"):
        if file.name not in ("cfg.json", f"{theirs}.safetensors"):
            file.unlink()
    found = al.browse(al.SparseAutoencoder.load(folder), tiny_tokens, tiny_llama, progress=False).features
    assert found.site == features.site
    assert torch.equal(found.firings.counts, features.firings.counts)


def test_the_command_writes_a_page(
    features: Features, tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("ASI_LENS_CACHE", str(tmp_path / "cache"))
    features.sae.save(tmp_path / "sae")
    (tmp_path / "text.txt").write_text("abc def ghi. " * 80)
    out = tmp_path / "page.html"
    arguments = [str(tmp_path / "sae"), "--model", str(tiny_folder("llama")), "--output", str(out)]
    arguments += ["--corpus", str(tmp_path / "text.txt"), "--context", "16", "--features", "2"]
    assert main([*arguments, "--tokens", "256"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert "Features of sae" in Texts(out.read_text(encoding="utf-8")).texts
    assert main([*arguments, "--tokens", "100000000"]) == 1
    assert "Error" in capsys.readouterr().err
