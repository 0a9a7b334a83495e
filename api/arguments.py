"""Arguments of the public functions in one form; what is of a wrong kind is one line that names the argument, and no traceback."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from operator import index
from pathlib import Path
from typing import Any

from aivmm.errors import UsageError
from aivmm.tuner.shapes import Shape, parse_dim_lists, parse_shape_lists


def texts(name: str, value: object, example: str) -> tuple[str, ...]:
    """Return the text or texts that an argument is.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(value, str):
        return (value,)
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping) else (value,)
    for each in found:
        if not isinstance(each, str):
            raise _wrong(name, each, "text, or a list of texts", example)
    return found


def names(name: str, value: object, example: str) -> tuple[str, ...]:
    """Return the names that an argument lists: in a text with commas, or in a list of texts.

    Raises:
        UsageError: it is something else.
    """
    return tuple(part.strip() for each in texts(name, value, example) for part in each.split(",") if part.strip())


def text(name: str, value: object, example: str) -> str | None:
    """Return the text that an argument is, or None.

    Raises:
        UsageError: it is something else.
    """
    if value is not None and not isinstance(value, str):
        raise _wrong(name, value, "text", example)
    return value


def place(name: str, value: object) -> Path | None:
    """Return the path that an argument is, or None.

    Raises:
        UsageError: it is something else.
    """
    found = location(name, value)
    return None if found is None else Path(found)


def location(name: str, value: object) -> str | None:
    """Return the path, or the address that is one letter for letter, that an argument is, or None.

    Raises:
        UsageError: it is something else.
    """
    found = _path(value)
    if value is not None and found is None:
        raise _wrong(name, value, "a path", f'{name}="some/where"')
    return found


def model(name: str, value: object) -> str:
    """Return the one model that an argument names, as text.

    Raises:
        UsageError: it is something else, or empty.
    """
    found = _path(value)
    if found is None or not found.strip() or found == os.curdir:
        raise _wrong(name, value, "the path of one .onnx file", f'{name}="model.onnx"')
    return found


def called(name: str, value: object) -> None:
    """Refuse an argument that is to be called later and cannot be.

    Raises:
        UsageError: it is neither None nor something to call.
    """
    if value is not None and not callable(value):
        raise _wrong(name, value, "a function", f"{name}=print")


def places(name: str, value: object) -> list[str]:
    """Return the path or paths that an argument is, as texts.

    Raises:
        UsageError: it is something else.
    """
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping) else (value,)
    paths = []
    for each in found:
        path = _path(each)
        if path is None:
            raise _wrong(name, each, "a path, or a list of paths", f'{name}="model.onnx"')
        paths.append(path)
    return paths


def whole(name: str, value: Any, example: str) -> int:
    """Return the whole number that an argument is, also where it is one of NumPy's.

    Raises:
        UsageError: it is something else.
    """
    try:
        return index(value)
    except TypeError:
        raise _wrong(name, value, "a whole number", example) from None


def several(name: str, value: object, example: str) -> tuple[int, ...]:
    """Return the whole numbers that an argument lists, ascending, each once.

    Raises:
        UsageError: it lists something else.
    """
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise _wrong(name, value, "a list of whole numbers", example)
    return tuple(sorted({whole(name, each, example) for each in value}))


def seconds(name: str, value: Any) -> float | None:
    """Return the number that an argument is, or None.

    Raises:
        UsageError: it is something else.
    """
    try:
        return None if value is None else float(value + 0.0)  # a text of digits is no number
    except TypeError:
        raise _wrong(name, value, "a number of seconds", f"{name}=120") from None


def extents(value: object) -> dict[str, tuple[int, ...]]:
    """Return the extents of each dimension, ascending: of a number, a list of them, or the command line's "32,128" and "32..512".

    Raises:
        UsageError: it is something else, or an extent is there twice.
    """
    example = 'dims={"seq": 128}, dims={"seq": [32, 128]} or dims={"seq": "32..512"}'
    found: dict[str, tuple[int, ...]] = {}
    for name, each in _named("dims", value, example).items():
        if isinstance(each, str):
            found |= parse_dim_lists([f"{name}={each}"])
            continue
        listed = each if isinstance(each, Iterable) else (each,)
        found[name] = _each_once(name, tuple(sorted(whole(f"dims[{name!r}]", one, example) for one in listed)))
    return found


def shapes(value: object) -> dict[str, tuple[Shape, ...]]:
    """Return the shapes of each input: of one, a list of them, or the command line's "1x3x224x224,1x3x448x448".

    Raises:
        UsageError: it is something else, or a shape is there twice.
    """
    example = 'shapes={"image": (1, 3, 224, 224)}, or a list of such'
    found: dict[str, tuple[Shape, ...]] = {}
    for name, each in _named("shapes", value, example).items():
        if isinstance(each, str):
            found |= parse_shape_lists([f"{name}={each}"])
            continue
        if not isinstance(each, Iterable):
            raise _wrong(f"shapes[{name!r}]", each, "a shape, or a list of shapes", example)
        listed = list(each)
        of_one = [listed] if not any(isinstance(one, Iterable) for one in listed) else listed
        found[name] = _each_once(name, tuple(_shape(name, one, example) for one in of_one))
    return found


def _path(value: object) -> str | None:
    """Return the text of a path of any kind; None where it is none, or one of bytes."""
    found = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    return found if isinstance(found, str) else None


def _shape(name: str, value: object, example: str) -> Shape:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise _wrong(f"shapes[{name!r}]", value, "a shape, or a list of shapes", example)
    return tuple(whole(f"shapes[{name!r}]", each, example) for each in value)


def _named(name: str, value: object, example: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(each, str) for each in value):
        raise _wrong(name, value, "a mapping from names", example)
    return value


def _each_once(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values or len(set(values)) < len(values):
        raise UsageError(f"{name!r} lists {list(values)!r}", advice="give at least one, and each once")
    return values


def _wrong(name: str, value: object, wanted: str, example: str) -> UsageError:
    shown = " ".join(repr(value).split())
    return UsageError(f"{name} takes {wanted}, and not {shown if len(shown) <= 60 else type(value).__name__}", advice=f"such as {example}")
