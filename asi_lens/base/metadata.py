"""Metadata of models and data as JSON: what files can hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from asi_lens.base.errors import OptionError


def plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in the form in which files give it back. Raises OptionError for what JSON does not have."""
    try:
        return json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        raise OptionError(f"metadata={metadata!r} is not allowed: {error}") from error
