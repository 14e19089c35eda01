"""Run the notebooks that are out of date and build the gallery: `python -m asi_lens.reproduce`.

A notebook is out of date when its source, its parameters, the package's source, a package that makes
numbers or pictures, or one of the files it left has changed. What is dear is cached by the package itself,
so that running a notebook again, to restyle a figure say, does not run the model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from asi_lens.base.errors import AsiLensError, require_whole
from asi_lens.base.files import cache_key, locked, sha256_of, write_whole
from asi_lens.base.paths import figures_dir, figures_root, notebooks_dir
from asi_lens.base.threads import share_cores
from asi_lens.reproduce.execute import execute
from asi_lens.reproduce.gallery import build_gallery, update_readme
from asi_lens.reproduce.parameters import choose, merged_parameters, parse_given
from asi_lens.results import drawing, provenance
from asi_lens.results.chrome import chrome_or_reason
from asi_lens.results.claims import ClaimRow, drop_claims, read_claims, write_claim

STATE_FILE = ".state.json"
EXECUTED = ".executed"
_Execute = Callable[[Path, Mapping[str, Any], Path], None]
_OUTPUTS = (".csv", ".png", ".html")


def reproduce(
    model: str,
    profile: str,
    notebooks: Sequence[str] | None = None,
    *,
    given: Mapping[str, Any] | None = None,
    force: bool = False,
    jobs: int = 1,
) -> Path:
    """Run what is out of date, `jobs` notebooks at a time; returns the gallery's page.

    Stops at the first failure (NotebookError, with the failing cell's error and the executed notebook's
    path), when those at work are done; the next call goes on from there. Raises UnknownNameError or
    OptionError before anything runs.
    """
    require_whole("jobs", jobs, 1)
    folder = figures_dir(model, profile)
    # All parameters first: a mistake in the last notebook's must not show after an hour.
    plans = {
        name: merged_parameters(name, model=model, profile=profile, output_folder=folder, given=given)
        for name in choose(notebooks)
    }
    with _alone(folder), drawing.shared(), _executing(jobs) as executing:
        todo = [
            partial(_run, folder, name, parameters, f"[{number}/{len(plans)}] {name}", force, executing)
            for number, (name, parameters) in enumerate(plans.items(), start=1)
        ]
        if jobs == 1:
            for run in todo:
                run()
        else:
            _side_by_side(todo, jobs)
        page = build_gallery(figures_root())
        update_readme()
    return page


def _run(
    folder: Path, name: str, parameters: Mapping[str, Any], label: str, force: bool, executing: _Execute
) -> None:
    """Run a notebook if it is out of date, and record what it left."""
    key = _key(name, parameters)
    why = "asked for" if force else _out_of_date(folder, name, key)
    if not why:
        print(f"{label}: up to date", flush=True)
        return
    print(f"{label}: running ({why})", flush=True)
    began = time.monotonic()
    with _replacing(folder, name):
        executing(notebooks_dir() / f"{name}.ipynb", parameters, folder / EXECUTED / f"{name}.ipynb")
    seconds = time.monotonic() - began
    provenance.record_wall_time(folder, name, seconds)
    _record(folder, name, key)
    print(f"{label}: done in {_duration(seconds)}", flush=True)


def _side_by_side(todo: Sequence[Callable[[], None]], jobs: int) -> None:
    """Run them in order, `jobs` at a time; after a failure nothing more begins."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run) for run in todo]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # Ctrl-C, too
            pool.shutdown(cancel_futures=True)
        for future in futures:
            if not future.cancelled():
                future.result()


@contextmanager
def _executing(jobs: int) -> Iterator[_Execute]:
    """`execute`, in this process or in one of `jobs` others: papermill is not made for threads."""
    if jobs == 1:
        yield execute
        return
    spawn = get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=share_cores, initargs=(jobs,)) as pool:
        yield lambda notebook, parameters, executed: pool.submit(
            execute, notebook, dict(parameters), executed
        ).result()


def missing_images(folder: Path) -> dict[str, str]:
    """Figures without a PNG and why, as `run.json` records it."""
    figures = provenance.read_run(folder)["figures"]
    return {stem: entry["reason"] for stem, entry in figures.items() if not entry["png"]}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep any other run out of `folder`."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".reproduce.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise AsiLensError(f"another run is at work in {folder}; wait for it or stop it") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _replacing(folder: Path, name: str) -> Iterator[None]:
    """What the notebook left earlier and does not leave again goes; if it fails, its claims come back."""
    before = {path: _stamp(path) for path in _files(folder, name)}
    claims = drop_claims(folder, name)
    try:
        yield
    except BaseException:
        made = {row.claim for row in _claims(folder, name)}
        for row in claims:
            if row.claim not in made:
                write_claim(folder, row)
        raise
    for path, stamp in before.items():
        if path.is_file() and _stamp(path) == stamp:
            path.unlink()
    for stem in provenance.read_run(folder)["figures"]:
        if stem.startswith(_prefix(name)) and not (folder / f"{stem}.html").is_file():
            provenance.forget_figure(folder, stem)


def _key(name: str, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Changes with whatever could change what the notebook leaves, by cause."""
    # No notebook uses this room: a change to it runs nothing again.
    room = Path(__file__).resolve().parent
    sources = {
        path.relative_to(room.parent).as_posix(): sha256_of(path)
        for path in sorted(room.parent.rglob("*.py"))
        if room not in path.parents
    }
    told = {key: value for key, value in parameters.items() if key != "output_folder"}
    return {
        "the notebook": cache_key(code=_code(notebooks_dir() / f"{name}.ipynb")),
        "its parameters": cache_key(**told),
        "the package": cache_key(**sources),
        "installed versions": cache_key(**provenance.versions()),
    }


def _code(notebook: Path) -> list[str]:
    """Code cells only: prose, outputs and what an editor notes down change no result."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def _out_of_date(folder: Path, name: str, key: Mapping[str, str]) -> str:
    """Why the notebook has to run; empty if it does not."""
    entry = _state(folder).get(name)
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), dict):
        return "not run yet"
    changed = [cause for cause, digest in key.items() if entry["key"].get(cause) != digest]
    if changed:
        return f"changed: {', '.join(changed)}"
    for file, digest in entry["files"].items():
        if not (folder / file).is_file():
            return f"{file} is gone"
        if sha256_of(folder / file) != digest:
            return f"{file} was changed"
    if entry["claims"] != _claims_digest(folder, name):
        return "its claims were changed"
    undrawn = [stem for stem in missing_images(folder) if stem.startswith(_prefix(name))]
    # A Chrome that has come since can draw what was left out.
    return "images can be drawn now" if undrawn and chrome_or_reason()[0] else ""


def _record(folder: Path, name: str, key: Mapping[str, str]) -> None:
    with locked(folder / STATE_FILE):
        state = _state(folder)
        state[name] = {
            "key": key,
            "files": {path.name: sha256_of(path) for path in _files(folder, name)},
            "claims": _claims_digest(folder, name),
        }
        with write_whole(folder / STATE_FILE) as temporary:
            temporary.write_text(json.dumps(state, indent=1), encoding="utf-8")


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Nothing is lost with it: the notebooks run again, from their caches.
        return {}
    return state if isinstance(state, dict) else {}


def _files(folder: Path, name: str) -> list[Path]:
    """Tables and figures of a notebook: those that begin with its number."""
    return [path for path in sorted(folder.glob(f"{_prefix(name)}*")) if path.suffix in _OUTPUTS]


def _prefix(name: str) -> str:
    return name.split("_")[0] + "_"


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _claims(folder: Path, name: str) -> list[ClaimRow]:
    return [row for row in read_claims(folder) if row.notebook == name]


def _claims_digest(folder: Path, name: str) -> str:
    return cache_key(rows=[vars(row) for row in _claims(folder, name)])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m asi_lens.reproduce", description=__doc__)
    parser.add_argument(
        "--model", default="smollm2-135m", help="a packaged name, hub name, folder or .gguf file"
    )
    parser.add_argument("--profile", default="quick", help="smoke, quick, full or paper")
    parser.add_argument("--notebooks", default="", help="comma-separated names or numbers; all if left out")
    parser.add_argument("--force", action="store_true", help="run notebooks that are up to date, too")
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
        print("\ninterrupted; the next run goes on from here", file=sys.stderr)
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
