"""Every folder that the project reads or writes."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "ASI_LENS_CACHE"
PUBLISHED = "published"
"""Folder of the committed figures below `figures/`; nothing but `make publish` writes it."""


def cache_root() -> Path:
    """The cache: `ASI_LENS_CACHE` if set, else the platform's cache folder. Not created here."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().resolve()
    from platformdirs import user_cache_path

    return user_cache_path("asi_lens", appauthor=False)


def cache_dir(kind: str) -> Path:
    """One folder of the cache: `downloads`, `models`, `corpora`, `moments`, `losses`, `stores`, `saes`."""
    return cache_root() / kind


def project_root() -> Path:
    """The checkout: `ASI_LENS_PROJECT` if set, else the folder above the package.

    An installed (not editable) package has no notebooks beside it; the working folder is used then
    when it holds them.
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
    """Source notebooks, outputs stripped."""
    return project_root() / "notebooks"


def parameters_dir() -> Path:
    """One YAML per model and one per profile."""
    return project_root() / "parameters"


def figures_root() -> Path:
    """Everything a run leaves: `ASI_LENS_FIGURES` if set, else `figures/` of the checkout."""
    chosen = os.environ.get("ASI_LENS_FIGURES")
    return Path(chosen).expanduser().resolve() if chosen else project_root() / "figures"


def figures_dir(model: str, profile: str) -> Path:
    """Figures and tables of one model under one profile.

    A folder or file goes by its own name; slashes of hub names become `--`.
    """
    name = Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model
    return figures_root() / name.replace("/", "--") / profile


def published_dir(model: str, profile: str) -> Path:
    """The committed evidence of one model under one profile: `figures/published/<model>/<profile>`."""
    made = figures_dir(model, profile)
    return figures_root() / PUBLISHED / made.parent.name / made.name
