"""Run the notebooks that are out of date and build the gallery: `python -m asi_lens.reproduce`.

A notebook is out of date if a change was made to its source, its parameters, the source of asi_lens, the
version of a package that makes numbers or images, or one of the notebook's output files. asi_lens caches
expensive results, so running a notebook again (for example to restyle a figure) does not run the model.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from asi_lens.base.errors import AsiLensError, CacheError, DataError, require, require_whole
from asi_lens.base.files import cache_key, existing, locked
from asi_lens.base.paths import figures_dir, figures_root, published_dir
from asi_lens.reproduce.board import Board
from asi_lens.reproduce.execute import Execute, executing_in
from asi_lens.reproduce.gallery import build_gallery
from asi_lens.reproduce.parameters import choose, merged_parameters, parse_given, require_machine
from asi_lens.reproduce.staleness import key_of, left_by, out_of_date, record
from asi_lens.results import drawing
from asi_lens.results.parameters_cell import notebook_path
from asi_lens.results.sidecar import (
    figures_in,
    figures_of,
    join,
    longest_time,
    read_sidecar,
    read_sidecars,
    write_sidecar,
)

EXECUTED = ".executed"
_showing = Lock()


def reproduce(
    model: str,
    profile: str,
    notebooks: Sequence[str] | None = None,
    *,
    given: Mapping[str, Any] | None = None,
    force: bool = False,
    jobs: int = 1,
) -> Path:
    """Run the notebooks that are out of date, `jobs` at a time; return the path of the gallery's page.

    The gallery is built anew after every notebook. After a failure no further notebook starts; when the
    running notebooks have ended, NotebookError is raised, with the failing cell's error and the path of the
    executed notebook. The next call continues from there. Raises UnknownNameError or OptionError before any
    notebook runs, also for a profile that needs another machine.
    """
    require_whole("jobs", jobs, 1)
    is_path = model.startswith(("/", ".", "~"))
    allowed = "a packaged name, a hub name, or a folder or file that exists"
    require(model != "" and not (is_path and existing(model) is None), "model", model, allowed)
    require_machine(profile)
    folder = figures_dir(model, profile)
    # All parameters are checked first, so that an error in the last notebook's is not found after an hour.
    plans = {
        name: merged_parameters(name, model=model, profile=profile, output_folder=folder, given=given)
        for name in choose(notebooks)
    }
    known = (folder, published_dir(model, profile))
    board = Board({name: _expected(known, name) for name in plans})
    busy = AsiLensError(f"another run is using {folder}; wait for that run or stop it")
    with locked(folder / ".reproduce", busy), _drawing_later(folder), executing_in(jobs, board) as executing:
        todo = [
            partial(_run, folder, name, parameters, board, force, executing)
            for name, parameters in plans.items()
        ]
        if jobs == 1:
            for run in todo:
                run()
        else:
            _side_by_side(todo, jobs)
    return figures_root() / "index.html"


@contextmanager
def _drawing_later(folder: Path) -> Iterator[None]:
    """Draw and show the images of all notebooks at the end of the context, also after a failure."""
    os.environ[drawing.LATER] = "1"
    try:
        yield
    except Exception:
        draw_and_show(folder)
        raise
    else:
        draw_and_show(folder)
    finally:  # after Ctrl-C no images are drawn: the next run draws them
        del os.environ[drawing.LATER]


def draw_and_show(folder: Path) -> Path:
    """Draw the missing images of a folder and build the gallery; return the path of the gallery's page."""
    draw_images(folder)
    return _show(folder)


def _show(folder: Path) -> Path:
    with _showing:
        join(folder)
        return build_gallery(figures_root(), newest=folder)


def draw_images(folder: Path) -> None:
    """Draw the missing images of a folder, and record in the sidecars which images exist now."""
    found = read_sidecars(folder)
    figures = {folder / f"{stem}.png": one for stem, one in figures_in(found).items()}
    reasons = drawing.draw_later([png for png, one in figures.items() if not one["png"]])
    for png, reason in reasons.items():
        figures[png] |= {"png": not reason, "reason": reason}
    for sidecar in found.values():
        if any(folder / f"{stem}.png" in reasons for stem in sidecar["figures"]):
            write_sidecar(folder, sidecar)


def _run(
    folder: Path, name: str, parameters: Mapping[str, Any], board: Board, force: bool, executing: Execute
) -> None:
    """Run a notebook if it is out of date, and record its output files."""
    key = key_of(name, parameters)
    why = "asked for" if force else out_of_date(folder, name, key)
    if not why:
        board.up_to_date(name)
        return
    before, earlier = left_by(folder, name), _earlier(folder, name)
    board.running(name, why)
    try:
        executed = folder / EXECUTED / f"{name}.ipynb"
        executing(notebook_path(name), parameters, executed, partial(board.tell, name))
    except BaseException:
        board.stopped(name)
        raise
    _time(folder, name, board.finished(name), earlier)
    # Output files of an earlier run that this run did not write again show other numbers.
    for path in set(before) - set(left_by(folder, name)):
        path.unlink(missing_ok=True)
    record(folder, name, key)
    _show(folder)


def _earlier(folder: Path, name: str) -> dict[str, Any]:
    """Return the sidecar of an earlier run; {} if there is none or it cannot be read."""
    try:
        return read_sidecar(folder, name) or {}
    except CacheError:
        return {}


def _time(folder: Path, name: str, seconds: float, before: Mapping[str, Any]) -> None:
    """Write the time of a run and the longest time with the same parameters into the notebook's sidecar."""
    found = read_sidecar(folder, name)
    if found is None:
        raise AsiLensError(f"{name} wrote no {name}.json; its last cell must be `page.done()`")
    key = cache_key(parameters=found["parameters"], sources=found["sources"])
    timed = {**found, "wall_time_s": round(seconds, 1), "timed_key": key}
    write_sidecar(folder, {**timed, "longest_wall_time_s": longest_time(timed, before)})


def _expected(folders: Sequence[Path], name: str) -> float | None:
    """Return the seconds of the notebook's last run, from the first folder that has them, or None."""
    times = (_earlier(folder, name).get("wall_time_s") for folder in folders)
    return next((float(seconds) for seconds in times if seconds is not None), None)


def _side_by_side(todo: Sequence[Callable[[], None]], jobs: int) -> None:
    """Run the functions in order, `jobs` at a time; after a failure no further function starts."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run) for run in todo]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # also after Ctrl-C
            pool.shutdown(cancel_futures=True)
        for future in futures:
            if not future.cancelled():
                future.result()


def missing_images(folder: Path) -> dict[str, str]:
    """Return the reason for each figure without a PNG, by stem."""
    return {stem: entry["reason"] for stem, entry in figures_of(folder).items() if not entry["png"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m asi_lens.reproduce", description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a packaged name, hub name, folder or .gguf file"
    )
    parser.add_argument("--profile", default="quick", help="smoke, quick, full, gpu or paper")
    parser.add_argument(
        "--notebooks",
        default="",
        help="comma-separated names, numbers or groups (paper, beyond, all); paper if left out",
    )
    parser.add_argument("--force", action="store_true", help="run notebooks that are up to date, too")
    parser.add_argument("--draw", action="store_true", help="draw images that are missing; run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
    parser.add_argument(
        "-p",
        dest="given",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the notebooks",
    )
    chosen = parser.parse_args(arguments)
    names = [name for name in chosen.notebooks.split(",") if name]
    try:
        if chosen.draw:
            folder = figures_dir(chosen.model, chosen.profile)
            if not folder.is_dir():
                raise DataError(f"{folder} is not there: no notebook has run for this model and profile")
            page = draw_and_show(folder)
        else:
            page = reproduce(
                chosen.model,
                chosen.profile,
                names,
                given=parse_given(chosen.given),
                force=chosen.force,
                jobs=chosen.jobs,
            )
    except (AsiLensError, OSError) as error:
        print(f"\nstopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the next run continues from here", file=sys.stderr)
        return 130
    print(f"\ngallery: {page}")
    missing = missing_images(figures_dir(chosen.model, chosen.profile))
    if missing:
        print(f"\n*** {len(missing)} PNG(s) ARE MISSING: {', '.join(sorted(missing))}", file=sys.stderr)
        for reason in sorted(set(missing.values())):
            print(f"*** {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
