"""The runner: what runs again, what does not, and what stands after a failure."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
import runs
import yaml

from asi_lens.base.errors import UnknownNameError
from asi_lens.reproduce import __main__ as reproduce
from asi_lens.reproduce import execute, staleness
from asi_lens.reproduce.board import Board, Tell
from asi_lens.reproduce.execute import NotebookError
from asi_lens.results import drawing, provenance
from asi_lens.results.claims import CLAIMS_FILE, ClaimRow
from asi_lens.results.sidecar import figures_of, read_sidecar, write_sidecar
from asi_lens.results.tables import read_rows


class Runner:
    """Executes notebooks in this process, which is quick, and remembers which."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ran: list[str] = []

    def execute(self, notebook: Path, parameters: Mapping[str, Any], executed: Path, tell: Tell) -> None:
        self.ran.append(notebook.stem)
        cells = [c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
        names: dict[str, Any] = {}
        exec(cells[0], names)
        names.update(parameters)
        for number, cell in enumerate(cells[1:], start=3):
            try:
                exec(cell, names)
            except Exception as error:
                raise NotebookError(f"{notebook.stem}, cell In[{number}]: {error!r}\n{executed}") from error

    def __call__(self, *arguments: str) -> list[str]:
        """Run the command line for the tiny model; returns the notebooks that ran."""
        self.ran = []
        code = reproduce.main(["--model", "tiny", *arguments])
        self.code = code
        return self.ran

    @property
    def folder(self) -> Path:
        return self.root / "figures" / "tiny" / "quick"

    def notebook(self, name: str, *cells: str, x: int = 1) -> None:
        path = self.root / "notebooks" / f"{name}.ipynb"
        write, done = runs.WRITE.format(stem=name), runs.DONE.format(stem=name)
        runs.notebook(path, write, *cells, done, parameters=runs.PARAMETERS + f"x = {x}\nranks = [1]\n")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    monkeypatch.delenv("ASI_LENS_FIGURES", raising=False)
    runs.project(tmp_path)
    runner = Runner(tmp_path)
    monkeypatch.setattr(execute, "execute", runner.execute)
    return runner


def test_a_profile_for_another_machine_is_refused_before_anything_runs(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (runner.root / "parameters" / "gpu.yaml").write_text("needs: cuda\ncommon: {}\n")
    assert runner("--profile", "gpu") == []
    assert runner.code == 1
    assert "stopped: the profile 'gpu' needs a CUDA device" in capsys.readouterr().err
    assert not (runner.root / "figures").exists()


def test_a_second_run_does_nothing(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner() == ["01_alpha", "02_beta"]
    assert runner.code == 0
    told = capsys.readouterr().out
    assert "01_alpha: running (not run yet)" in told
    assert "[2/2] 02_beta: done in" in told
    assert f"gallery: {runner.root / 'figures' / 'index.html'}" in told
    assert (runner.root / "figures" / "index.html").is_file()

    def stamps() -> dict[Path, int]:
        joined = ("lock", "run.json")  # the record of all notebooks is written in every run
        files = [p for p in runner.folder.rglob("*") if not any(part in p.name for part in joined)]
        return {p: p.stat().st_mtime_ns for p in files}

    before = stamps()
    assert runner() == []
    assert capsys.readouterr().out.count("up to date") == 2
    assert stamps() == before


def test_only_what_changed_runs_again_and_the_reason_is_told(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner()
    runner.notebook("02_beta", "restyled = True", x=2)
    assert runner() == ["02_beta"]
    assert "02_beta: running (changed: the notebook)" in capsys.readouterr().out
    assert runner("-p", "seed=9") == ["01_alpha", "02_beta"]
    assert "changed: its parameters" in capsys.readouterr().out
    assert runner("-p", "seed=9") == []


def test_prose_outputs_and_metadata_run_nothing(runner: Runner) -> None:
    runner()
    path = runner.root / "notebooks" / "02_beta.ipynb"
    node = nbformat.read(path, 4)
    node.cells[0].source = "# Other words"
    node.cells[1].outputs = [nbformat.v4.new_output("stream", text="1")]
    node.metadata["kernelspec"]["name"] = "another"
    nbformat.write(node, path)
    assert runner() == []


def test_a_profile_changes_only_the_notebooks_it_names(runner: Runner) -> None:
    runner()
    path = runner.root / "parameters" / "quick.yaml"
    path.write_text(yaml.safe_dump({"common": {"seed": 1}, "02_beta": {"ranks": [4]}}))
    assert runner() == ["02_beta"]


@pytest.mark.parametrize("suffix", [".csv", ".html"])
def test_an_output_that_is_gone_or_changed_is_made_again(
    runner: Runner, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runner()
    path = runner.folder / f"01_alpha{suffix}"
    path.unlink()
    assert runner() == ["01_alpha"]
    assert f"01_alpha{suffix} is gone" in capsys.readouterr().out
    path.write_text("edited by hand")
    assert runner() == ["01_alpha"]
    assert f"01_alpha{suffix} was changed" in capsys.readouterr().out
    assert path.read_text() != "edited by hand"


def test_a_change_of_the_package_or_of_a_library_runs_all(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runner()
    monkeypatch.setattr(provenance, "versions", lambda: {"plotly": "99"})
    assert runner() == ["01_alpha", "02_beta"]
    assert "changed: installed versions" in capsys.readouterr().out
    real = staleness.sha256_of
    for new in (["collapse.py"], ["collapse.py", "figure.html"]):
        monkeypatch.setattr(staleness, "sha256_of", lambda p, new=new: "new" if p.name in new else real(p))
        assert runner() == ["01_alpha", "02_beta"]
        assert "changed: the package" in capsys.readouterr().out
    # The runner and the gallery make no numbers and no figures.
    new = ["collapse.py", "figure.html", "gallery.py"]
    monkeypatch.setattr(staleness, "sha256_of", lambda p: "new" if p.name in new else real(p))
    assert runner() == []


def test_it_can_be_forced_and_chosen(runner: Runner) -> None:
    runner()
    assert runner("--force", "--notebooks", "02") == ["02_beta"]
    assert runner("--notebooks", "01_alpha,02_beta") == []


def test_it_stops_at_the_first_failure_and_goes_on_from_there(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.notebook("02_beta", "raise ValueError('broken')")
    runner.notebook("03_gamma")
    assert runner() == ["01_alpha", "02_beta"]
    assert runner.code == 1
    told = capsys.readouterr()
    assert "stopped: 02_beta, cell In[4]: ValueError('broken')" in told.err
    assert str(runner.folder / ".executed" / "02_beta.ipynb") in told.err
    runner.notebook("02_beta")
    assert runner() == ["02_beta", "03_gamma"]
    assert runner.code == 0


def test_ctrl_c_leaves_a_state_to_go_on_from(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    runner.notebook("02_beta", runs.CLAIM.format(claim="C2"), "raise KeyboardInterrupt")
    assert runner() == ["01_alpha", "02_beta"]
    assert runner.code == 130
    assert "continues from here" in capsys.readouterr().err
    json.loads((runner.folder / ".state.json").read_text())
    runner.notebook("02_beta", runs.CLAIM.format(claim="C2"))
    assert runner() == ["02_beta"]
    assert not [p for p in runner.folder.iterdir() if p.name.startswith(".0")], "no temporary file is left"


def test_bad_parameters_are_told_before_anything_runs(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner("-p", "rnaks=[1]") == []
    assert runner.code == 1
    assert "unknown parameter of 01_alpha" in capsys.readouterr().err
    runs.notebook(runner.root / "notebooks" / "03_gamma.ipynb", "x = 1", tag=False)
    assert runner() == []
    assert "no cell tagged `parameters`" in capsys.readouterr().err
    assert runner("--profile", "qick") == []
    assert "did you mean 'quick'" in capsys.readouterr().err
    assert not (runner.root / "figures").exists()
    with pytest.raises(UnknownNameError):
        reproduce.reproduce("tiny", "quick", ["7"])


def test_what_a_notebook_no_longer_makes_goes(runner: Runner) -> None:
    extra = "(folder / '01_old.csv').write_text('x')\n(folder / '01_old.html').write_text('page')\n"
    extra += "tables.append('01_old')\n"
    claims = runs.CLAIM.format(claim="C1") + runs.CLAIM.format(claim="C4")
    runner.notebook(
        "01_alpha", extra, runs.FIGURE.format(stem="01_old"), runs.FIGURE.format(stem="01_alpha"), claims
    )
    runner()
    assert (runner.folder / "01_old.csv").exists()
    runner.notebook("01_alpha", runs.FIGURE.format(stem="01_alpha"), runs.CLAIM.format(claim="C1"))
    runner()
    assert not list(runner.folder.glob("01_old.*"))
    assert list(figures_of(runner.folder)) == ["01_alpha", "02_beta"]
    assert [row.claim for row in read_rows(runner.folder / CLAIMS_FILE, ClaimRow)] == ["C1"]
    assert (runner.folder / "02_beta.csv").exists(), "another notebook's files stay"


def test_a_failure_keeps_what_an_earlier_run_left(runner: Runner) -> None:
    claims = runs.CLAIM.format(claim="C1") + runs.CLAIM.format(claim="C4")
    runner.notebook("01_alpha", claims, x=5)
    runner()
    table = (runner.folder / "01_alpha.csv").read_text()
    path = runner.root / "notebooks" / "01_alpha.ipynb"
    runs.notebook(path, "raise ValueError", parameters=runs.PARAMETERS + "x = 6\n")
    runner()
    assert runner.code == 1
    assert (runner.folder / "01_alpha.csv").read_text() == table
    assert [(row.claim, row.our_value) for row in read_rows(runner.folder / CLAIMS_FILE, ClaimRow)] == [
        ("C1", "n 5"),
        ("C4", "n 5"),
    ]


def test_an_edited_record_is_made_again(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    runner.notebook("01_alpha", runs.CLAIM.format(claim="C1"))
    runner()
    found = read_sidecar(runner.folder, "01_alpha")
    assert found is not None
    found["verdicts"][0]["verdict"] = "not supported"
    write_sidecar(runner.folder, found)
    assert runner() == ["01_alpha"]
    assert "01_alpha.json was changed" in capsys.readouterr().out
    (runner.folder / "claims.csv").write_text("edited by hand")
    assert runner() == []
    assert [row.verdict for row in read_rows(runner.folder / CLAIMS_FILE, ClaimRow)] == ["supported"]


def test_a_notebook_without_a_record_is_an_error(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    path = runner.root / "notebooks" / "01_alpha.ipynb"
    runs.notebook(path, "y = 1", parameters=runs.PARAMETERS + "x = 6\n")
    assert runner() == ["01_alpha"]
    assert "its last cell must be `page.done()`" in capsys.readouterr().err


def test_the_gallery_is_there_after_every_notebook(runner: Runner) -> None:
    runner.notebook("02_beta", "raise ValueError('broken')")
    runner()
    assert runner.code == 1
    text = (runner.root / "figures" / "index.html").read_text()
    assert "01_alpha.json" in text


def test_missing_images_are_told_loudly_and_drawn_once_there_is_a_chrome(
    runner: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "chrome_or_reason", lambda: (None, "no Chrome"))
    draw = (
        "from asi_lens.results.drawing import draw\n"
        "reason = draw({'data': [], 'layout': {'width': 9, 'height': 9}}, folder / '01_alpha.png')\n"
        "figures['01_alpha'] |= {'png': False, 'reason': reason}\n"
    )
    runner.notebook("01_alpha", draw)
    runner()
    told = capsys.readouterr().err
    assert "1 PNG(s) ARE MISSING: 01_alpha" in told
    assert "no Chrome" in told
    assert runner() == []
    assert "MISSING" in capsys.readouterr().err

    monkeypatch.setattr(drawing, "chrome_or_reason", lambda: ("/usr/bin/chrome", ""))
    monkeypatch.setattr(drawing, "_image", lambda figure, chrome: b"png")
    assert reproduce.main(["--model", "tiny", "--draw"]) == 0
    assert "MISSING" not in capsys.readouterr().err
    assert (runner.folder / "01_alpha.png").read_bytes() == b"png"
    assert figures_of(runner.folder)["01_alpha"]["png"] is True
    assert runner() == [], "drawing an image makes nothing out of date"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"01_alpha": 1}', '{"01_alpha": {"key": "old"}}'])
def test_a_damaged_state_runs_again(runner: Runner, text: str) -> None:
    runner()
    (runner.folder / ".state.json").write_text(text)
    assert runner() == ["01_alpha", "02_beta"]
    assert runner() == []


def test_the_longest_time_under_the_same_parameters_is_kept(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(seconds: float, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(Board, "finished", lambda self, name: seconds)
        runner("--force", "--notebooks", "01", *arguments)
        return json.loads((runner.folder / "run.json").read_text())["notebooks"]["01_alpha"]

    assert timed(600.0)["longest_wall_time_s"] == 600
    entry = timed(5.0)
    assert (entry["wall_time_s"], entry["longest_wall_time_s"]) == (5, 600)
    assert timed(7.0, "-p", "x=9")["longest_wall_time_s"] == 7


def _hold(folder: Path, held: Any, done: Any) -> None:
    from filelock import FileLock

    with FileLock(folder / ".reproduce.lock"):
        held.set()
        done.wait(60)


def test_two_runs_in_one_folder_are_refused(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    runner()
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(runner.folder, held, done))
    other.start()
    try:
        assert held.wait(60)
        assert runner("--force") == []
        assert runner.code == 1
        assert f"another run is using {runner.folder}" in capsys.readouterr().err
    finally:
        done.set()
        other.join()
    assert runner("--force") == ["01_alpha", "02_beta"]


@pytest.mark.notebooks
def test_the_command_line_runs_real_notebooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    monkeypatch.delenv("ASI_LENS_FIGURES", raising=False)
    runs.project(tmp_path)
    assert reproduce.main(["--model", "tiny", "--notebooks", "02", "-p", "x=11"]) == 0
    folder = tmp_path / "figures" / "tiny" / "quick"
    assert (folder / "02_beta.csv").read_text() == "x\n11\n"
    assert (folder / ".executed" / "02_beta.ipynb").is_file()
    assert not (folder / "01_alpha.csv").exists()


@pytest.mark.notebooks
def test_notebooks_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASI_LENS_PROJECT", str(tmp_path))
    monkeypatch.delenv("ASI_LENS_FIGURES", raising=False)
    runs.project(tmp_path)
    meet = (
        "import time\n(folder / '{own}.here').touch()\nuntil = time.monotonic() + 120\n"
        "while not (folder / '{other}.here').exists():\n"
        "    assert time.monotonic() < until\n    time.sleep(0.05)\n"
    )
    parameters = runs.PARAMETERS + "x = 1\nranks = [1]\n"
    for name, other, more in (
        ("01_alpha", "02_beta", "raise ValueError('lost')"),
        ("02_beta", "01_alpha", ""),
        ("03_gamma", "", "raise AssertionError"),
    ):
        cells = [runs.WRITE.format(stem=name), *([meet.format(own=name, other=other)] if other else []), more]
        cells.append(runs.DONE.format(stem=name))
        runs.notebook(tmp_path / "notebooks" / f"{name}.ipynb", *cells, parameters=parameters)
    assert reproduce.main(["--model", "tiny", "--jobs", "2"]) == 1
    told = capsys.readouterr()
    assert "01_alpha, cell" in told.err
    assert "ValueError: lost" in told.err
    # The one beside it was let finish; nothing else began, or it was told of as well.
    assert "02_beta: done" in told.out
    folder = tmp_path / "figures" / "tiny" / "quick"
    assert (folder / "02_beta.csv").is_file()
    runs.notebook(
        tmp_path / "notebooks" / "01_alpha.ipynb",
        runs.WRITE.format(stem="01_alpha"),
        runs.DONE.format(stem="01_alpha"),
        parameters=parameters,
    )
    (tmp_path / "notebooks" / "03_gamma.ipynb").unlink()
    assert reproduce.main(["--model", "tiny", "--jobs", "2"]) == 0
    assert "02_beta: up to date" in capsys.readouterr().out


def test_fewer_than_one_at_a_time(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner("--jobs", "0") == []
    assert "jobs=0 is not allowed" in capsys.readouterr().err


def test_what_is_not_there(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("", "/no/such", "./no", "~/no"):
        assert runner("--model", wrong) == []
        assert "hub name, or a folder or file that exists" in capsys.readouterr().err
    assert runner("--draw", "--profile", "quikc") == []
    assert "quikc is not there: no notebook has run" in capsys.readouterr().err
    assert not (runner.root / "figures").exists()
