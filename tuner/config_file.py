"""Options from a file: `aivmm.toml`, or `[tool.aivmm]` in `pyproject.toml`, with the names that they have on the command line.

    db = "team.db"            # for every command that has such an option

    [tune]
    budget = "120s"
    batch = [1, 8, 32]
    constraint = ["latency<20ms"]

    [tune.dim]                # the same as dim = ["seq=128"]
    seq = 128

What is written on the command line goes before the environment (`AIVMM_DB`), and that goes before the file. The file is looked for in the
current folder and in those above it, the nearest one counts; `AIVMM_CONFIG` names another one, and with an empty value none is read.
"""

from __future__ import annotations

import difflib
import shlex
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aivmm.errors import UsageError
from aivmm.models.user_function import UserFunction

VARIABLE = "AIVMM_CONFIG"
_OWN = "aivmm.toml"
_PROJECT = "pyproject.toml"
_PATHS = ("--db", "--inputs", "--dataset", "--output", "--workload")  # their values are relative to the file that holds them
_NEVER = {"--json": "what standard output is belongs to the call", "--help": "it is no setting", "--dry-run": "it is no setting"}
_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A file with options. `place` is how errors name it, `table` its content."""

    path: Path
    table: Mapping[str, Any]
    place: str


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a file says for one command line: `map` as the command-line library takes it; `words` as one would have typed them."""

    map: Mapping[str, Any]
    words: tuple[str, ...]
    place: str

    def said(self) -> str:
        """Return the options for people."""
        return f"from {self.place}: {shlex.join(self.words)}"


def find(folder: Path, environ: Mapping[str, str]) -> ConfigFile | None:
    """Return the file that counts for commands in `folder`, or None.

    Raises:
        UsageError: the file cannot be read, is no TOML, or is the one that `AIVMM_CONFIG` names and does not exist.
    """
    named = environ.get(VARIABLE)
    if named is not None:
        if not named:
            return None
        path = folder / named
        table = _read(path)
        return ConfigFile(path, _section(path, table), str(path)) if path.name == _PROJECT else ConfigFile(path, table, str(path))
    for each in (folder, *folder.parents):
        if (each / _OWN).is_file():
            return ConfigFile(each / _OWN, _read(each / _OWN), str(each / _OWN))
        if (each / _PROJECT).is_file():
            table = _read(each / _PROJECT, tolerant=True)
            if "aivmm" in (table.get("tool") or {}):
                return ConfigFile(each / _PROJECT, _section(each / _PROJECT, table), f"[tool.aivmm] of {each / _PROJECT}")
    return None


def defaults(file: ConfigFile, root: Any, arguments: Sequence[str]) -> Defaults | None:
    """Return what `file` says for the command that `arguments` call, or None when it says nothing for it. The whole file is checked.

    `root` is the command-line library's top command.

    Raises:
        UsageError: an option or a command that does not exist, or a value of the wrong kind.
    """
    _check(file, root, file.table, ())
    names, command = _called(root, arguments)
    if command is root or hasattr(command, "commands"):
        return None
    given: dict[str, Any] = dict(_shared(file.table, command))
    table: Any = file.table
    for name in names:
        below = table.get(name)
        table = below if isinstance(below, Mapping) else {}  # `db` is an option, a path, as well as a command
    given |= {name: value for name, value in table.items() if f"--{name}" in _options(command)}
    typed = {flag for flag in arguments if flag.startswith("-")}
    entries: dict[str, Any] = {}
    words: list[str] = []
    for name, value in given.items():
        parameter = _options(command)[f"--{name}"]
        if any(flag in typed or any(each.startswith(f"{flag}=") for each in typed) for flag in parameter.opts):
            continue
        made = _value(file, (*names, name), parameter, value)
        entries[parameter.name] = made
        words += _words(f"--{name}", made)
    if not entries:
        return None
    default_map: dict[str, Any] = entries
    for name in reversed(names):
        default_map = {name: default_map}
    return Defaults(default_map, tuple(words), file.place)


def _read(path: Path, *, tolerant: bool = False) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise UsageError(f"{path} has more than {_MOST_BYTES >> 20} MiB", advice=f"name another file with {VARIABLE}")
        return tomllib.loads(raw.decode())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", advice=f"mend it, or set {VARIABLE}= to read none") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        if tolerant:
            return {}  # somebody else's pyproject.toml is not ours to judge
        raise UsageError(f"{path} is no TOML: {error}", advice=f"mend it, or set {VARIABLE}= to read none") from error


def _section(path: Path, table: Mapping[str, Any]) -> Mapping[str, Any]:
    found = (table.get("tool") or {}).get("aivmm", {})
    if not isinstance(found, Mapping):
        raise UsageError(f"tool.aivmm in {path} is no table", advice="write [tool.aivmm] and its options below")
    return found


def _called(root: Any, arguments: Sequence[str]) -> tuple[tuple[str, ...], Any]:
    """Return the names of the command that is called, and the command."""
    names: list[str] = []
    command = root
    for word in arguments:
        if not hasattr(command, "commands") or word not in command.commands:
            break
        names.append(word)
        command = command.commands[word]
    return tuple(names), command


def _options(command: Any) -> dict[str, Any]:
    """Return a command's options by their long names, without those that nobody is shown."""
    shown = [each for each in command.params if getattr(each, "param_type_name", "") == "option" and not each.hidden]
    return {flag: each for each in shown for flag in each.opts if flag.startswith("--") and flag not in _NEVER}


def _shared(table: Mapping[str, Any], command: Any) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in table.items() if f"--{name}" in _options(command))


def _everywhere(command: Any) -> Iterator[str]:
    yield from _options(command)
    for each in getattr(command, "commands", {}).values():
        yield from _everywhere(each)


def _check(file: ConfigFile, command: Any, table: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Check every name in a table: an option of the command, or of any command at the top; else a command with a table of its own."""
    options = set(_everywhere(command)) if not names else set(_options(command))
    commands = getattr(command, "commands", {})
    for name, value in table.items():
        where = ".".join((*names, name))
        if name in commands and isinstance(value, Mapping):
            _check(file, commands[name], value, (*names, name))
        elif f"--{name}" in _NEVER:
            raise UsageError(f"{where} in {file.place} cannot be set there: {_NEVER[f'--{name}']}", advice="remove it")
        elif f"--{name}" not in options:
            known = [*commands, *(each.removeprefix("--") for each in sorted(options))]
            close = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {close[0]}?" if close else "names are those of the command line, without the dashes"
            raise UsageError(f"{where} in {file.place} is no {'command and no ' if commands else ''}option", advice=advice)


def _value(file: ConfigFile, names: Sequence[str], parameter: Any, value: Any) -> Any:
    """Return a value as the command line would have given it."""
    where = ".".join(names)
    wrong = UsageError(f"{where} in {file.place} has a value of the wrong kind: {value!r}", advice="write it as on the command line")
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise UsageError(f"{where} in {file.place} is {value!r}", advice="write true or false")
        return value
    if parameter.multiple:
        if isinstance(value, Mapping):
            value = [f"{name}={each}" for name, each in value.items()]
        parts = value if isinstance(value, list) else [value]
        if not all(_plain(each) for each in parts):
            raise wrong
        return [str(each) for each in parts]
    if not _plain(value):
        raise wrong
    text = str(value)
    is_path = f"--{names[-1]}" in _PATHS and "://" not in text and not UserFunction.is_named(text)
    return str(file.path.parent / Path(text).expanduser()) if is_path else text


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag] if value else []
    parts = value if isinstance(value, list) else [value]
    return [word for each in parts for word in (flag, each)]
