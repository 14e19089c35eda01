"""The project as a whole: its lists agree, its modules point one way, its notebooks are clean."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import asi_lens

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "asi_lens"
MODULES = sorted(PACKAGE.rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_LINES = {"asi_lens": 350, "tests": 420, "benchmarks": 420}
MAX_FUNCTION_LINES = 80
MAX_NOTEBOOK_LINES = 45  # beside the parameters

# A room imports only from the rooms above it.
ROOMS = (
    "base",  # errors, paths, files, cache, ranks: nothing of ours below it
    "results",  # what a notebook leaves on disk
    "figures",  # a table in, a figure out
    "inputs",  # weights and text
    "activations",  # one pass of the model, and what is kept of it
    "collapse",  # the paper's first half
    "kernels",  # sparse arithmetic; imports nothing of ours
    "training",  # a run of anything that learns by steps
    "sae",  # the paper's second half
    "lorsa",  # the same for attention layers
    "experiments",  # trainings side by side, each done once
    "reproduce",  # runs the notebooks
)
# Beside the rooms: the lazy public names, and short or older names of commands.
DOORS = ("__init__", "__main__", "diagnose", "harvest_run")
# Bound when they are called, so that `save` and `load` are methods: the only circle that stays.
LATE = {("sae.dictionary", "sae.formats")}
OPTIONAL = {"triton": PACKAGE / "kernels" / "triton" / "language.py"}  # comes with PyTorch for NVIDIA cards
# Modules without a test of their name, and the file that tests them.
TESTED_ELSEWHERE = {
    "experiments.held_out": "experiments/test_runs.py",
    "experiments.rows": "experiments/test_runs.py",
    "experiments.run_folders": "experiments/test_runs.py",
    "activations.moments_consumer": "collapse/test_spectra.py",
    "results.beyond_rows": "results/test_beyond_verdicts.py",
    "results.stability_rows": "results/test_stability_verdicts.py",
    "figures.panels": "figures/test_dead_features.py",
    "figures.parts": "figures/test_dead_features.py",
    "figures.style": "figures/test_collapse.py",
    "inputs.gguf_rules": "inputs/test_gguf.py",
    "inputs.hub": "inputs/test_documents.py",
    "inputs.identities": "inputs/test_verify.py",
    "inputs.other_sources": "inputs/test_media.py",
    "inputs.own_tokens": "inputs/test_fingerprint.py",
    "inputs.media_items": "inputs/test_media_inputs.py",
    "inputs.packaged": "inputs/test_sources.py",
    "inputs.passes": "inputs/test_hooks.py",
    "inputs.plain_loading": "inputs/test_plain.py",
    "kernels.draws": "sae/test_dictionary.py",
    "lorsa.contexts": "experiments/test_lorsa_runs.py",
    "lorsa.data": "lorsa/test_train.py",
    "lorsa.heads": "lorsa/test_lorsa.py",
    "results.numbers": "results/test_judging.py",
    "results.trained_rank_rows": "results/test_trained_rank_verdicts.py",
    "reproduce.kernel": "reproduce/test_execute.py",
    "sae.cards": "sae/test_features.py",
    "sae.finite": "sae/test_train.py",
    "sae.passes": "sae/test_train.py",
    "sae.shard": "training/test_mesh.py",
    "sae.transcoder_init": "sae/test_transcoder.py",
    "training.config": "sae/test_train.py",
    "training.learner": "training/test_loop.py",
    "training.metrics": "training/test_checkpoint.py",
    "training.schedule": "sae/test_optim.py",
}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def locked_versions(name: str = "requirements.lock") -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    # Lines with a condition are for other systems and versions of Python.
    pairs = [line.split("==") for line in lines if line and not line.startswith("#") and " ; " not in line]
    return {canonicalize_name(name): version for name, version in pairs}


def declared() -> list[Requirement]:
    extras = [line for lines in project()["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in (*project()["dependencies"], *extras)]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write it out in full"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def own_name(path: Path) -> str:
    """`inputs.models` for asi_lens/inputs/models.py, `inputs` for its `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def edges() -> Iterator[tuple[str, str, str]]:
    """(module, module of ours that it imports, where), imports inside functions too."""
    names = {own_name(path) for path in MODULES}
    for path in MODULES:
        for line, target in imported(ast.parse(path.read_text(encoding="utf-8"))):
            first, _, rest = target.partition(".")
            if first != "asi_lens" or rest == "__version__":
                continue
            found = next((name for name in (rest, rest.rpartition(".")[0]) if name in names), None)
            assert found, f"{path.name}:{line} imports {target}; import from the module that has it"
            yield own_name(path), found, f"{path.relative_to(ROOT)}:{line}"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


# --- versions ---------------------------------------------------------------------------------------


def test_the_lock_pins_every_declared_dependency_within_its_bounds() -> None:
    locked = locked_versions()
    for requirement in declared():
        version = locked.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in requirements.lock"
        assert requirement.specifier.contains(version), f"{requirement} but the lock has {version}"


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-tl4.txt"])
def test_the_lock_suits_any_machine(name: str) -> None:
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        pin = r'[A-Za-z0-9._-]+==[0-9][0-9a-z.]*( ; (python_version|sys_platform) == "[a-z0-9.]+")?'
        assert re.fullmatch(rf"#.*|{pin}", line), f"no plain pin: {line!r}"
    # Builds for one vendor's cards come with torch where they fit; here they would break other machines.
    vendors = re.compile(r"nvidia-|cuda-|triton|pywin|appnope")
    assert not [package for package in locked_versions(name) if vendors.match(package)]


def test_the_lock_suits_the_oldest_python_that_is_promised() -> None:
    oldest = project()["requires-python"].removeprefix(">=") + ".0"
    for name, version in locked_versions().items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the second environment has fewer packages
        if found.version.partition("+")[0] == version:
            needs = Requirement(f"python{found.metadata['Requires-Python'] or ''}").specifier
            assert needs.contains(oldest), f"{name}=={version} needs Python {needs}"


def test_notebooks_start_without_compiling_grammars() -> None:
    # jsonschema 4.24 and later import it if it is there: 3 s in every kernel, before the first figure shows.
    assert "rfc3987-syntax" not in locked_versions()


def test_the_other_environments_differ_by_what_they_are_for() -> None:
    second = locked_versions("requirements-tl4.txt")
    assert locked_versions()["transformer-lens"].startswith("3.5.")
    assert [*second, *locked_versions("requirements-triton.txt")] == ["transformer-lens", "triton"]
    assert second["transformer-lens"].startswith("4.")


def test_conda_environment_equals_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    # pip reads the lock itself, so nothing else may pin: neither conda packages nor more pip lines.
    assert pip == ["-r requirements.lock", "-e ."]
    assert [re.split("[=<>]", entry)[0] for entry in conda] == ["python", "pip"]
    assert environment["name"] == project()["name"]
    version = conda[0].removeprefix("python=")
    assert Requirement(f"python{project()['requires-python']}").specifier.contains(version)


def test_every_import_is_declared() -> None:
    names = {canonicalize_name(requirement.name) for requirement in declared()}
    distributions = importlib.metadata.packages_distributions()
    for path in MODULES:
        for line, name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "asi_lens" or path == OPTIONAL.get(top):
                continue
            offered = {canonicalize_name(distribution) for distribution in distributions.get(top, [])}
            assert offered & names, f"{path.name}:{line} imports {top}, which pyproject.toml does not declare"


def test_every_dependency_is_imported() -> None:
    tops = {
        name.split(".")[0] for path in MODULES for _, name in imported(ast.parse(path.read_text("utf-8")))
    }
    distributions = importlib.metadata.packages_distributions()
    used = {canonicalize_name(found) for top in tops for found in distributions.get(top, [])}
    lines = {canonicalize_name(Requirement(line).name) for line in project()["dependencies"]}
    assert lines - used == set()


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == asi_lens.__version__
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(citation)


def test_changelog_has_this_version() -> None:
    assert Version(asi_lens.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(asi_lens.__version__)}\b", changelog, re.MULTILINE)


# --- modules ----------------------------------------------------------------------------------------


def test_importing_the_package_is_light_and_silent() -> None:
    heavy = ("torch", "transformers", "transformer_lens", "datasets", "plotly", "pandas", "numpy")
    done = python(
        "import sys, asi_lens\n"
        "dir(asi_lens)\n"
        f"heavy = [name for name in {heavy} if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


def test_importing_every_module_opens_no_socket_prints_nothing_and_leaves_the_hubs_alone() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES
    ]
    done = python(
        "import importlib, sys\n"
        "def watch(event, arguments):\n"
        "    if event.startswith(('socket.connect', 'socket.getaddrinfo', 'subprocess.Popen')):\n"
        "        raise RuntimeError(f'{event} {arguments} at import')\n"
        "sys.addaudithook(watch)\n"
        f"for name in {[name for name in names if not name.endswith('__main__')]}:\n"
        "    importlib.import_module(name)\n"
        "slow = [n for n in ('transformers', 'transformer_lens', 'datasets') if n in sys.modules]\n"
        "assert not slow, f'{slow} should be imported inside functions'"
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("name", [name for name in asi_lens.__all__ if name != "__version__"])
def test_public_name_exists(name: str) -> None:
    assert getattr(asi_lens, name) is not None
    assert name in dir(asi_lens)


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = asi_lens.no_such_name


def test_every_module_stands_in_a_room() -> None:
    found = {own_name(path).split(".")[0] for path in MODULES}
    assert found == {*ROOMS, *DOORS}


def test_rooms_import_in_one_direction() -> None:
    for name, other, where in edges():
        if name in DOORS:
            continue
        mine, theirs = (ROOMS.index(module.split(".")[0]) for module in (name, other))
        assert theirs <= mine, f"{where}: {name} imports {other}, which is in a room below"
        if mine == ROOMS.index("kernels"):
            assert theirs == mine, f"{where}: kernels import nothing of ours, not {other}"


def test_no_room_has_a_circle() -> None:
    graph: dict[str, set[str]] = {own_name(path): set() for path in MODULES}
    for name, other, _ in edges():
        if (name, other) not in LATE:
            graph[name].add(other)
    while free := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in free}
    assert not graph, f"a circle is among {sorted(graph)}"


def test_every_module_has_a_test_of_its_name() -> None:
    for path in MODULES:
        name = own_name(path)
        room, _, module = name.rpartition(".")
        if not room or path.name == "__init__.py":
            continue
        own = ROOT / "tests" / room.replace(".", "/") / f"test_{module.strip('_')}.py"
        if name in TESTED_ELSEWHERE:
            assert not own.exists(), f"{name} has a test of its name; take it out of TESTED_ELSEWHERE"
            assert (ROOT / "tests" / TESTED_ELSEWHERE[name]).is_file(), name
        else:
            assert own.is_file(), f"{name} has no {own.relative_to(ROOT)}; write it, or say what tests it"
    assert {own_name(path) for path in MODULES} >= TESTED_ELSEWHERE.keys()


def test_only_the_runner_knows_of_notebooks() -> None:
    for path in MODULES:
        if own_name(path) not in ("base.paths", "results.parameters_cell"):
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert "notebooks_dir" not in names, f"{path.name} reads the notebooks' folder"


@pytest.mark.parametrize("folder", list(MAX_LINES))
def test_source_files_stay_short(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES[folder], f"{path.relative_to(ROOT)} has {lines} lines, more than wanted"


def test_functions_stay_short() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


# --- notebooks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stripped_short_and_parametrized(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    told = "not as Jupyter saves it; open and save it, then `make format`"
    assert path.read_text(encoding="utf-8") == f"{nbformat.writes(notebook)}\n", told
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert ["parameters" in cell.metadata.get("tags", []) for cell in cells].count(True) == 1
    assert [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])] == cells[:1]
    for cell in cells:
        assert not cell.outputs, "outputs are not stripped; `make format` does"
        assert cell.execution_count is None, "execution counts are not stripped; `make format` does"
    lines = [line for cell in cells[1:] for line in cell.source.splitlines()]
    code = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= MAX_NOTEBOOK_LINES, f"{len(code)} lines of code; move some into the package"

    [parameters] = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    for statement in ast.parse(parameters.source).body:
        assert isinstance(statement, ast.Assign | ast.AnnAssign), f"no assignment: {ast.unparse(statement)}"
        assert statement.value is not None
        ast.literal_eval(statement.value)
    for cell in cells:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        defined = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, kinds)]
        assert not defined, f"functions belong in the package: {ast.unparse(defined[0])}"


def test_every_model_and_profile_of_the_makefile_has_parameters() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for variable in ("MODEL", "PROFILE"):
        [default] = re.findall(rf"^{variable} *\?= (\S+)$", makefile, re.MULTILINE)
        assert (ROOT / "parameters" / f"{default}.yaml").is_file(), f"no parameters for {default}"
