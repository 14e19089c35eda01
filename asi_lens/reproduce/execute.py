"""Run one notebook with papermill, in a kernel that is this interpreter for certain."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from threading import Thread
from typing import Any

from asi_lens.base.errors import AsiLensError
from asi_lens.base.threads import share_cores
from asi_lens.reproduce.board import Bars, Board, Tell

Execute = Callable[[Path, Mapping[str, Any], Path, Tell], None]
"""Runs a notebook with parameters, leaves its executed copy, tells how far it is."""

_KERNEL = "asi_lens_run"
_START_TIMEOUT = 300  # seconds; papermill's 60 can trip on a loaded machine
# glibc gives freed memory of this size (bytes) back to the system, to ask for it again in the next layer of a
# pass: a tenth of a harvest's time on a CPU is page faults.
_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**28)}


class NotebookError(AsiLensError, RuntimeError):
    """A cell of a notebook failed."""


def execute(
    notebook: Path, parameters: Mapping[str, Any], executed: Path, tell: Tell = lambda text: None
) -> None:
    """Run `notebook` headless with this interpreter and leave the executed copy at `executed`.

    `tell` is given a line of text whenever a cell is done or the notebook's own progress bar moves.
    Until the end the copy has a temporary name, so that the one of a run that was stopped is never taken
    for a whole one. Raises NotebookError (cell, error and the copy's path) when a cell fails or the kernel
    dies, KeyboardInterrupt when either process is interrupted.
    """
    name = notebook.stem
    partial = executed.with_name(f"{name}.part.ipynb")
    executed.parent.mkdir(parents=True, exist_ok=True)
    cells, own = Bars(lambda _: show()), Bars(lambda _: show())

    def show() -> None:
        tell(f"{cells.text} · {own.text}" if own.text else cells.text)

    with _own_kernel(), warnings.catch_warnings():
        # papermill and its libraries warn about their own use of each other.
        warnings.simplefilter("ignore")
        import papermill
        from papermill.exceptions import PapermillExecutionError

        try:
            papermill.execute_notebook(
                _plain_path(notebook),
                _plain_path(partial),
                parameters=dict(parameters),
                kernel_name=_KERNEL,
                language="python",
                start_timeout=_START_TIMEOUT,
                cwd=str(notebook.parent),
                progress_bar={"file": cells, "bar_format": "cell {n_fmt} of {total_fmt}", "mininterval": 0},
                stderr_file=own,
            )
            partial.replace(executed)
        except PapermillExecutionError as error:
            if error.ename == "KeyboardInterrupt":
                raise KeyboardInterrupt from None
            partial.replace(executed)
            raise NotebookError(
                f"{name}, cell In[{error.exec_count}]: {error.ename}: {error.evalue}\n\n"
                f"{_indented(error.source)}\n\nThe notebook as far as it came: {executed}"
            ) from error
        except OSError:
            raise
        except Exception as error:  # the kernel did not start, or died (out of memory, say)
            if partial.is_file():
                partial.replace(executed)
            raise NotebookError(
                f"{name}: {type(error).__name__}: {error}\n\nThe notebook as far as it came: {executed}"
            ) from error
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def executing_in(jobs: int, board: Board) -> Iterator[Execute]:
    """`execute`, in this process or in one of `jobs` others: papermill is not made for threads.

    What notebooks in other processes tell goes to `board`.
    """
    if jobs == 1:
        yield execute
        return
    spawn = get_context("spawn")
    told = spawn.SimpleQueue()

    def listen() -> None:
        while (found := told.get()) is not None:
            board.tell(*found)

    listener = Thread(target=listen, daemon=True)
    listener.start()
    try:
        with ProcessPoolExecutor(jobs, spawn, initializer=_begin, initargs=(jobs, told)) as pool:
            yield lambda notebook, parameters, executed, _: pool.submit(
                _execute_there, notebook, dict(parameters), executed
            ).result()
    finally:
        told.put(None)
        listener.join()


_told: Any = None


def _begin(jobs: int, told: Any) -> None:
    """First act of a process that runs notebooks."""
    global _told
    _told = told
    share_cores(jobs)


def _execute_there(notebook: Path, parameters: Mapping[str, Any], executed: Path) -> None:
    execute(notebook, parameters, executed, lambda text: _told.put((notebook.stem, text)))


@contextmanager
def _own_kernel() -> Iterator[None]:
    """A kernel that is this Python for certain: an installed `python3` kernel may be another one."""
    # -P: no file beside the notebook takes the place of a module that the kernel starts with.
    module = [sys.executable, "-P", "-m", "asi_lens.reproduce.kernel"]
    spec = {
        # Without the level every start warns of TCP on this machine alone.
        "argv": [*module, "-f", "{connection_file}", "--log-level=ERROR"],
        "display_name": "asi_lens run",
        "language": "python",
        "env": {name: os.environ.get(name, size) for name, size in _KEPT.items()},
    }
    before = os.environ.get("JUPYTER_PATH")
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder, "kernels", _KERNEL)
        kernel.mkdir(parents=True)
        (kernel / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")
        os.environ["JUPYTER_PATH"] = os.pathsep.join([folder, *([before] if before else [])])
        try:
            yield
        finally:
            if before is None:
                del os.environ["JUPYTER_PATH"]
            else:
                os.environ["JUPYTER_PATH"] = before


def _plain_path(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill formats its paths


def _indented(source: str) -> str:
    return "\n".join(f"    {line}" for line in source.splitlines())
