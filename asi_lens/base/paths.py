"""Every folder that the project reads or writes."""

from __future__ import annotations

import os
from pathlib import Path

from asi_lens.base.files import cache_key, existing, file_name, plain_name

CACHE_VARIABLE = "ASI_LENS_CACHE"
PUBLISHED = "published"
"""Folder of the committed figures below `figures/`; only `make publish` writes there."""


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
