"""Every target of this machine, found in workers."""

from __future__ import annotations

from collections.abc import Sequence

from aivmm.probes.lab import Lab
from aivmm.runtime.registry import default_backends
from aivmm.runtime.target import Target, Unavailable


def find_devices(backends: Sequence[str] | None = None) -> tuple[tuple[Target, ...], tuple[Unavailable, ...]]:
    """Return the targets that run here, and what is unavailable and why. A driver that crashes costs its own runtime only."""
    with Lab() as lab:
        return lab.discover(list(backends or default_backends()))
