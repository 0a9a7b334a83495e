"""What nodes that an accelerator leaves to the CPU cost: read from ONNX Runtime's own profile of some calls.

`MemcpyToHost` waits for what the device was given before, so its time is not the copy's alone; it is what a call that has to wait there
pays. Durations are whole microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from aivmm.runtime.backend import Stray, Strays

_COPIES = ("MemcpyFromHost", "MemcpyToHost")
_SUFFIX = "_kernel_time"


def read_strays(profile: Path, provider: str, *, warmup: int) -> Strays:
    """Return what a profile file says of the nodes that ran elsewhere than on `provider`, without its first `warmup` calls."""
    return strays_of(json.loads(profile.read_text()), provider, warmup=warmup)


def strays_of(events: Iterable[Mapping[str, Any]], provider: str, *, warmup: int) -> Strays:
    """Return the nodes that did not run on `provider` and the copies to and from it, each with its median duration over the calls.

    Raises:
        ValueError: the profile holds no call after the first `warmup`.
    """
    calls: list[float] = []
    durations: dict[tuple[str, str, bool], list[float]] = {}
    current: dict[tuple[str, str, bool], float] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            found = event.get("args", {})
            copies = found.get("op_name") in _COPIES
            if copies or found.get("provider") != provider:
                key = (event["name"].removesuffix(_SUFFIX), found.get("op_name", ""), copies)
                current[key] = current.get(key, 0.0) + event["dur"] / 1e6  # a node of a loop's body runs several times
        elif event.get("name") == "model_run":  # comes after the nodes of its call
            calls.append(event["dur"] / 1e6)
            if len(calls) > warmup:
                for key, seconds in current.items():
                    durations.setdefault(key, []).append(seconds)
            current = {}
    if len(calls) <= warmup:
        raise ValueError(f"a profile of {len(calls)} calls, of which {warmup} are for warming up")
    of = {key: Stray(node=key[0], op_type=key[1], seconds=median(seconds)) for key, seconds in durations.items()}
    return Strays(
        nodes=tuple(stray for key, stray in of.items() if not key[2]),
        copies=tuple(stray for key, stray in of.items() if key[2]),
        call_s=median(calls[warmup:]),
    )
