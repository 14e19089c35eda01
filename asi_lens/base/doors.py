"""Types of arguments, checked where a user calls the package: the decorator `checked`.

A checked function compares its arguments with its annotations, and raises an error that states the
parameter, the value and what is allowed. Whole numbers of any library (`numbers.Integral`, tensors and arrays
of one whole number) become `int`. Real numbers become `float` where only `float` is annotated, and arrays of
numbers become lists. True and False are not numbers here, and a string is not a list.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from asi_lens.base.errors import DataError, OptionError, shown

Door = TypeVar("Door", bound=Callable[..., Any])

_NO = object()
"""Result of a `fit` that refuses the value."""
_TEXT = (str, bytes, bytearray)
_NUMBERS = {"Float": "floating point numbers", "Int": "whole numbers"}
_MANY = (collections.abc.Sequence, collections.abc.Iterable, list, tuple)


@dataclass(frozen=True)
class Kind:
    """One annotation: its description for an error, and a function from a value to the value that fits."""

    text: str
    fit: Callable[[Any], Any]
    """Returns the value, converted where needed, or `_NO`."""
    of_arrays: bool = False
    """Whether arrays fit. An array of another shape or dtype is then wrong data, not a wrong option."""


def checked(door: Door) -> Door:
    """Return a function that checks its arguments, or a class whose constructor and public methods do.

    The checked callable raises OptionError for a value of another type, and DataError for an array or tensor
    of another shape or dtype than annotated. Missing and unknown arguments remain Python's TypeError.
    """
    if not isinstance(door, type):
        return typing.cast("Door", _checking(door))
    for name, member in list(vars(door).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, classmethod | staticmethod):
            setattr(door, name, type(member)(_checking(member.__func__)))
        elif inspect.isfunction(member):
            setattr(door, name, _checking(member))
    return door


def check_options(door: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check values for parameters of a checked function, without a call. Raises as the function would."""
    named = _kinds_of(door)[1]
    for name, value in options.items():
        kind = named.get(name)
        if kind is not None:
            fitted(name, value, kind)


def _checking(function: Callable[..., Any]) -> Callable[..., Any]:
    kinds: Any = None

    @functools.wraps(function)
    def door(*args: Any, **options: Any) -> Any:
        nonlocal kinds
        if kinds is None:  # late: annotations may name classes that are defined below the function
            kinds = _kinds_of(function)
        positional, named, rest, more = kinds
        given = [
            value if kind is None else fitted(name, value, kind)
            for (name, kind), value in zip(positional, args, strict=False)
        ]
        others = args[len(positional) :]
        given += others if rest is None else [fitted(rest[0], value, rest[1]) for value in others]
        for name, value in options.items():
            kind = named.get(name, more)
            if kind is not None:
                options[name] = fitted(name, value, kind)
        return function(*given, **options)

    return door


def _kinds_of(function: Callable[..., Any]) -> Any:
    """Return kinds of the positional parameters, of parameters by name, of `*rest` and of `**more`."""
    hints = typing.get_type_hints(function)
    positional: list[tuple[str, Kind | None]] = []
    named: dict[str, Kind | None] = {}
    rest = more = None
    for name, parameter in inspect.signature(function).parameters.items():
        kind = kind_of(hints[name]) if hints.get(name, Any) is not Any else None
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = None if kind is None else (name, kind)
        elif parameter.kind is parameter.VAR_KEYWORD:
            more = kind
        else:
            named[name] = kind
            if parameter.kind is not parameter.KEYWORD_ONLY:
                positional.append((name, kind))
    return positional, named, rest, more


def fitted(name: str, value: Any, kind: Kind) -> Any:
    """Return a value as its kind has it. Raises OptionError or DataError (see `checked`)."""
    found = kind.fit(value)
    if found is _NO:
        wrong_array = kind.of_arrays and hasattr(value, "shape") and hasattr(value, "dtype")
        error = DataError if wrong_array else OptionError
        raise error(f"{name}={shown(value)} is not allowed; {name} must be {kind.text}")
    return found


@functools.cache
def kind_of(hint: Any) -> Kind:
    """Return the kind of an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, TypeVar):
        return kind_of(hint.__bound__ or Any)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin in (typing.Union, types.UnionType):
        return _any_of([kind_of(one) for one in arguments])
    if origin is typing.Literal:
        return Kind(
            " or ".join(map(repr, arguments)),
            lambda value: value if isinstance(value, str) and value in arguments else _NO,
        )
    if origin is collections.abc.Callable or hint is Callable:
        return Kind("a function", lambda value: value if callable(value) else _NO)
    if origin is type:
        (base,) = arguments
        return Kind(
            f"a subclass of {base.__name__}",
            lambda value: value if isinstance(value, type) and issubclass(value, base) else _NO,
        )
    if origin is tuple and arguments[-1] is not Ellipsis:
        return _fixed([kind_of(one) for one in arguments])
    if (origin or hint) in _MANY:
        return _many(origin or hint, kind_of(arguments[0] if arguments else Any))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(*map(kind_of, arguments))
    return _instance(origin or hint)


def _whole(value: Any) -> Any:
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = value if type(value) is int else int(value)
        return number if -(2**63) <= number < 2**63 else _NO  # tensors and files hold 64 bits
    if getattr(value, "ndim", None) == 0 and "int" in str(getattr(value, "dtype", "")):
        return int(value)
    return _NO


def _number(value: Any) -> Any:
    if getattr(value, "ndim", None) == 0 and "float" in str(getattr(value, "dtype", "")):
        value = float(value)
    whole = _whole(value)
    if whole is _NO and not (isinstance(value, Real) and not isinstance(value, bool)):
        return _NO
    if type(value) is not float:
        try:
            value = float(value if whole is _NO else whole)
        except OverflowError:
            return _NO
    return _NO if math.isnan(value) else value


def _truth(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    named = type(value).__name__ in ("bool", "bool_")  # numpy's is called bool_ before 2.0
    return bool(value) if named and getattr(value, "ndim", None) == 0 else _NO


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else _NO


_NAMES = {"a device": "'auto', 'cpu' or 'cuda'"}
_PLAIN: dict[Any, Kind] = {
    Any: Kind("anything", lambda value: value),
    object: Kind("anything", lambda value: value),
    int: Kind("a whole number", _whole),
    float: Kind("a number", _number),
    bool: Kind("True or False", _truth),
    str: Kind("text", _text),
    Path: Kind("a path", lambda value: value if isinstance(value, Path) else _NO),
    type(None): Kind("None", lambda value: value if value is None else _NO),
}


def _path_text(value: Any) -> Any:
    """Take a text that the file system can take as a name."""
    try:
        return value if isinstance(value, str) and value and b"\0" not in os.fsencode(value) else _NO
    except UnicodeEncodeError:
        return _NO


def _device_text(value: Any) -> Any:
    import torch

    try:
        return value if isinstance(value, str) and (value == "auto" or torch.device(value)) else _NO
    except RuntimeError:
        return _NO


def _any_of(kinds: list[Kind]) -> Kind:
    # int | float and float | int are one annotation, whichever was written first: whole numbers stay whole.
    kinds = sorted(kinds, key=lambda kind: kind.text != "a whole number")
    texts = [kind.text for kind in kinds]
    for other, text in (("a path", _path_text), ("a device", _device_text)):
        if other in texts and "text" in texts:
            kinds[texts.index("text")] = Kind(_NAMES.get(other, other), text)

    def fit(value: Any) -> Any:
        found = [kind.fit(value) for kind in kinds]
        # A kind that takes the value as it is comes first: 1 stays an int for int | float.
        if any(one is value for one in found):
            return value
        return next((one for one in found if one is not _NO), _NO)

    texts = list(dict.fromkeys(kind.text for kind in kinds))
    if {"a number", "a whole number"} <= set(texts):
        texts.remove("a whole number")
    return Kind(" or ".join(texts), fit, any(kind.of_arrays for kind in kinds))


def _many(container: Any, item: Kind) -> Kind:
    endless = container in (collections.abc.Iterable, collections.abc.Iterator)

    def fit(value: Any) -> Any:
        if hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1 and not item.of_arrays:
            value = value.tolist()
        sequence = isinstance(value, collections.abc.Sequence)
        if isinstance(value, (*_TEXT, Mapping)) or getattr(value, "ndim", 1) == 0:
            return _NO
        if not (sequence or (endless and isinstance(value, Iterable))):
            return _NO
        given = value if sequence else list(value)
        found = [item.fit(one) for one in given]
        if any(one is _NO for one in found):
            return _NO
        if container is tuple:
            return tuple(found)
        changed = any(a is not b for a, b in zip(given, found, strict=True))
        return type(value)(found) if changed and type(value) is tuple else found if changed else given

    return Kind(f"a list, each item {item.text}", fit)


def _fixed(items: list[Kind]) -> Kind:
    def fit(value: Any) -> Any:
        if isinstance(value, _TEXT) or not isinstance(value, collections.abc.Sequence):
            return _NO
        if len(value) != len(items):
            return _NO
        found = tuple(item.fit(one) for item, one in zip(items, value, strict=True))
        if any(one is _NO for one in found):
            return _NO
        same = isinstance(value, tuple) and all(a is b for a, b in zip(value, found, strict=True))
        return value if same else found

    return Kind(f"({', '.join(item.text for item in items)})", fit)


def _mapping(key: Kind, item: Kind) -> Kind:
    def fit(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return _NO
        found = [(key.fit(a), item.fit(b)) for a, b in value.items()]
        if any(part is _NO for pair in found for part in pair):
            return _NO
        same = all(a is c and b is d for (a, b), (c, d) in zip(value.items(), found, strict=True))
        return value if same else dict(found)

    return Kind(f"a mapping from {key.text} to {item.text}", fit)


def _own(value: Any) -> Mapping[str, Any]:
    return getattr(value, "__dict__", {})


def _instance(kind: Any) -> Kind:
    name = getattr(kind, "__name__", str(kind))
    arrays = hasattr(kind, "dim_str")  # a shape of jaxtyping
    if arrays:
        numbers = _NUMBERS.get(name.partition("[")[0], "numbers")
        name = f"{kind.array_type.__name__} [{kind.dim_str.strip()}] of {numbers}"
    article = "an" if name[0] in "AEIOU" else "a"

    # A Protocol's isinstance would compute its properties, such as the hash of a store.
    parts = [base for base in getattr(kind, "__mro__", ()) if getattr(base, "_is_protocol", False)]
    names = [one for base in parts for one in (*vars(base), *inspect.get_annotations(base)) if one[0] != "_"]

    def fit(value: Any) -> Any:
        if names:
            return value if all(hasattr(type(value), one) or one in _own(value) for one in names) else _NO
        return value if isinstance(value, kind) else _NO

    return Kind(f"{article} {name}", fit, arrays or name in ("Tensor", "ndarray"))
