"""`ASI_LENS_OFFLINE=1`: package indexes and hubs are refused at once, for machines without a network.

Only what is on the machine is used: the bundle and the cache (`base.paths`), folders that pip is told of, and
the hub's own cache.
"""

from __future__ import annotations

import os
import sys

from asi_lens.base.errors import FetchError, require

VARIABLE = "ASI_LENS_OFFLINE"
_WORDS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}
# Read once, when these modules are imported.
_HUB_SETTINGS = ("huggingface_hub.constants", "datasets.config")


def offline() -> bool:
    """Return whether the network is refused. Raises OptionError for a value that is neither yes nor no."""
    given = os.environ.get(VARIABLE, "")
    require(given.lower() in _WORDS, VARIABLE, given, "1 or 0")
    return _WORDS[given.lower()]


def no_hub() -> bool:
    """Return whether the network is refused; then the hub's libraries read their own cache alone."""
    if not offline():
        return False
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in _HUB_SETTINGS:
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    return True


def refused(missing: str, bring: str) -> FetchError:
    """Return (not raise) the error for a thing that is not on this machine; `bring` says how to bring it."""
    return FetchError(
        f"{missing} is not on this machine, and {VARIABLE}=1 refuses the network. {bring}, or make a bundle "
        "where there is a network (`python -m asi_lens.reproduce.bundle make`) and set ASI_LENS_BUNDLE here"
    )
