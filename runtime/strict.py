"""What a bundle's own files are made of, and how their text is checked: `plan.json`, `family.json`, `signature.json` come from strangers.

By msgspec, since each process that loads a plan waits for its import: 10 ms with all classes, where pydantic takes 100 (decision 0046).
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Generic, Self, TypeVar

from msgspec import DecodeError, Meta, Struct, ValidationError, convert, to_builtins
from msgspec.json import Decoder
from msgspec.structs import replace

from aivmm.errors import BundleError

# `$` would also match before a line feed at the end.
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}(?![\s\S])")]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Extent = Annotated[int, Meta(ge=0, lt=1 << 48)]

_PLACE = re.compile(r"(?P<what>.*) - at (?:`key` in )?`\$(?P<place>[^`]*)`", re.DOTALL)
_FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(?P<name>.*)`", re.DOTALL)


class Strict(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a file. An unknown field is an error and not ignored; values cannot be changed.

    Types are checked strictly where text is read (`Reader`): a wrong type is an error and not a guess, and no number is NaN or infinite.
    Code that makes a part is held to its types by mypy, and to the rest when what it writes is read again.
    """

    def replaced(self, **changes: Any) -> Self:
        """Return a copy with other values.

        Raises:
            ValueError: they do not fit together.
        """
        return replace(self, **changes)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Check what `json.loads` gave, and return the part that it is.

        Raises:
            ValueError: it is not one.
        """
        return convert(data, cls)

    def as_json(self) -> dict[str, Any]:
        """Return what `json.dumps` takes."""
        found: dict[str, Any] = to_builtins(self)
        return found

    def to_json(self) -> str:
        """Return the text of a file."""
        return json.dumps(self.as_json(), indent=2, ensure_ascii=True) + "\n"


class _Head(Struct):
    schema: Any = None


_HEAD = Decoder(_Head)
_Kind = TypeVar("_Kind", bound=Strict)


class Reader(Generic[_Kind]):
    """Reads the text of one kind of file."""

    def __init__(self, kind: type[_Kind], *, newest: int, remedy: str) -> None:
        """Read files whose schemas go up to `newest`; `remedy` is what makes such a file anew: "tune again"."""
        self._decoder = Decoder(kind)
        self._newest = newest
        self._remedy = remedy

    def read(self, text: str | bytes, where: str, *, keys_later: bool = False) -> _Kind:
        """Check a text and return what it says; with `keys_later` all but what `require_keys_once` does.

        Raises:
            BundleError: not JSON, a key twice in one object, newer than this version, or not such a file; one line, with the place.
        """
        try:
            schema = _HEAD.decode(text).schema
            if schema is None:
                raise BundleError(f"{where} names no schema", advice="is this a file that aivmm-tune wrote?")
            if type(schema) is int and schema > self._newest:
                raise BundleError(
                    f"{where} has schema {schema}; this aivmm knows up to {self._newest}",
                    advice=f"upgrade aivmm, or {self._remedy} with this one",
                )
            found = self._decoder.decode(text)
        except RecursionError as error:
            raise BundleError(f"{where} is nested too deeply", advice=self._remedy) from error
        except ValidationError as error:
            raise BundleError(f"{where}: {_explained(error)}", advice=self._remedy) from error
        except ValueError as error:  # what msgspec raises, and what decoding the text as UTF-8 does
            raise BundleError(f"{where} is not valid JSON ({_not_json(text) or _line(error)})", advice=self._remedy) from error
        if not keys_later:
            self.require_keys_once(text, where)
        return found

    def require_keys_once(self, text: str | bytes, where: str) -> None:
        """Refuse a text with a key twice in one object. JSON leaves open which of them counts: another reader would see another plan.

        Raises:
            BundleError: there is such a key.
        """
        try:
            json.loads(text, object_pairs_hook=_keys_once)
        except RecursionError as error:
            raise BundleError(f"{where} is nested too deeply", advice=self._remedy) from error
        except ValueError as error:
            raise BundleError(f"{where} is not valid JSON ({_line(error)})", advice=self._remedy) from error


def _explained(error: DecodeError) -> str:
    """Return the place of an error, as keys joined by dots, and what is wrong there. Names of fields come from the file."""
    text = str(error)
    found = _PLACE.fullmatch(text)
    what, place = (found["what"], found["place"]) if found else (text, "")
    keys = ["*" if each == "..." else each for each in re.findall(r"[.]{3}|[^.\[\]]+", place)]  # "*": one of the keys that a user chooses
    if (field := _FIELD.fullmatch(what)) is not None:
        keys.append(_shown(field["name"]))
        what = "unknown field" if "unknown" in what[: what.index("`")] else "missing"
    return ": ".join((*([".".join(keys)] if keys else []), _line(what)))


def _shown(name: str) -> str:
    """Return a field's name as one short line."""
    return name if name.isidentifier() and len(name) <= 80 else repr(name[:80])


def _line(words: object) -> str:
    return " ".join(str(words).split())[:300]


def _not_json(text: str | bytes) -> str:
    """Return what Python says of a text that is no JSON, which names lines and columns; empty where it would take it."""
    try:
        json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return _line(error)
    return ""


def _keys_once(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {_shown(key)} is there twice in one object")
        seen.add(key)


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number that a bundle may hold")
