"""Every folder that the project reads or writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asi_lens.base.errors import require
from asi_lens.base.files import cache_key, existing, file_name, plain_name

CACHE_VARIABLE = "ASI_LENS_CACHE"
BUNDLE_VARIABLE = "ASI_LENS_BUNDLE"
PUBLISHED = "published"
"""Folder of the committed figures below `figures/`; only `make publish` writes there."""

_watching: list[set[tuple[str, str]]] = []


def cache_root() -> Path:
    """Return the cache folder: `ASI_LENS_CACHE` if set, else the platform's. Does not create the folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    from platformdirs import user_cache_path

    return user_cache_path("asi_lens", appauthor=False)


def cache_dir(kind: str) -> Path:
    """Return one folder of the cache.

    `kind` is `downloads`, `models`, `corpora`, `moments`, `losses`, `stores`, `saes` ...
    """
    return cache_root() / kind


def bundle_root() -> Path | None:
    """Return the folder that is read before the cache and never written: `ASI_LENS_BUNDLE`, or None.

    Raises OptionError if the variable is set to something that is not a folder.
    """
    chosen = os.environ.get(BUNDLE_VARIABLE)
    if not chosen:
        return None
    folder = Path(chosen).expanduser().resolve()
    require(folder.is_dir(), BUNDLE_VARIABLE, chosen, "a folder (see `python -m asi_lens.reproduce.bundle`)")
    return folder


def cached(kind: str, name: str, mark: str = "") -> Path:
    """Return the path of an entry of the cache: in the bundle if it is there, else in `cache_dir(kind)`.

    `name` is a file's or folder's path below the folder of the kind. An entry counts as there if it exists,
    with `mark` if the file of that name in it exists. The returned path exists or is the one to write.
    """
    for entries in _watching:
        entries.add((kind, name))
    bundle = bundle_root()
    if bundle is not None and (bundle / kind / name / mark).exists():
        return bundle / kind / name
    return cache_dir(kind) / name


@contextmanager
def watched() -> Iterator[set[tuple[str, str]]]:
    """Yield a set that collects (kind, name) of every entry of the cache that `cached` is asked for."""
    entries: set[tuple[str, str]] = set()
    _watching.append(entries)
    try:
        yield entries
    finally:
        _watching.remove(entries)


def is_cached(path: Path) -> bool:
    """Return whether a path is in the bundle or the cache."""
    bundle = bundle_root()
    return path.is_relative_to(cache_root()) or (bundle is not None and path.is_relative_to(bundle))


def project_root() -> Path:
    """Return the checkout: `ASI_LENS_PROJECT` if set, else the folder above the package.

    An installed (not editable) package has no notebooks beside it. Then the result is the nearest folder,
    from the working folder upward, with `notebooks/` and `parameters/`, else the working folder.
    """
    chosen = os.environ.get("ASI_LENS_PROJECT")
    if chosen:
        return Path(chosen).expanduser().resolve()
    beside = Path(__file__).resolve().parents[2]
    here = Path.cwd()
    for candidate in (beside, here, *here.parents):
        if (candidate / "notebooks").is_dir() and (candidate / "parameters").is_dir():
            return candidate
    return here


def notebooks_dir() -> Path:
    """Return the folder of the source notebooks (without outputs)."""
    return project_root() / "notebooks"


def parameters_dir() -> Path:
    """Return the folder with one YAML file per model and one per profile."""
    return project_root() / "parameters"


def figures_root() -> Path:
    """Return the folder that runs write to: `ASI_LENS_FIGURES` if set, else `figures/` of the checkout."""
    chosen = os.environ.get("ASI_LENS_FIGURES")
    return Path(chosen).expanduser().resolve() if chosen else project_root() / "figures"


def figures_dir(model: str, profile: str) -> Path:
    """Return the folder of one model's figures and tables under one profile.

    A model given as a folder or file is called by that folder's or file's name and 8 hex digits of its path:
    checkpoints of several runs often have one name. Slashes of hub names become `--`.
    """
    path = existing(model)
    if path is None:
        return figures_root() / model.replace("/", "--") / profile
    return (
        figures_root()
        / file_name(plain_name(path), key=cache_key(path=os.fspath(path.resolve()))[:8])
        / profile
    )


def published_dir(model: str, profile: str) -> Path:
    """Return the folder of one model's committed figures: `figures/published/<model>/<profile>`."""
    made = figures_dir(model, profile)
    return figures_root() / PUBLISHED / made.parent.name / made.name
