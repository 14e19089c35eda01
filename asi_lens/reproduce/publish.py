"""Publish the results of a run: `python -m asi_lens.reproduce.publish --profile quick`.

The command copies tables, images and sidecars to `figures/published/<model>/<profile>`, which is committed,
and writes the README's section from all published results. Only this command writes to `figures/published`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asi_lens.base.errors import AsiLensError, DataError
from asi_lens.base.files import write_text, write_whole
from asi_lens.base.paths import PUBLISHED, figures_dir, figures_root, project_root, published_dir
from asi_lens.reproduce.gallery import DEFAULT_MODEL, Run, build_gallery, claims_of, find_runs, render
from asi_lens.reproduce.parameters import merged_parameters, notebook_names
from asi_lens.reproduce.staleness import changed_since
from asi_lens.results.provenance import told_parameters
from asi_lens.results.sidecar import files_of, join, longest_time, read_sidecars, write_sidecar

BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"
# Profiles of the README's table, the best evidence first.
BEST = ("gpu", "full", "quick")
# Profiles that are too small, or too private, to support a claim.
_NOT_PUBLISHED = ("smoke",)
_KEPT = (".csv", ".png")


def publish(model: str, profile: str, notebooks: Sequence[str] | None = None) -> Path:
    """Replace the published files of the notebooks that have run (all by default); return their folder.

    Raises DataError if no notebook was run, if an image is missing, if the profile makes no claims, and for a
    notebook that ran with other parameters than the profile's, or whose files are not those of its last
    complete run.
    """
    if profile in _NOT_PUBLISHED:
        raise DataError(f"profile {profile} is not published: its runs are too small to support a claim")
    source, target = figures_dir(model, profile), published_dir(model, profile)
    found = read_sidecars(source)
    missing = [name for name in notebooks or () if name not in found]
    if missing or not found:
        told = ", ".join(missing or ["a notebook"])
        raise DataError(f"{source} has no run of {told}; run `make figures` first")
    chosen = {name: one for name, one in found.items() if not notebooks or name in notebooks}
    for name, one in chosen.items():
        undrawn = [stem for stem, figure in one["figures"].items() if not figure["png"]]
        if undrawn:
            raise DataError(f"{name} has no image of {', '.join(undrawn)}; run it where Chrome is installed")
        _require_whole_run(source, one, model, profile)
    target.mkdir(parents=True, exist_ok=True)
    before = read_sidecars(target)
    for name, one in chosen.items():
        kept = [file for file in files_of(one) if Path(file).suffix in _KEPT]
        for file in set(files_of(before[name])) - set(kept) if name in before else ():
            (target / file).unlink(missing_ok=True)
        for file in kept:
            with write_whole(target / file) as temporary:
                copy = copy_small if file.endswith(".png") else shutil.copyfile
                copy(source / file, temporary)
        if "timed_key" in one:  # a notebook that ran without the runner has no times
            one = {**one, "longest_wall_time_s": longest_time(one, before.get(name, {}))}
        write_sidecar(target, one)
    join(target)
    return target


def _require_whole_run(source: Path, one: Mapping[str, Any], model: str, profile: str) -> None:
    """Raise DataError unless a sidecar belongs to its files, and to the parameters of the profile."""
    name = one["notebook"]
    if why := changed_since(source, name):
        raise DataError(f"{name} was stopped in a later run, or edited ({why}); run it again")
    if name not in notebook_names():  # of an older version, which nothing can be asked of
        return
    asked = told_parameters(merged_parameters(name, model=model, profile=profile, output_folder=source))
    ran = one["parameters"]
    other = [key for key in asked if ran.get(key) != asked[key]]
    if other:
        told = ", ".join(f"{key} {ran.get(key)!r}, not {asked[key]!r}" for key in other)
        raise DataError(f"{name} ran with other parameters than the profile {profile}: {told}; run it again")


def copy_small(source: Path, target: Path) -> None:
    """Copy an image with 256 colors, which look the same: a quarter of the bytes in the repository."""
    from PIL import Image

    with Image.open(source) as image:
        colors = image.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    colors.save(target, "png", optimize=True)


def readme_section(root: Path) -> str:
    """Return a Markdown table of the default model, a row per claim, each from the best published profile.

    Raises DataError if no result of the default model is published.
    """
    return render("readme.md.j2", claims=claims_of(_best(root))).rstrip()


def evidence_page(root: Path) -> str:
    """Return all claims of the default model in Markdown: numbers with their spread, budget and figure.

    The page belongs into the folder of the published results. Raises as `readme_section`.
    """
    return render("evidence.md.j2", model=DEFAULT_MODEL, claims=claims_of(_best(root)))


def _best(root: Path) -> list[Run]:
    runs = {run.profile: run for run in find_runs(root) if run.model == DEFAULT_MODEL and run.published}
    best = [runs[name] for name in BEST if name in runs]
    if not best:
        raise DataError(f"{root / PUBLISHED} has no run of {DEFAULT_MODEL} under {', '.join(BEST)}")
    return best


def update_readme() -> bool:
    """Write `readme_section` between the README's markers, and write the page of evidence.

    Returns whether the README has changed. Raises DataError for a README without its markers.
    """
    readme = project_root() / "README.md"
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise DataError(f"{readme} needs one {BEGIN} and one {END} after it")
    before, rest = text.split(BEGIN)
    write_text(figures_root() / PUBLISHED / "README.md", evidence_page(figures_root()))
    new = f"{before}{BEGIN}\n\n{readme_section(figures_root())}\n\n{END}{rest.split(END)[1]}"
    if new == text:
        return False
    write_text(readme, new)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m asi_lens.reproduce.publish", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--profile", default="quick")
    parser.add_argument(
        "--notebooks", default="", help="comma-separated names; all that have run if left out"
    )
    chosen = parser.parse_args(arguments)
    try:
        folder = publish(chosen.model, chosen.profile, [name for name in chosen.notebooks.split(",") if name])
        changed = update_readme()
        build_gallery(figures_root())
    except (AsiLensError, OSError) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    print(f"published: {folder}" + ("; README.md has the new table" if changed else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
