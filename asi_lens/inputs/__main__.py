"""Check a model before its numbers are used: `python -m asi_lens.inputs MODEL`.

Prints `al.verify`'s table: the model's outputs against the plain Hugging Face model, sites against what is
added to the residual stream, z W_O against attention's output, each with its error and what rounding allows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from asi_lens.base.errors import AsiLensError
from asi_lens.inputs.models import load_model
from asi_lens.inputs.verify import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if every check holds, 1 if not or after printing an error."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m asi_lens.inputs", description=__doc__, formatter_class=form)
    parser.add_argument("model", help="as `load_model`")
    parser.add_argument("--dtype", default="auto", help="of the forward pass, as `load_model`")
    given = parser.parse_args(arguments)
    try:
        found = verify(load_model(given.model, dtype=given.dtype))
    except (AsiLensError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(found)
    return 0 if found.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
