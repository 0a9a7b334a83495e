"""Every target of this machine, found in workers."""

from __future__ import annotations

from collections.abc import Sequence

from aivmm.errors import UsageError
from aivmm.probes.lab import Lab
from aivmm.runtime.registry import backend_names, default_backends
from aivmm.runtime.target import Target, Unavailable


def find_devices(backends: Sequence[str] | None = None) -> tuple[tuple[Target, ...], tuple[Unavailable, ...]]:
    """Return the targets that run here, and what is unavailable and why. A driver that crashes costs its own runtime only.

    Raises:
        UsageError: there is no backend of such a name.
    """
    for name in backends or ():
        if name not in backend_names():
            raise UsageError(f"unknown backend {name!r}", advice=f"choose from {', '.join(backend_names())}")
    with Lab() as lab:
        return lab.discover(list(backends or default_backends()))
