"""The arguments of functions that anyone calls: each is of the kind that its annotation says, or one line names it."""

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, Unpack, cast, get_args, get_origin, get_type_hints

import numpy as np

from sae.cache.errors import SaeError

Function = TypeVar("Function", bound=Callable[..., Any])

NAMES = {str: "text", int: "a whole number", float: "a number", bool: "True or False", NoneType: "None"}
MOST = 40  # letters of a value that are shown


def checked(function: Function) -> Function:
    """Make a function refuse, before it does anything, an argument that is not of the kind its annotation says.

    A number of NumPy or torch reaches it as one of Python's. Raises SaeError, which names the argument and what it
    takes. Arguments without an annotation, or of any kind, are the function's own matter; what is none of its
    arguments is Python's.
    """
    signature = inspect.signature(function)
    kinds = functools.cache(lambda: get_type_hints(function))  # when it is called first: a module may not be whole yet

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        try:
            given = signature.bind(*args, **named)
        except TypeError:
            return function(*args, **named)  # Python says what is wrong
        for name, value in given.arguments.items():
            parameter, kind = signature.parameters[name], kinds().get(name, Any)
            each = [*_each(parameter, value, kind)]
            for argument, one, of in each:
                expect(argument, one, of)
            plain = [_plain(one, of) for _, one, of in each]
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given.arguments[name] = dict(zip(value, plain, strict=True))
            else:
                given.arguments[name] = tuple(plain) if parameter.kind is inspect.Parameter.VAR_POSITIONAL else plain[0]
        return function(*given.args, **given.kwargs)

    return cast(Function, call)


def _each(parameter: inspect.Parameter, value: Any, kind: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every argument that a parameter stands for, by its name, with its kind."""
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        yield from ((parameter.name, one, kind) for one in value)
    elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
        known = get_type_hints(get_args(kind)[0]) if get_origin(kind) is Unpack else {}
        yield from ((name, one, known.get(name, Any)) for name, one in value.items())
    else:
        yield parameter.name, value, kind


def expect(name: str, value: Any, kind: Any) -> None:
    """Raise SaeError, naming the argument, unless a value is of a kind, as an annotation says it."""
    if fits(value, kind):
        return
    said = f"{name}: is a {type(value).__name__}"
    if isinstance(value, str | bytes | int | float | NoneType):
        told = repr(value)
        said = f"{name} = {told if len(told) <= MOST else told[: MOST - 3] + '...'}: is not what is meant"
    elif (items := _items_of(kind)) is not None and _is_listed(value):
        wrong = next(one for one in value if not fits(one, items))
        said = f"{name}: holds a {type(wrong).__name__}"
    raise SaeError(f"{said}; give {' or '.join(_named(kind))}")


def fits(value: Any, kind: Any) -> bool:
    """Return True if a value is of a kind: a number of NumPy or torch is one, and NumPy's bool; a text is no list."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, TypeVar):
        return True
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (Sequence, list):
        return _is_listed(value) and all(fits(one, inner[0]) for one in value)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind in (int, float):
        return _is_number(value, operator.index if kind is int else float)
    return isinstance(value, origin or kind)


def _plain(value: Any, kind: Any) -> Any:
    """A value of a kind, where it is a number (or a bool) of NumPy or torch as one of Python's."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if isinstance(value, np.bool_) and bool in kinds:
        return bool(value)
    if isinstance(value, bool | int | float | str) or _is_listed(value):
        return value
    for one, converted in ((int, operator.index), (float, float)):
        if one in kinds and fits(value, one):
            return converted(value)
    return value


def _is_listed(value: Any) -> bool:
    """Return True for a list, a tuple, an array: what can be gone through again, and is no text."""
    if isinstance(value, str | bytes | Mapping):
        return False
    try:
        return len(value) >= 0 and iter(value) is not None
    except TypeError:
        return False


def _is_number(value: Any, converted: Callable[[Any], object]) -> bool:
    if isinstance(value, bool | str | bytes):
        return False
    try:
        converted(value)
    except (TypeError, ValueError):
        return False
    return True


def _items_of(kind: Any) -> Any:
    """The kind of what a list holds, where a list is among what a kind takes; else None."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return next((items for one in inner if (items := _items_of(one)) is not None), None)
    return inner[0] if origin in (Sequence, list) else None


def _named(kind: Any) -> Iterator[str]:
    """What a kind takes, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for one in inner:
            yield from _named(one)
    elif origin is Literal:
        yield from map(repr, inner)
    elif origin in (Sequence, list):
        yield f"a list (of {' or '.join(_named(inner[0]))})"
    else:
        name = (origin or kind).__name__
        yield NAMES.get(kind) or ("a path" if name == "PathLike" else f"an object of {name}")
