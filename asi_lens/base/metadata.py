"""Metadata of models and data as plain JSON values, which files can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from asi_lens.base.errors import OptionError


def plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy as a file would return it. Raises OptionError for values that JSON cannot hold."""
    try:
        return json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"metadata={metadata!r} is not allowed; metadata must be JSON values ({error})"
        ) from error
