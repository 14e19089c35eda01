"""Every block of Python in the README and the documentation runs, in its order, with smaller budgets."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_project import ROOT

# Budgets of the pages -> those of this test.
SMALLER = {
    "n_tokens=65_536": "n_tokens=13_056",
    "n_tokens=500_000": "n_tokens=4_096",
    "n_tokens=4_096, context": "n_tokens=512, context",
    "n_tokens=2_048, context": "n_tokens=512, context",
    "d_sae=4_096": "d_sae=256",
    "8_192": "1_024",
    "[:8192]": "[:1024]",
    "n_ov=2_304": "n_ov=288",
    "dead_window=100_000": "dead_window=2_000",
    "context=256": "context=64",
    "d_init=256": "d_init=6",
    "ranks=[0.125, 0.25, 0.5]": "ranks=[0.25]",
    "choice(8)": "choice(2)",
}
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]


def blocks(page: str) -> list[tuple[int, str]]:
    """Line and code of each block of Python."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    return [(text[: each.start()].count("\n") + 2, each[1]) for each in found]


def rows(n: int = 1500, d: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 8, generator=generator) @ torch.randn(8, d, generator=generator) + 1


class Plain(torch.nn.Module):
    """A trainer's own dictionary, as the page on other trainers supposes it."""

    def __init__(self, d: int = 24, d_sae: int = 64, k: int = 4):
        super().__init__()
        self.k, shapes = k, {"W_enc": (d, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d), "b_dec": (d,)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pre = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
        values, places = pre.topk(self.k)
        return torch.zeros_like(pre).scatter(1, places, values) @ self.W_dec + self.b_dec


def stand_ins(page: str) -> dict[str, Any]:
    """What a page leaves to its reader."""
    if page != "docs/your_trainer.md":
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens, sparsify = (pytest.importorskip(name) for name in ("sae_lens", "sparsify"))
        kind = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=24, d_sae=64, k=4))
        coder = sparsify.SparseCoder(24, sparsify.SparseCoderConfig(num_latents=64, k=4))
    # Their runners need a model of the hub; the dictionaries that they hold are real.
    sae_lens.LanguageModelSAETrainingRunner = lambda config: SimpleNamespace(sae=kind, run=lambda: None)
    sparsify.Trainer = lambda *given: SimpleNamespace(saes={"o_proj": coder}, fit=lambda: None)
    import asi_lens as al

    sample = {"o_proj": rows()}
    spectra = {"o_proj": al.Spectrum.of(rows())}
    names = {"config": None, "dataset": None, "model": None, "spectra": spectra, "samples": sample}
    return names | {"activations": rows, "sae": Plain(), "d_sae": 64}


@pytest.mark.packaged
@pytest.mark.filterwarnings("ignore::asi_lens.activations.spectrum.FewTokensWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page", **stand_ins(page)}
    for line, code in blocks(page):
        for budget, smaller in SMALLER.items():
            code = code.replace(budget, smaller)
        # Errors name the page and its line.
        exec(compile("\n" * (line - 1) + code, str(ROOT / page), "exec"), names)


def test_the_plain_recipe_is_asi() -> None:
    """The ten lines for any trainer, with the page's own words, give the subspace and the best scale."""
    code = next(code for _, code in blocks("docs/your_trainer.md") if "active_subspace" in code)
    import asi_lens as al

    x, sae = rows(), Plain()
    spectrum = al.Spectrum.of(x)
    code = code.replace("d_init=256", "d_init=6")
    with torch.no_grad():
        exec(code, {"spectrum": spectrum, "rows": x, "sae": sae, "d_sae": 64})
        V = spectrum.active_subspace(6).float()
        torch.testing.assert_close(sae.W_dec @ V @ V.T, sae.W_dec.data, rtol=1e-4, atol=1e-5)
        errors = []
        for scale in (0.97, 1.0, 1.03):
            sae.W_enc.data *= scale
            errors.append((x - sae(x)).square().sum().item())
            sae.W_enc.data /= scale
    assert errors[1] == min(errors)


def test_the_pages_are_in_the_navigation() -> None:
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r"[\w/]+\.md", str(yaml.load(text, Loader)["nav"]))
    mine = {path.name for path in (ROOT / "docs").glob("*.md")}
    assert mine <= set(named)
