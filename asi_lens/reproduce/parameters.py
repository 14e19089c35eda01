"""Parameters of a notebook: its own defaults, then the profile's, the model's, and those given by hand.

A profile (`parameters/<profile>.yaml`) has a section `common` for every notebook and one per notebook. A
model file (`parameters/<model>.yaml`) is flat and holds `model`. A key that a notebook does not have is an
error: papermill by itself would only warn, and run with something else than was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asi_lens.base.errors import DataError, OptionError, unknown_name
from asi_lens.base.paths import parameters_dir
from asi_lens.results.parameters_cell import notebook_defaults, notebook_names

# What the runner itself sets in every notebook.
ALWAYS = ("model", "profile", "output_folder", "seed")
PAPER = "paper"
GROUPS: dict[str, range] = {PAPER: range(14), "beyond": range(14, 100), "all": range(100)}
"""Groups of notebooks by their numbers: the paper's figures, what goes beyond the paper, both."""


def choose(names: Sequence[str] | None) -> list[str]:
    """The named notebooks in their order. A number such as `01` is enough; a name of `GROUPS` is all of them.

    None is the group `paper`. Raises UnknownNameError.
    """
    known = notebook_names()
    chosen = set()
    for name in names or [PAPER]:
        found = [k for k in known if k == name or k.split("_")[0] == name]
        if name in GROUPS:
            found = [k for k in known if (n := k.split("_")[0]).isdigit() and int(n) in GROUPS[name]]
        elif not found:
            raise unknown_name("notebook", name, [*known, *GROUPS])
        chosen.update(found)
    return [k for k in known if k in chosen]


def profile_names() -> list[str]:
    """Parameter files with a section `common`."""
    return sorted(p.stem for p in parameters_dir().glob("*.yaml") if "common" in _read(p))


def merged_parameters(
    notebook: str, *, model: str, profile: str, output_folder: Path, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """All parameters that a notebook will run with, its own defaults included.

    Raises UnknownNameError for a profile, a section or a key that does not exist, OptionError for a
    notebook without a cell tagged `parameters` or without one of the keys that the runner sets.
    """
    defaults = notebook_defaults(notebook)
    missing = [key for key in ALWAYS if key not in defaults]
    if missing:
        raise OptionError(f"{notebook}: no cell tagged `parameters` that sets {', '.join(missing)}")
    path = parameters_dir() / f"{profile}.yaml"
    if profile not in profile_names():
        raise unknown_name("profile", profile, profile_names())
    sections = _read(path)
    for section in sections:
        if section != "common" and section not in notebook_names():
            raise unknown_name(f"section of {path.name}", section, ["common", *notebook_names()])
    model_file = parameters_dir() / f"{model}.yaml"
    # A model may be a path or a hub name: those have no file here.
    of_model = _read(model_file) if "/" not in model and model_file.is_file() else {}
    if not of_model and Path(model).expanduser().exists():
        model = str(Path(model).expanduser().resolve())  # notebooks run in a folder of their own
    layers = {
        f"{path.name}, common": sections.get("common") or {},
        f"{path.name}, {notebook}": sections.get(notebook) or {},
        model_file.name: of_model,
        "the command line": dict(given or {}),
    }
    out = dict(defaults)
    for where, layer in layers.items():
        for key, value in layer.items():
            if key not in defaults:
                raise unknown_name(f"parameter of {notebook} (in {where})", key, defaults)
            out[key] = value
    out |= {"profile": profile, "output_folder": str(output_folder)}
    if "model" not in of_model and "model" not in (given or {}):
        out["model"] = model
    return out


def parse_given(pairs: Sequence[str]) -> dict[str, Any]:
    """`key=value` from the command line, values read as YAML. Raises OptionError."""
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


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold keys and values")
    return content
