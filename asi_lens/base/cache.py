"""Small results kept on disk as JSON, under a key of everything they depend on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from asi_lens.base.errors import CacheError
from asi_lens.base.files import cache_key, locked, write_whole
from asi_lens.base.paths import cache_dir


def cached_json(kind: str, key: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """The result kept under `key` in the cache folder `kind`, or `compute()`, kept; see `cached_jsons`."""
    return cached_jsons(kind, [key], lambda _: [compute()])[0]


def cached_jsons(
    kind: str, keys: Sequence[Mapping[str, Any]], compute: Callable[[list[int]], Sequence[Any]]
) -> list[Any]:
    """The results kept under `keys` in the cache folder `kind`.

    Those that are not there are computed at once and kept: `compute` is given their positions in `keys`.

    Keys and results must be JSON values. Two processes that ask at once compute a result once. Raises
    CacheError for a file that cannot be read: it names the file to delete.
    """
    paths = [cache_dir(kind) / f"{cache_key(**key)}.json" for key in keys]
    with ExitStack() as held:
        for path in sorted(set(paths)):  # in one order everywhere, or two processes wait for each other
            held.enter_context(locked(path))
        missing = [paths.index(path) for path in dict.fromkeys(paths) if not path.exists()]
        if missing:
            for position, result in list(zip(missing, compute(missing), strict=True)):
                text = json.dumps({"key": dict(keys[position]), "result": result}, indent=1)
                with write_whole(paths[position]) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        return [_read(path) for path in paths]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["result"]
    except (ValueError, TypeError, KeyError) as error:
        raise CacheError(f"{path} cannot be read ({error!r}); delete it and run again") from error
