"""Pages of the site that are written elsewhere: evidence, claims, benchmarks, contributing, changelog, API.

They are read from their places at every build, with their links turned to the site's own pages.
"""

from __future__ import annotations

import ast
import inspect
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "evidence.md": "figures/published/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "benchmarks_gpu.md": "benchmarks/gpu/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
"""Page of the site -> file of the project."""
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)(#[^)]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages, every published image, and a page of the API for each room."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for image in sorted((ROOT / "figures" / "published").rglob("*.png")):
        name = image.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(image)))
    for claim, text in _claims().items():
        files.append(File.generated(config, f"claims/{claim}.md", content=text))
    rooms: dict[str, list[str]] = {}
    for name, module in _public().items():
        rooms.setdefault(module.split(".")[1], []).append(f"::: {module}.{name}")
    for room, names in rooms.items():
        text = "\n\n".join(
            [f"# {room}", f"Public names of `asi_lens.{room}`, each also `asi_lens.<name>`.", *names]
        )
        files.append(File.generated(config, f"api/{room}.md", content=text + "\n"))
    return files


def on_config(config: Any) -> Any:
    """Name the pages of the API and of the claims in the navigation."""
    rooms = sorted({module.split(".")[1] for module in _public().values()}, key=_order)
    for entry in config["nav"]:
        if "API" in entry:
            entry["API"] = [{room: f"api/{room}.md"} for room in rooms]
        if "Evidence" in entry:
            entry["Evidence"] += [{claim: f"claims/{claim}.md"} for claim in _claims()]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the project into links to pages of the site, or into plain text."""
    here = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    if page.file.src_uri.startswith("claims/"):
        here = PAGES["evidence.md"]
    pages = {source: name for name, source in PAGES.items()}

    def turned(found: re.Match[str]) -> str:
        begin, target, anchor, end = found.groups()
        if "://" in target or page.file.src_uri.startswith("api/"):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        path = pages.get(path, path.removeprefix("docs/"))
        if path in files.src_uris:
            relative = posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or ".")
            return f"{begin}{relative}{anchor or ''}{end}"
        # A file that the site does not show: its name stays, the link goes.
        return f"`{path}`" if begin.startswith("!") else begin[1:-2]

    return _LINK.sub(turned, markdown)


def _claims() -> dict[str, str]:
    """Return a page per claim: its part of the evidence, and the rule by which the verdict is made."""
    whole = (ROOT / PAGES["evidence.md"]).read_text(encoding="utf-8")
    rules = _rules()
    pages = {}
    for part in re.split(r"^## (?=C\d+:)", whole, flags=re.M)[1:]:
        claim = part.partition(":")[0]
        pages[claim] = f"# {part.strip()}\n\n## What would change the verdict\n\n{rules[claim]}\n"
    return pages


def _rules() -> dict[str, str]:
    """Return the docstrings of every claim's verdict functions, from the source."""
    rules: dict[str, list[str]] = {}
    for path in sorted((ROOT / "asi_lens" / "results").glob("*_verdicts.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            # `@claim("C1", ...)` or, for two functions of one claim, `@claim(*_C6)`
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                found = re.match(r"claim\(\W*_?(C\d+)\b", ast.unparse(mark))
                if found:
                    where = f"`{node.name}` in `{path.relative_to(ROOT).as_posix()}`"
                    rule = inspect.cleandoc(ast.get_docstring(node) or "")
                    rules.setdefault(found[1], []).append(f"The rule of {where}:\n\n{rule}")
    return {claim: "\n\n".join(told) for claim, told in rules.items()}


def _public() -> dict[str, str]:
    """Return the public names and their modules, without importing the package."""
    sys.path.insert(0, str(ROOT))
    import asi_lens

    return asi_lens._PUBLIC


def _order(room: str) -> int:
    rooms = ["inputs", "activations", "collapse", "training", "sae", "lorsa", "experiments"]
    return rooms.index(room) if room in rooms else len(rooms)
