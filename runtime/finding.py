"""Finds the target that a plan names, on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.backend import Backend, ImportsBlob
from aivmm.runtime.registry import load_backend
from aivmm.runtime.target import Target, Unavailable


@runtime_checkable
class FindsTarget(Protocol):
    """A backend that can look for one target without trying all the others, which production would wait for."""

    def find(self, name: str) -> Target | Unavailable:
        """Return the target of that device name, or why it is absent."""


@runtime_checkable
class Wakes(Protocol):
    """A backend whose runtime does something once in a process, for whoever comes first, that another thread can do for him."""

    def wakes(self, name: str) -> Callable[[], object] | None:
        """Return what does it for the target of that device name; None where there is nothing, or no more."""


@runtime_checkable
class PacksWeights(Protocol):
    """A backend whose runtime copies weights into memory of its own, in the host, on the thread that has it compile a model."""

    def packs_weights(self, name: str) -> bool:
        """Say whether it does so for the target of that device name."""


_TARGET = re.compile(rb'"target": ?"([a-z0-9_]{1,40}):([A-Za-z0-9_.:]{1,80})"')
_MOST_LOOKED_AT = 8  # targets, which a stranger's text may name by the million


def waking(text: bytes) -> Callable[[], object] | None:
    """Return what the first target that a plan's text names, of those that have such a thing, lets another thread do (see `Wakes`).

    None where none has.

    A runtime that is not here has none. Why it is not is found when it is needed.
    """
    for found in islice(_TARGET.finditer(text), _MOST_LOOKED_AT):
        ask: Callable[[str], Callable[[], object] | None] | None = _offered(found[1].decode(), Wakes.wakes.__name__)
        wake = None if ask is None else ask(found[2].decode())
        if wake is not None:
            return wake
    return None


def _offered(runtime: str, method: str) -> Any:
    """Return a method that a backend may have or not; None where it has not, or is not here. `isinstance` takes 40 µs when it is first
    asked."""
    try:
        return getattr(load_backend(runtime), method, None)
    except UsageError:
        return None


def look_ahead(models: Iterable[tuple[str, Path]]) -> None:
    """Have the backend of each target `runtime:name` do of taking back a model what needs no runtime yet; see `ImportsBlob`."""
    for name, model in models:
        ahead: Callable[[Path], None] | None = _offered(name.partition(":")[0], ImportsBlob.look_ahead.__name__)
        if ahead is not None:
            ahead(model)


def packs_weights(targets: Iterable[str]) -> bool:
    """Say whether the runtime of any of these targets, `runtime:name` each, takes memory for weights from who loads; see `PacksWeights`."""
    for each in targets:
        runtime, _, name = each.partition(":")
        ask: Callable[[str], bool] | None = _offered(runtime, PacksWeights.packs_weights.__name__)
        if ask is not None and ask(name):
            return True
    return False


def find_target(backend: Backend, name: str) -> Target:
    """Return the target `runtime:name` of `backend`.

    Raises:
        Unsupported: it is not available here, with the reason.
    """
    found: Target | Unavailable | None
    if (find := getattr(backend, FindsTarget.find.__name__, None)) is not None:  # `isinstance` takes 40 µs when it is first asked
        found = find(name)
    else:
        found = next((each for each in backend.targets() if isinstance(each, Target) and each.name == name), None)
    if isinstance(found, Target):
        return found
    reason = found.reason if found else "there is no such device"
    raise Unsupported(f"{backend.name}:{name} is not available here: {reason}", advice=found.advice if found else "")


def find_named(name: str) -> Target:
    """Return the target written `runtime:name`.

    Raises:
        Unsupported: it is not available here, or its runtime is not installed, with the reason.
    """
    runtime, _, device = name.partition(":")
    try:
        backend = load_backend(runtime)
    except UsageError as error:  # not installed here, or broken: the plan is not at fault
        raise Unsupported(f"{name} is not available here: {error.message}", advice=error.advice) from error
    return find_target(backend, device)
