"""The cell of a notebook that defines its parameters: names and literal defaults."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from asi_lens.base.errors import OptionError, unknown_name
from asi_lens.base.paths import notebooks_dir


def notebook_names() -> list[str]:
    """Return the names of all notebooks, in the order of their numbers."""
    return sorted(path.stem for path in notebooks_dir().glob("[0-9]*.ipynb"))


def notebook_path(notebook: str) -> Path:
    """Return the path of a notebook's source. Raises UnknownNameError."""
    path = notebooks_dir() / f"{notebook}.ipynb"
    if not path.is_file():
        raise unknown_name("notebook", notebook, notebook_names())
    return path


def notebook_defaults(notebook: str) -> dict[str, Any]:
    """Return a notebook's parameters and their defaults, from its cell tagged `parameters`.

    Raises UnknownNameError for an unknown notebook, and OptionError for a default that is not a literal.
    """
    import papermill

    out = {}
    for key, found in papermill.inspect_notebook(str(notebook_path(notebook))).items():
        try:
            out[key] = ast.literal_eval(found["default"])
        except (ValueError, SyntaxError) as error:
            raise OptionError(
                f"{notebook}: the default of {key} is no literal: {found['default']}"
            ) from error
    return out
