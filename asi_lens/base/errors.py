"""Errors whose texts state the given value, the allowed values, and the nearest allowed names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

_SHOWN = 120
"""Characters of a value in an error's text."""


class AsiLensError(Exception):
    """Base class of every error that this package raises on purpose."""


class UnknownNameError(AsiLensError, ValueError):
    """A model, site, corpus, parameter ... that does not exist."""


class OptionError(AsiLensError, ValueError):
    """An option out of its range or of the wrong type."""


class DataError(AsiLensError, ValueError):
    """Text, tokens or activations that cannot be used (empty, too short, not finite ...)."""


class CacheError(AsiLensError, RuntimeError):
    """A cached or downloaded file that is truncated, edited, or from another version."""


class FetchError(AsiLensError, RuntimeError):
    """A download that failed or did not arrive as promised."""


class UnsupportedModelError(AsiLensError, ValueError):
    """A model that lacks a requested part (a site, a kind of layer ...)."""


def unknown_name(kind: str, name: object, allowed: Iterable[str]) -> UnknownNameError:
    """Return (not raise) the error for a name that is not among `allowed`; its text lists near names first.

    >>> str(unknown_name("site", "atn_out", ["attn_out", "mlp_out"]))
    "unknown site 'atn_out'; did you mean 'attn_out'? Known: attn_out, mlp_out"
    """
    names = sorted(str(a) for a in allowed)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    known = ", ".join(names[:40]) + (f", ... ({len(names)} in all)" if len(names) > 40 else "")
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}Known: {known or 'none'}")


def shown(value: object) -> str:
    """Return a value for an error's text: its repr, cut to 120 characters; shape and dtype of an array."""
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, type):
        return f"{kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if hasattr(value, "state_dict") and not isinstance(value, type):  # the repr of a model fills pages
        return f"{kind}(...)"
    try:
        text = repr(value)
    except Exception:  # any object may come here, also one that is not whole
        return f"an object of {kind}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raise OptionError with the key, the value and the allowed values, unless `condition` is true."""
    if not condition:
        raise OptionError(f"{key}={shown(value)} is not allowed; {key} must be {allowed}")


def require_both(**pair: Any) -> None:
    """Raise OptionError if one of two options is given (not None) and the other is None."""
    if len({value is None for value in pair.values()}) > 1:
        raise OptionError(f"{' and '.join(pair)} belong together: give both or neither")


def require_whole(key: str, value: Any, least: int) -> None:
    """Raise OptionError unless `value` is an int of at least `least`; True and False are not allowed."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, key, value, f"a whole number of at least {least}")


def require_keys(values: Mapping[str, Any], keys: Iterable[str], kind: str) -> None:
    """Raise OptionError for the first of `keys` that `values` lacks; `kind` says what the values are of."""
    for key in keys:
        require(key in values, kind, sorted(map(str, values)), f"keys and values, {key} among them")


def require_known(keys: Iterable[str], known: Collection[str], kind: str) -> None:
    """Raise UnknownNameError for the first key that is not among `known`; `kind` says what kind of key."""
    for key in keys:
        if key not in known:
            raise unknown_name(kind, key, known)
