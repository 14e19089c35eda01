"""The gallery, one page that works from disk: claims first, then every figure, interactive.

The page and the README's section are made from what runs left (`claims.csv`, `run.json`, the figures'
pages and images) and hold nothing of their own.
"""

from __future__ import annotations

import argparse
import html
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asi_lens.base.errors import DataError
from asi_lens.base.files import locked, write_whole
from asi_lens.base.paths import figures_root, project_root
from asi_lens.results.claims import ClaimRow, claim_order, read_claims
from asi_lens.results.figure_files import rich, shared_plotly_js
from asi_lens.results.provenance import RUN_FILE, read_run

BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
# What the README shows: the default model, the best profile that was run.
README_MODEL, README_PROFILES = "smollm2-135m", ("full", "quick")
_DATA = re.compile(r'<script type="application/json" id="figure-data">(.*?)</script>', re.DOTALL)


@dataclass
class Figure:
    """One figure of a run, as far as it is there."""

    stem: str
    title: str
    subtitle: str
    caption: str
    data: str
    """The figure as JSON safe inside a script tag; empty where its page is not there (a fresh clone)."""
    png: str
    """Relative URL of the image; empty where there is none."""
    csv: str
    """Relative URL of the table of the same name; empty where there is none."""
    reason: str


@dataclass
class Run:
    """Everything that one model under one profile has left."""

    model: str
    profile: str
    folder: Path
    claims: list[ClaimRow]
    notebooks: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)

    @property
    def tables(self) -> list[str]:
        """Names of all tables and records in the folder."""
        return sorted(path.name for path in [*self.folder.glob("*.csv"), *self.folder.glob(RUN_FILE)])

    @property
    def url(self) -> str:
        """The folder, relative to the gallery."""
        return f"{self.model}/{self.profile}"

    @property
    def id(self) -> str:
        """Usable as an HTML id."""
        return re.sub(r"[^\w-]+", "-", f"{self.model}-{self.profile}")


def find_runs(root: Path) -> list[Run]:
    """Runs below a figures folder, the default model and the larger profiles first."""
    runs = []
    for path in root.glob(f"*/*/{RUN_FILE}"):
        folder = path.parent
        told = read_run(folder)
        run = Run(folder.parent.name, folder.name, folder, read_claims(folder), told["notebooks"])
        for stem, entry in sorted(told["figures"].items()):
            run.figures.append(_figure(root, folder, stem, entry))
        runs.append(run)
    order = {name: i for i, name in enumerate(("full", "quick", "paper", "smoke"))}
    return sorted(runs, key=lambda r: (r.model != README_MODEL, r.model, order.get(r.profile, 9), r.profile))


def build_gallery(root: Path) -> Path:
    """Write `<root>/index.html` from every run below `root`; returns its path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("asi_lens.reproduce", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["rich"] = lambda text: jinja2.utils.markupsafe.Markup(rich(text))
    environment.filters["verdict_class"] = lambda verdict: verdict.replace(" ", "-")
    root.mkdir(parents=True, exist_ok=True)
    script = shared_plotly_js(root)
    page = root / "index.html"
    with locked(root / ".gallery"):
        text = environment.get_template("gallery.html.j2").render(runs=find_runs(root), plotly_js=script.name)
        with write_whole(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return page


def readme_section(root: Path) -> str:
    """Claims table and figures of the default model in Markdown, each from the largest profile that has it.

    Raises DataError where the default model has no run.
    """
    runs = {run.profile: run for run in find_runs(root) if run.model == README_MODEL}
    best = [runs[name] for name in README_PROFILES if name in runs]
    if not best:
        raise DataError(f"{root} has no run of {README_MODEL} under {' or '.join(README_PROFILES)}")
    claims: dict[tuple[str, str], tuple[ClaimRow, str]] = {}
    figures: dict[str, tuple[Figure, str]] = {}
    for run in best:
        for claim in run.claims:
            claims.setdefault((claim.claim, claim.notebook), (claim, run.profile))
        for figure in run.figures:
            if figure.png and not figure.stem.startswith("00_"):
                figures.setdefault(figure.stem, (figure, run.profile))
    lines = [f"Model `{README_MODEL}`; budgets are in the figures' captions and in `claims.csv`.", ""]
    lines += ["| claim | paper | here | spread | verdict | profile |", "|---|---|---|---|---|---|"]
    for claim, profile in sorted(claims.values(), key=lambda pair: claim_order(pair[0])):
        source = f"[{claim.notebook}](notebooks/{claim.notebook}.ipynb)"
        cells = (
            f"**{claim.claim}** {_cell(claim.statement)}",
            _cell(claim.paper_value),
            _cell(claim.our_value),
            _cell(claim.spread),
            f"**{claim.verdict}** ({source})",
            profile,
        )
        lines.append(f"| {' | '.join(cells)} |")
    for stem, (figure, _) in sorted(figures.items()):
        title, caption = _plain(figure.title), " ".join(_plain(figure.caption).split())
        lines += ["", f"![{title}](figures/{figure.png})", "", f"*{stem}. {caption}*"]
    return "\n".join(lines)


def update_readme(readme: Path | None = None) -> bool:
    """Put `readme_section` between the README's markers; returns whether there was anything to put.

    Raises DataError for a README without its markers.
    """
    readme = project_root() / "README.md" if readme is None else readme
    root = figures_root()
    if root != project_root() / "figures" or not readme.is_file():
        return False  # a run into another folder is not what the README shows
    if not any((root / README_MODEL / profile / RUN_FILE).is_file() for profile in README_PROFILES):
        return False
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise DataError(f"{readme} needs one {BEGIN} and one {END} after it")
    before, rest = text.split(BEGIN)
    new = f"{before}{BEGIN}\n\n{readme_section(root)}\n\n{END}{rest.split(END)[1]}"
    if new != text:
        with write_whole(readme) as temporary:
            temporary.write_text(new, encoding="utf-8")
    return True


def _figure(root: Path, folder: Path, stem: str, entry: dict[str, Any]) -> Figure:
    def url(suffix: str) -> str:
        path = folder / f"{stem}{suffix}"
        return path.relative_to(root).as_posix() if path.is_file() else ""

    page = folder / f"{stem}.html"
    found = _DATA.search(page.read_text(encoding="utf-8")) if page.is_file() else None
    texts = {key: entry[key] for key in ("title", "subtitle", "caption", "reason")}
    return Figure(stem=stem, data=found.group(1) if found else "", png=url(".png"), csv=url(".csv"), **texts)


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(html.escape(text, quote=False).replace("|", "\\|").split())


def _plain(text: str) -> str:
    return re.sub(r"<[^>]*>", "", text)


def main() -> int:
    """Build the gallery and the README's section anew from what runs have left."""
    argparse.ArgumentParser(
        prog="python -m asi_lens.reproduce.gallery", description=main.__doc__
    ).parse_args()
    print(f"gallery: {build_gallery(figures_root())}")
    if update_readme():
        print("README.md shows what the runs left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
