"""A callable that the user names: found, checked and run, with whatever it does wrong told in one line."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from aivmm.errors import AivmmError, UsageError


class UserFunction:
    """A callable of the user, named `module:function` or `path/to/file.py:function`. What its code does wrong becomes a `UsageError`.

    Security: `given` comes from the command line or from a call of our API, never from a model, plan, bundle or database.
    """

    def __init__(self, given: str, *, option: str) -> None:
        self._name = f"{option} {given}"
        self._option = option
        self._module, _, self._attribute = given.rpartition(":")
        self._function: Any = None
        # The current folder comes first, as for `python script.py`; workers start without it (-P).
        file = [str(Path(self._module).absolute().parent)] if self._module.endswith(".py") else []
        self._folders = [*file, str(Path.cwd())]

    @staticmethod
    def is_named(given: str) -> bool:
        """Say whether `given` reads as a callable. `C:\\data\\x.npz` does not."""
        module, _, function = given.rpartition(":")
        names = function.split(".") if module.endswith(".py") else [*module.split("."), *function.split(".")]
        return bool(module) and all(each.isidentifier() for each in names)

    @classmethod
    def find(cls, given: str, *, option: str, arguments: tuple[str, ...]) -> UserFunction:
        """Import the callable, and check that it takes as many positional arguments.

        Raises:
            UsageError: no such module or function, not callable, other arguments, or importing it fails.
        """
        if not cls.is_named(given):
            raise UsageError(f"{option} {given}: not MODULE:FUNCTION", advice=f"such as {option} data:load or {option} folder/data.py:load")
        self = cls(given, option=option)
        with self.running():
            self._function = self._found(self._imported())
            if not callable(self._function):
                raise UsageError(f"{self}: not callable, but {type(self._function).__name__}", advice=f"{option} takes MODULE:FUNCTION")
            try:
                signature = inspect.signature(self._function)
            except (TypeError, ValueError):  # a built-in that does not tell
                return self
            try:
                signature.bind(*arguments)
            except TypeError as error:
                raise UsageError(
                    f"{self}: {text_of(error)}", advice=f"it is called as {self._attribute}({', '.join(arguments)})"
                ) from error
        return self

    def call(self, *arguments: Any) -> Any:
        """Call it."""
        with self.running():
            return self._function(*arguments)

    @contextlib.contextmanager
    def running(self, doing: str = "") -> Iterator[None]:
        """Run code of the user's: its folder can be imported from, and whatever it raises is a `UsageError` that says what and where."""
        before = Path.cwd()
        sys.path[:0] = self._folders
        try:
            yield
        except (AivmmError, KeyboardInterrupt):
            raise
        except BaseException as error:  # sys.exit, a test's skip, a cancellation: nothing of the user's may look like a bug of ours
            did = (
                f"called sys.exit({text_of(error)})"
                if isinstance(error, SystemExit)
                else f"raised {type(error).__name__}: {text_of(error)}"
            )
            place = _place(error)
            raise UsageError(
                f"{self}{f': {doing}: it' if doing else ''} {did.removesuffix(': ')}{f' ({place})' if place else ''}",
                advice=f"mend it, or leave {self._option} away",
            ) from error
        finally:
            for folder in self._folders:
                with contextlib.suppress(ValueError):
                    sys.path.remove(folder)
            with contextlib.suppress(OSError):
                os.chdir(before)

    def __str__(self) -> str:
        return self._name

    def _imported(self) -> ModuleType:
        importlib.invalidate_caches()
        if self._module.endswith(".py"):
            return self._imported_file(Path(self._module).absolute())
        try:
            return importlib.import_module(self._module)
        except ModuleNotFoundError as error:
            if not error.name or not f"{self._module}.".startswith(f"{error.name}."):
                raise  # it is there, and imports what is not
            what = f"{self}: no module {error.name!r}, neither in {Path.cwd()} nor installed"
            raise UsageError(what, advice=f"{self._option} also takes path/to/file.py:{self._attribute}") from error

    def _imported_file(self, path: Path) -> ModuleType:
        if not path.is_file():
            raise UsageError(f"{self}: no such file", advice=f"{self._option} takes MODULE:FUNCTION or path/to/file.py:FUNCTION")
        name = path.stem
        if name in sys.modules or name in sys.stdlib_module_names or not name.isidentifier():
            name = f"_user_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
        loaded = next(
            (each for each in (sys.modules.get(path.stem), sys.modules.get(name)) if getattr(each, "__file__", "") == str(path)), None
        )
        if loaded is not None:
            return loaded
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec and spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # data classes and pickles look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:  # not handled, only cleaned up: half of a module must not be found the next time
            del sys.modules[name]
            raise
        return module

    def _found(self, module: ModuleType) -> Any:
        found: Any = module
        for name in self._attribute.split("."):
            try:
                found = getattr(found, name)
            except AttributeError as error:
                close = difflib.get_close_matches(name, [each for each in dir(found) if not each.startswith("_")], n=1)
                advice = f"did you mean {close[0]!r}?" if close else f"{self._option} also takes path/to/file.py:FUNCTION"
                raise UsageError(f"{self}: no {name!r} in {_shown(module.__file__ or 'a folder')}", advice=advice) from error
        return found


def text_of(value: object) -> str:
    """Return `str(value)` in one line of at most 200 characters."""
    try:
        text = " ".join(str(value).split())
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - a `__str__` of the user's, who may raise anything; there is nothing better to show
        return "?"
    return text if len(text) <= 200 else f"{text[:199]}…"


def _place(error: BaseException) -> str:
    """Return file:line of the innermost frame that is neither ours nor a library's, or else not ours."""
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):
        return f"{_shown(error.filename)}:{error.lineno}"
    frames = [
        (frame.f_code.co_filename, frame.f_globals.get("__name__", ""), line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    theirs = [(file, line) for file, name, line in frames if not file.startswith("<") and not str(name).startswith("aivmm.")]
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    own = [(file, line) for file, line in theirs if not file.startswith(library)]
    return next((f"{_shown(file)}:{line}" for file, line in reversed(own or theirs)), "")


def _shown(file: str) -> str:
    """Return a path, short where it lies in the current folder."""
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
