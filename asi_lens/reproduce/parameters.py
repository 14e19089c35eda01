"""Parameters of a notebook: its defaults, overridden by the profile's, the model's, and the command line's.

A profile (`parameters/<profile>.yaml`) has a section `common` for every notebook and a section per notebook.
A model file (`parameters/<model>.yaml`) is flat and holds `model`. A key that a notebook does not have is an
error; papermill would only warn and run with other parameters than requested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asi_lens.base.errors import DataError, OptionError, require, require_known, shown, unknown_name
from asi_lens.base.files import existing, read_yaml_mapping
from asi_lens.base.paths import parameters_dir, project_root
from asi_lens.results.parameters_cell import (
    checked_parameters,
    notebook_defaults,
    notebook_names,
    notebook_path,
)

# Parameters that the runner sets in every notebook.
ALWAYS = ("model", "profile", "output_folder", "seed")
# Keys that `-p` cannot set, since the results' folder is named by them, and what sets them.
_ELSEWHERE = {
    "model": "given as --model",
    "profile": "given as --profile",
    "output_folder": "left out: results lie in figures/<model>/<profile> (papermill takes another folder)",
}
NEEDS = "needs"
"""Key of a profile's file: the device without which its budgets make no sense."""
PAPER = "paper"
GROUPS: dict[str, range] = {PAPER: range(14), "beyond": range(14, 100), "all": range(100)}
"""Groups of notebooks by their numbers: the paper's figures, the figures beyond the paper, all figures."""


def choose(names: Sequence[str] | None) -> list[str]:
    """Return the chosen notebooks as they were named, those of a group in their own order.

    `names` are notebooks' names, numbers such as `01`, or names of `GROUPS`; None is the group `paper`.
    Raises UnknownNameError, and DataError where there are no notebooks (an installed package has none).
    """
    known = notebook_names()
    if not known:
        raise DataError(
            f"there are no notebooks in {project_root()}; run this in a checkout of asi_lens or its sdist, "
            "or name one in ASI_LENS_PROJECT"
        )
    chosen: dict[str, None] = {}
    for name in names or [PAPER]:
        found = [k for k in known if k == name or k.split("_")[0] == name]
        if name in GROUPS:
            found = [k for k in known if (n := k.split("_")[0]).isdigit() and int(n) in GROUPS[name]]
        elif not found:
            raise unknown_name("notebook", name, [*known, *GROUPS])
        chosen |= dict.fromkeys(found)
    return list(chosen)


def profile_names() -> list[str]:
    """Return the names of the parameter files with a section `common`."""
    return sorted(p.stem for p in parameters_dir().glob("*.yaml") if "common" in read_yaml_mapping(p))


def require_machine(profile: str) -> None:
    """Raise OptionError if a profile needs a device (`needs: cuda` in its file) that this machine lacks."""
    path = parameters_dir() / f"{profile}.yaml"
    needed = read_yaml_mapping(path).get(NEEDS) if path.is_file() else None
    require(needed in (None, "cuda"), f"{NEEDS} (in {path.name})", needed, "'cuda', or left out")
    if needed is None:
        return
    import torch

    if not torch.cuda.is_available():
        raise OptionError(
            f"the profile {profile!r} needs a CUDA device, and PyTorch {torch.__version__} finds none here; "
            "'full' is the profile for evidence on a CPU"
        )


def merged_parameters(
    notebook: str, *, model: str, profile: str, output_folder: Path, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return all parameters that a notebook will run with, including its own defaults.

    Files and folders in `given` are sought in the working folder, then beside the notebooks, and told in
    full: notebooks run in another folder.

    Raises UnknownNameError for an unknown profile, section or key, and OptionError for a value of another
    kind than its default, for a `given` key that the runner sets, and for a notebook without a cell tagged
    `parameters` or without one of the keys that the runner sets.
    """
    for key in _ELSEWHERE:
        require(key not in (given or {}), f"-p {key}", (given or {}).get(key), _ELSEWHERE[key])
    defaults = notebook_defaults(notebook)
    missing = [key for key in ALWAYS if key not in defaults]
    if missing:
        raise OptionError(f"{notebook} has no cell tagged `parameters` that sets {', '.join(missing)}")
    files = {path.stem: path for path in parameters_dir().glob("*.yaml")}
    sections = read_yaml_mapping(files[profile]) if profile in files else {}
    if "common" not in sections:
        raise unknown_name("profile", profile, profile_names())
    path = files[profile]
    require_known(sections, ["common", NEEDS, *notebook_names()], f"section of {path.name}")
    model_file = parameters_dir() / f"{model}.yaml"
    # A model given as a path or a hub name has no parameter file.
    of_model = read_yaml_mapping(model_file) if "/" not in model and existing(model_file) else {}
    if not of_model and (there := existing(model)):
        model = str(there.resolve())  # notebooks run in another working folder
    layers = {
        f"{path.name}, common": _section(path, sections, "common"),
        f"{path.name}, {notebook}": _section(path, sections, notebook),
        model_file.name: of_model,
        "the command line": _in_full(dict(given or {}), notebook_path(notebook).parent),
    }
    out = dict(defaults)
    for where, layer in layers.items():
        out |= checked_parameters(notebook, layer, where)
    out |= {"profile": profile, "output_folder": str(output_folder)}
    if "model" not in of_model:
        out["model"] = model
    return out


def _in_full(value: Any, beside: Path) -> Any:
    """Return a value with the whole path of every text that looks like one, and exists here or `beside`."""
    if isinstance(value, Mapping):
        return {key: _in_full(one, beside) for key, one in value.items()}
    if isinstance(value, list):
        return [_in_full(one, beside) for one in value]
    if isinstance(value, str) and ("/" in value or "." in value):
        found = existing(value) or existing(beside / value)
        return value if found is None else str(found.resolve())
    return value


def parse_given(pairs: Sequence[str]) -> dict[str, Any]:
    """Return the `key=value` pairs of the command line, with values read as YAML. Raises OptionError."""
    import yaml

    out = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionError(f"-p {pair!r} is not allowed; write key=value")
        try:
            out[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise OptionError(f"-p {pair!r} is not allowed; the value must be YAML ({error})") from error
    return out


def _section(path: Path, sections: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = sections.get(name) or {}
    if not isinstance(section, dict):
        raise DataError(f"{path.name}, {name} must hold keys and values, not {shown(section)}")
    return section
