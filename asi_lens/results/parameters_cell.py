"""The cell of a notebook that defines its parameters: names and literal defaults."""

from __future__ import annotations

import ast
import json
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

    Raises UnknownNameError for an unknown notebook, and OptionError for a line that is not `name = literal`.
    """
    # papermill.inspect_notebook would do the same, but its import takes 0.2 s in every kernel.
    cells = json.loads(notebook_path(notebook).read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    out = {}
    for line in ast.parse("".join(tagged[0]["source"]) if tagged else "").body:
        match line:
            case ast.Assign([ast.Name(key)], value) | ast.AnnAssign(ast.Name(key), _, ast.expr() as value):
                pass
            case _:
                raise OptionError(f"{notebook}: `{ast.unparse(line)}` does not set a parameter")
        try:
            out[key] = ast.literal_eval(value)
        except ValueError as error:
            told = ast.unparse(value)
            raise OptionError(f"{notebook}: the default of {key} is not a literal: {told}") from error
    return out
