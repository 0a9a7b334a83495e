"""Which backends there are: one table for ours, and the entry-point group `aivmm.backends` for everyone else's.

Importing this module imports no runtime; `load_backend` imports one.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, cast

from aivmm.errors import UsageError
from aivmm.runtime.backend import Backend

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

BACKENDS = {
    "openvino": "aivmm.runtime.openvino:OpenVino",
    "onnxruntime": "aivmm.runtime.onnxruntime:OnnxRuntime",
    "null": "aivmm.runtime.null:NullBackend",
}

GROUP = "aivmm.backends"

# A target is written `runtime:name`, so a runtime's own name holds no colon, and a pattern's `*` is no letter of it.
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


def backend_names() -> tuple[str, ...]:
    """Return the names of all backends: ours in the table's order, then the plug-ins' in alphabetical order.

    Raises:
        UsageError: an installed plug-in takes a name of ours or of another plug-in, or one that no target could be written with.
    """
    return (*BACKENDS, *sorted(_plug_ins()))


def default_backends() -> tuple[str, ...]:
    """Return the backends that discovery asks: all but `null`, whose devices exist only when somebody asks for them.

    Raises:
        UsageError: as `backend_names`.
    """
    return tuple(name for name in backend_names() if name != "null")


def load_backend(name: str) -> Backend:
    """Import the backend called `name` and make one.

    Raises:
        UsageError: nothing has that name (the message lists what does), its runtime is not installed or broken, or a plug-in is no backend.
    """
    # Ours are not looked for among what is installed, which would take longer than loading a small plan.
    plug_ins = {} if name in BACKENDS else _plug_ins()
    if name in BACKENDS:
        location, owner = BACKENDS[name], "aivmm"
    elif name in plug_ins:
        location, owner = plug_ins[name].value, _owner(plug_ins[name])
    else:
        raise UsageError(f"unknown backend {name!r}", advice=f"choose from {', '.join((*BACKENDS, *sorted(plug_ins)))}")
    module, _, attribute = location.partition(":")
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in BACKENDS and _is_ours(error):
            raise  # a module of ours is missing or broken: a bug, so it keeps its traceback
        raise UsageError(f"backend {name!r} cannot be loaded: {error}", advice=f"reinstall {owner} and what it depends on") from error
    backend = factory()
    # Ours are held to it by the tests of the contract.
    if plug_ins and (not isinstance(backend, Backend) or backend.name != name):
        raise UsageError(
            f"{location} of {owner} is not a backend named {name!r}", advice="a backend has name, targets, knobs, baselines and compile"
        )
    return cast(Backend, backend)


def _plug_ins() -> dict[str, EntryPoint]:
    """Return the installed plug-ins by name."""
    from importlib.metadata import entry_points  # here: it takes longer to import than a small plan to load

    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if not _NAME.fullmatch(entry.name):
            raise UsageError(
                f"{_owner(entry)} registers a backend under the name {entry.name!r}",
                advice="a backend's name is lower-case letters, digits, - and _",
            )
        # The same line may be found twice when a distribution is installed and also lies in the current folder.
        rival = found.get(entry.name)
        if entry.name in BACKENDS and entry.value != BACKENDS[entry.name]:
            problem = f"{_owner(entry)} registers a backend named {entry.name!r}, which is one of aivmm's own"
            raise UsageError(problem, advice=f"uninstall {_owner(entry)}")
        if rival and rival.value != entry.value:
            problem = f"{_owner(rival)} and {_owner(entry)} both register a backend named {entry.name!r}"
            raise UsageError(problem, advice="uninstall one of them")
        if entry.name not in BACKENDS:
            found[entry.name] = entry
    return found


def _owner(entry: EntryPoint) -> str:
    """Return the name of the distribution that registered `entry`."""
    return entry.dist.name if entry.dist else entry.value


def _is_ours(error: ImportError | AttributeError) -> bool:
    """Say whether what is missing is a part of aivmm itself."""
    return isinstance(error, AttributeError) or (error.name or "").partition(".")[0] == "aivmm"
