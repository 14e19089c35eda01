"""One notebook in a real kernel: its parameters, its failure, its interruption."""

from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs

from asi_lens.reproduce.execute import NotebookError, execute

pytestmark = pytest.mark.notebooks

PARAMETERS = {"model": "given", "seed": 7}


def sources(path: Path) -> str:
    return "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])


def test_the_kernel_is_this_interpreter_and_gets_the_parameters(tmp_path: Path) -> None:
    # Braces in a folder's name would be taken for a template by papermill.
    folder = tmp_path / "a {folder}"
    path = runs.notebook(
        folder / "01_alpha.ipynb",
        "import sys, json, os\n"
        "told = [sys.executable, model, seed, os.getcwd()]\n"
        "open('told.json', 'w').write(json.dumps(told))",
    )
    before = os.environ.get("JUPYTER_PATH")
    executed = folder / "out" / "01_alpha.ipynb"
    execute(path, PARAMETERS, executed)
    assert json.loads((folder / "told.json").read_text()) == [sys.executable, "given", 7, str(folder)]
    assert [p.name for p in executed.parent.iterdir()] == ["01_alpha.ipynb"]
    assert os.environ.get("JUPYTER_PATH") == before


def test_a_file_beside_the_notebook_is_there_for_its_cells_alone(tmp_path: Path) -> None:
    path = runs.notebook(tmp_path / "01_alpha.ipynb", "import helper; open(helper.NAME, 'w')")
    (tmp_path / "helper.py").write_text("NAME = 'found'")
    (tmp_path / "ipykernel.py").write_text("raise SystemExit('not the kernel')")
    execute(path, PARAMETERS, tmp_path / "out" / "01_alpha.ipynb")
    assert (tmp_path / "found").exists()


def test_relative_paths_of_modules_stay_those_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = runs.notebook(tmp_path / "notebooks" / "01_alpha.ipynb", "import helper; open(helper.NAME, 'w')")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "helper.py").write_text("NAME = 'found'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["mine", os.environ.get("PYTHONPATH", "")]))
    execute(path, PARAMETERS, tmp_path / "out" / "01_alpha.ipynb")
    assert (tmp_path / "notebooks" / "found").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_a_kernel_keeps_freed_memory_for_what_comes_next(tmp_path: Path) -> None:
    path = runs.notebook(
        tmp_path / "01_alpha.ipynb",
        "import json, resource\n"
        "faults = []\n"
        "for _ in range(5):\n"
        "    b'x' * 2**23\n"
        "    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
        "json.dump(faults, open('faults.json', 'w'))",
    )
    execute(path, PARAMETERS, tmp_path / "out" / "01_alpha.ipynb")
    faults = json.loads((tmp_path / "faults.json").read_text())
    assert faults[-1] - faults[0] < 2**23 / resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_large_blocks_are_given_back(tmp_path: Path) -> None:
    """Aligned blocks with small ones among them: what glibc kept is too small for the next of that size."""
    path = runs.notebook(
        tmp_path / "01_alpha.ipynb",
        "import torch\n"
        "n, kept = 2**23, []\n"
        "for i in range(12):\n"
        "    first = torch.ones(n)\n"
        "    for j in range(4):\n"
        "        second = torch.ones(n).neg()\n"
        "        kept.append(second[:2].sum())\n"
        "        third = torch.ones(n + 5000 * (4 * i + j))\n"
        "        del second, third\n"
        "    del first\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "open('kib.txt', 'w').write(next(line.split()[1] for line in lines if line.startswith('RssAnon')))",
    )
    execute(path, PARAMETERS, tmp_path / "out" / "01_alpha.ipynb")
    # At most three blocks of 32 MiB live at once; a kernel itself takes some 150 MiB.
    assert int((tmp_path / "kib.txt").read_text()) < 600 * 2**10


def test_a_failing_cell_is_told_and_the_executed_copy_kept(tmp_path: Path) -> None:
    path = runs.notebook(
        tmp_path / "01_alpha.ipynb", "fine = 1", "wrong = fine / (seed - 7)\n", "open('never', 'w')"
    )
    executed = tmp_path / "out" / "01_alpha.ipynb"
    with pytest.raises(NotebookError) as caught:
        execute(path, PARAMETERS, executed)
    told = str(caught.value)
    assert "01_alpha, cell In[4]: ZeroDivisionError: division by zero" in told
    assert "    wrong = fine / (seed - 7)" in told
    assert str(executed) in told
    assert "ZeroDivisionError" in executed.read_text()
    assert [p.name for p in executed.parent.iterdir()] == ["01_alpha.ipynb"]
    assert not (tmp_path / "never").exists()


def test_a_kernel_that_dies_is_told(tmp_path: Path) -> None:
    path = runs.notebook(tmp_path / "01_alpha.ipynb", "import os\nos._exit(9)")
    with pytest.raises(NotebookError, match=r"01_alpha: DeadKernelError"):
        execute(path, PARAMETERS, tmp_path / "out" / "01_alpha.ipynb")


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by whatever runs in the background
from pathlib import Path
from asi_lens.reproduce.execute import execute
try:
    execute(Path(sys.argv[1]), {}, Path(sys.argv[2]))
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_ends_the_kernel_and_leaves_no_half_copy(tmp_path: Path) -> None:
    path = runs.notebook(
        tmp_path / "01_alpha.ipynb",
        "import os, time\nopen('pid.part', 'w').write(str(os.getpid()))\nos.rename('pid.part', 'pid')",
        "time.sleep(120)",
    )
    executed = tmp_path / "out" / "01_alpha.ipynb"
    executed.parent.mkdir()
    executed.write_text("of an earlier run")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), str(executed)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: (tmp_path / "pid").exists() or process.poll() is not None)
        kernel = int((tmp_path / "pid").read_text())
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, told
    assert executed.read_text() == "of an earlier run"
    assert [p.name for p in executed.parent.iterdir()] == ["01_alpha.ipynb"]
    wait_for(lambda: not running(kernel))


SIDE_BY_SIDE = """
import sys
from pathlib import Path
from asi_lens.reproduce.board import Board
from asi_lens.reproduce.execute import executing_in
if __name__ == "__main__":
    with executing_in(2, Board({"01_alpha": None})) as execute:
        execute(Path(sys.argv[1]), {}, Path(sys.argv[2]), print)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_notebooks_end_with_the_run_that_began_them(tmp_path: Path) -> None:
    """They had written into the folder of a later run."""
    path = runs.notebook(
        tmp_path / "01_alpha.ipynb",
        "import os, time\nopen('pid.part', 'w').write(f'{os.getpid()} {os.getppid()}')\n"
        "os.rename('pid.part', 'pid')",
        "time.sleep(120)",
        "open('later', 'w').close()",
    )
    script = tmp_path / "side_by_side.py"
    script.write_text(SIDE_BY_SIDE)
    process = subprocess.Popen([sys.executable, str(script), str(path), str(tmp_path / "out" / "a.ipynb")])
    try:
        wait_for(lambda: (tmp_path / "pid").exists() or process.poll() is not None)
    finally:
        process.kill()
    process.wait()
    for pid in (tmp_path / "pid").read_text().split():
        wait_for(lambda pid=int(pid): not running(pid))
    assert not (tmp_path / "later").exists()


def wait_for(condition: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # an orphan that nobody has reaped is not running
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
