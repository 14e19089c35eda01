"""The gallery: one page that works from disk, with the claims first and then every figure, interactive.

The page is built only from files of runs: sidecars, and the figures' pages and images.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asi_lens.base.files import locked, write_text
from asi_lens.base.paths import PUBLISHED, figures_root
from asi_lens.results.figure_files import rich, shared_plotly_js
from asi_lens.results.sidecar import figures_in, files_of, read_sidecars, sidecar_path
from asi_lens.results.verdicts import Number, combined

DEFAULT_MODEL = "smollm2-135m"
_PROFILES = ("full", "gpu", "quick", "paper", "smoke")
_DATA = re.compile(r'<script type="application/json" id="figure-data">(.*?)</script>', re.DOTALL)


@dataclass
class Figure:
    """One figure of a run: the texts, and those of its files that exist."""

    stem: str
    title: str
    subtitle: str
    caption: str
    data: str
    """The figure as JSON that is safe inside a script tag; "" if its page is missing (a fresh clone)."""
    png: str
    """Relative URL of the image; "" if there is no image."""
    csv: str
    """Relative URL of the table of the same name; "" if there is no such table."""
    reason: str


@dataclass
class Evidence:
    """One notebook's verdict on one claim."""

    notebook: str
    profile: str
    verdict: str
    statement: str
    paper_value: str
    numbers: list[Number]
    over: str
    budget: str
    figure: Figure | None


@dataclass
class Claim:
    """One claim of the paper, with the evidence of all notebooks that tested it."""

    name: str
    evidence: list[Evidence]

    @property
    def verdict(self) -> str:
        """One verdict from all evidence; see `judging.combined`."""
        return combined([one.verdict for one in self.evidence])


@dataclass
class Run:
    """All results of one model under one profile."""

    model: str
    profile: str
    folder: Path
    url: str
    """The folder, relative to the gallery."""
    published: bool
    notebooks: dict[str, dict[str, Any]]
    """Sidecars by notebook."""
    figures: list[Figure] = field(default_factory=list)

    @property
    def claims(self) -> list[Claim]:
        """Tested claims; see `claims_of`."""
        return claims_of([self])

    @property
    def tables(self) -> list[str]:
        """Names of all tables and records in the folder."""
        names = [file for one in self.notebooks.values() for file in files_of(one) if file.endswith(".csv")]
        names += [sidecar_path("", notebook).name for notebook in self.notebooks]
        return [name for name in sorted(names) if (self.folder / name).is_file()]

    @property
    def id(self) -> str:
        """A name that can be used as an HTML id, different for each run."""
        plain = self.url.replace("/", "-")
        return re.sub(r"[^\w-]", lambda found: f"_{ord(found[0]):x}_", plain)

    def evidence(self, notebook: str, one: dict[str, Any]) -> Evidence:
        """Return the evidence of one verdict in a notebook's sidecar."""
        own = [figure for figure in self.figures if figure.stem in self.notebooks[notebook]["figures"]]
        named = [figure for figure in own if re.search(rf"\b{one['claim']}\b", figure.caption)]
        texts = {key: one[key] for key in ("verdict", "statement", "paper_value", "over", "budget")}
        numbers, figure = [Number(**number) for number in one["numbers"]], next(iter([*named, *own]), None)
        return Evidence(notebook, self.profile, numbers=numbers, figure=figure, **texts)


def claims_of(runs: Sequence[Run]) -> list[Claim]:
    """Return the claims of several runs, C2 before C10.

    Each notebook's evidence is from the first run that has it.
    """
    found: dict[str, dict[str, Evidence]] = {}
    for run in runs:
        for notebook, sidecar in run.notebooks.items():
            for one in sidecar["verdicts"]:
                found.setdefault(one["claim"], {}).setdefault(notebook, run.evidence(notebook, one))
    return [Claim(name, list(found[name].values())) for name in sorted(found, key=lambda name: int(name[1:]))]


def find_runs(root: Path, newest: Path | None = None) -> list[Run]:
    """Return the runs below a figures folder.

    The newest run is first, then the default model and the larger profiles. Published runs are after local
    runs.
    """
    runs = []
    for base in (root, root / PUBLISHED):
        for folder in sorted(base.glob("*/*/")):
            if base == root and folder.parent.name == PUBLISHED:
                continue
            sidecars = read_sidecars(folder)
            if not sidecars:
                continue
            url = folder.relative_to(root).as_posix()
            run = Run(folder.parent.name, folder.name, folder, url, base != root, sidecars)
            run.figures = [
                _figure(root, folder, stem, entry) for stem, entry in sorted(figures_in(sidecars).items())
            ]
            runs.append(run)
    order = {name: i for i, name in enumerate(_PROFILES)}

    def place(run: Run) -> tuple[Any, ...]:
        same = newest is not None and (run.model, run.profile) == (newest.parent.name, newest.name)
        mine = (run.model != DEFAULT_MODEL, run.model, order.get(run.profile, 9), run.profile)
        return (newest is None or run.folder != newest, not same, run.published, *mine)

    return sorted(runs, key=place)


def build_gallery(root: Path, newest: Path | None = None) -> Path:
    """Write `<root>/index.html` from every run below `root`, the run in `newest` first; return its path.

    Raises CacheError for a damaged sidecar.
    """
    root.mkdir(parents=True, exist_ok=True)
    script = shared_plotly_js(root)
    page = root / "index.html"
    with locked(root / ".gallery"):
        write_text(page, render("gallery.html.j2", runs=find_runs(root, newest), plotly_js=script.name))
    return page


def render(template: str, **values: Any) -> str:
    """Return a page from a file of `templates/`; texts in HTML pages are escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asi_lens.reproduce", "templates"),
        autoescape=".html" in template,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["rich"] = lambda text: jinja2.utils.markupsafe.Markup(rich(text))
    environment.filters["verdict_class"] = lambda verdict: verdict.replace(" ", "-")
    environment.filters["cell"] = _cell
    return environment.get_template(template).render(**values)


def _cell(text: str) -> str:
    """Return text escaped for a cell of a Markdown table."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def _figure(root: Path, folder: Path, stem: str, entry: dict[str, Any]) -> Figure:
    def url(suffix: str) -> str:
        path = folder / f"{stem}{suffix}"
        return path.relative_to(root).as_posix() if path.is_file() else ""

    page = folder / f"{stem}.html"
    found = _DATA.search(page.read_text(encoding="utf-8")) if page.is_file() else None
    texts = {key: entry[key] for key in ("title", "subtitle", "caption", "reason")}
    return Figure(stem=stem, data=found.group(1) if found else "", png=url(".png"), csv=url(".csv"), **texts)


def main() -> int:
    """Build the gallery anew from the files of all runs."""
    argparse.ArgumentParser(
        prog="python -m asi_lens.reproduce.gallery", description=main.__doc__
    ).parse_args()
    print(f"gallery: {build_gallery(figures_root())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
