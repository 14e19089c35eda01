"""Run one notebook with papermill, in a kernel that is certainly this interpreter."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from asi_lens.base.errors import AsiLensError
from asi_lens.base.threads import share_cores
from asi_lens.reproduce.board import Bars, Board, Tell

Execute = Callable[[Path, Mapping[str, Any], Path, Tell], None]
"""A function that runs a notebook with parameters, writes its executed copy and reports the progress."""

_KERNEL = "asi_lens_run"
_END_SECONDS = 10.0  # that a kernel may take to end after an interrupt
_START_TIMEOUT = 300  # seconds; papermill's default of 60 can be too short on a loaded machine
# glibc returns freed blocks of this size (bytes) to the system, and requests them again in the next layer of
# a pass. With glibc's own limit, the resulting page faults take a tenth of a harvest's time on a CPU. Blocks
# of more than 16 MB go back: glibc rarely finds a kept block again for an aligned one of the same size, so
# that blocks as large as logits would fill the memory within minutes.
_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**24), "MALLOC_TRIM_THRESHOLD_": str(2**28)}


class NotebookError(AsiLensError, RuntimeError):
    """A cell of a notebook failed."""


def execute(
    notebook: Path, parameters: Mapping[str, Any], executed: Path, tell: Tell = lambda text: None
) -> None:
    """Run `notebook` headless with this interpreter and write the executed copy to `executed`.

    `tell` gets a line of text whenever a cell is done or the notebook's progress bar moves. Until the end the
    copy has a temporary name, so that the copy of a stopped run is never mistaken for a complete copy. Raises
    NotebookError (cell, error and the copy's path) if a cell fails or the kernel dies, and KeyboardInterrupt
    if either process is interrupted.
    """
    name = notebook.stem
    partial = executed.with_name(f"{name}.part.ipynb")
    executed.parent.mkdir(parents=True, exist_ok=True)
    cells, own = Bars(lambda _: show()), Bars(lambda _: show())

    def show() -> None:
        tell(f"{cells.text} · {own.text}" if own.text else cells.text)

    with _own_kernel(), warnings.catch_warnings():
        # papermill and its libraries warn about each other; the user cannot act on these warnings.
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
                f"{_indented(error.source)}\n\nThe notebook up to the error: {executed}"
            ) from error
        except OSError:
            raise
        except Exception as error:  # the kernel did not start, or died (e.g. out of memory)
            if partial.is_file():
                partial.replace(executed)
            raise NotebookError(
                f"{name}: {type(error).__name__}: {error}\n\nThe notebook up to the error: {executed}"
            ) from error
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def executing_in(jobs: int, board: Board) -> Iterator[Execute]:
    """Yield `execute`, which runs in this process, or in `jobs` processes, as papermill is not thread-safe.

    Progress of notebooks in other processes is shown on `board`.
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
    """Initialize a process that runs notebooks, and ends with the process that began it."""
    global _told
    _told = told
    share_cores(jobs)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Interrupt the notebook if the parent was killed: it would write into the folder of a later run."""
    parent = parent_process()
    assert parent is not None  # this is a process of the pool
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(_END_SECONDS)
    os._exit(1)


def _execute_there(notebook: Path, parameters: Mapping[str, Any], executed: Path) -> None:
    execute(notebook, parameters, executed, lambda text: _told.put((notebook.stem, text)))


@contextmanager
def _own_kernel() -> Iterator[None]:
    """Make papermill use this Python as the kernel: an installed `python3` kernel may be another Python."""
    # -P: a file beside the notebook cannot replace a module that the kernel imports at its start.
    module = [sys.executable, "-P", "-m", "asi_lens.reproduce.kernel"]
    env = {name: os.environ.get(name, size) for name, size in _KEPT.items()}
    if path := os.environ.get("PYTHONPATH"):  # the kernel starts in the notebook's folder
        env["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    spec = {
        # At other levels every start warns about TCP, which is used only on this machine.
        "argv": [*module, "-f", "{connection_file}", "--log-level=ERROR"],
        "display_name": "asi_lens run",
        "language": "python",
        "env": env,
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
