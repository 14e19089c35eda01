"""Small results kept on disk as JSON, under a key of everything they depend on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from asi_lens.errors import CacheError
from asi_lens.files import cache_key, locked, write_whole
from asi_lens.paths import cache_dir


def cached_json(kind: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """The result kept under `key` in the cache folder `kind`, or `compute()`, then kept.

    Key and result must be JSON values. Two processes that ask at once compute it once. Raises
    CacheError for a file that cannot be read: it names the file to delete.
    """
    path = cache_dir(kind) / f"{cache_key(**key)}.json"
    with locked(path):
        if path.exists():
            try:
                return json.loads(path.read_text(encoding="utf-8"))["result"]
            except (ValueError, TypeError, KeyError) as error:
                raise CacheError(f"{path} cannot be read ({error!r}); delete it and run again") from error
        result = compute()
        with write_whole(path) as temporary:
            temporary.write_text(json.dumps({"key": dict(key), "result": result}, indent=1), encoding="utf-8")
        return result
