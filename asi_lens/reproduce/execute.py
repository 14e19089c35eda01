"""Run one notebook with papermill, in a kernel that is this interpreter for certain."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asi_lens.base.errors import AsiLensError

_KERNEL = "asi_lens_run"
_START_TIMEOUT = 300  # seconds; papermill's 60 can trip on a loaded machine
# glibc gives freed memory of this size (bytes) back to the system, to ask for it again in the next layer of a
# pass: a tenth of a harvest's time on a CPU is page faults.
_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**28), "MALLOC_TRIM_THRESHOLD_": str(2**28)}


class NotebookError(AsiLensError, RuntimeError):
    """A cell of a notebook failed."""


def execute(notebook: Path, parameters: Mapping[str, Any], executed: Path) -> None:
    """Run `notebook` headless with this interpreter and leave the executed copy at `executed`.

    Until the end the copy has a temporary name, so that the one of a run that was stopped is never taken
    for a whole one. Raises NotebookError (cell, error and the copy's path) when a cell fails or the kernel
    dies, KeyboardInterrupt when either process is interrupted.
    """
    name = notebook.stem
    partial = executed.with_name(f"{name}.part.ipynb")
    executed.parent.mkdir(parents=True, exist_ok=True)
    with _own_kernel(), _kernel_bars() as bars, warnings.catch_warnings():
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
                progress_bar={"desc": f"  {name}", "leave": False, "disable": None},
                stderr_file=bars,
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


class _KernelBars(io.TextIOBase):
    """Shows the notebook's own progress bars (its stderr) on one line below papermill's."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._line = tqdm(total=0, position=1, bar_format="{desc}", leave=False)

    def write(self, text: str) -> int:
        last = [part for part in text.replace("\r", "\n").split("\n") if part.strip()][-1:]
        if last:
            self._line.set_description_str(last[0][: self._line.ncols or 100])
        return len(text)

    def close(self) -> None:
        self._line.close()
        super().close()


@contextmanager
def _kernel_bars() -> Iterator[_KernelBars | None]:
    """The bars where somebody watches; nothing in a log."""
    if not sys.stderr.isatty():
        yield None
        return
    bars = _KernelBars()
    try:
        yield bars
    finally:
        bars.close()


def _plain_path(path: Path) -> str:
    return str(path).replace("{", "{{").replace("}", "}}")  # papermill formats its paths


def _indented(source: str) -> str:
    return "\n".join(f"    {line}" for line in source.splitlines())
