"""Devices, and targets: a runtime on a device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from aivmm.errors import UsageError

DeviceKind = Literal["cpu", "gpu", "npu", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One physical thing that computes."""

    kind: DeviceKind
    model: str  # the full name its driver gives: "NVIDIA H200"
    uid: str = ""  # what tells two devices of one model apart, where the driver says
    driver: str = ""
    memory_bytes: int | None = None  # its own memory; None where it shares the host's
    instruction_sets: tuple[str, ...] = ()
    cores: int | None = None  # usable ones, by affinity and quota, for a CPU
    power_limit_w: float | None = None
    # What else its driver says of it, in the driver's own words, for people: nothing that tells one device from another.
    properties: Mapping[str, str | int | float | bool] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A runtime on a device, written `runtime:name`. `precisions` are those it runs natively by a hint, `fp32` first."""

    runtime: str
    name: str  # the device in the runtime's own words: "CPU", "GPU.0", "CUDA:0"
    device: Device = field(compare=False)
    runtime_version: str = field(compare=False)
    precisions: tuple[str, ...] = field(default=("fp32",), compare=False)

    def __str__(self) -> str:
        return f"{self.runtime}:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """A target that a user could expect here, the reason why it is absent, and how to get it."""

    target: str
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.target}: {self.reason}" + (f" ({self.advice})" if self.advice else "")


def matches(pattern: str, target: str) -> bool:
    """Say whether `pattern` (`openvino`, `openvino:GPU`, `*:CPU`) names `target`: a shorter form matches all that it prefixes.

    `openvino:GPU` matches `openvino:GPU.0` and `onnxruntime:CUDA` matches `onnxruntime:CUDA:0`, but `openvino:GPU.1` does not match
    `openvino:GPU.10`.
    """
    runtime, _, name = pattern.strip().partition(":")
    have_runtime, _, have_name = target.partition(":")
    if runtime not in ("*", "") and runtime.lower() != have_runtime.lower():
        return False
    name, have_name = name.lower(), have_name.lower()
    return name in ("", "*") or have_name == name or have_name.startswith((name + ".", name + ":"))


def select(targets: Sequence[Target], patterns: Iterable[str], unavailable: Sequence[Unavailable] = ()) -> tuple[Target, ...]:
    """Return the targets that any of `patterns` names, in the order of `targets`.

    Raises:
        UsageError: a pattern names nothing here; the message lists what there is, and why a known absent target is absent.
    """
    wanted = list(patterns)
    for pattern in wanted:
        if not any(matches(pattern, str(target)) for target in targets):
            known = ", ".join(map(str, targets)) or "none"
            absent = next((each for each in unavailable if matches(pattern, each.target)), None)
            if absent:
                raise UsageError(f"target {pattern!r} is not available here: {absent.reason}", advice=f"available: {known}")
            raise UsageError(f"unknown target {pattern!r}", advice=f"available: {known}")
    return tuple(target for target in targets if any(matches(pattern, str(target)) for pattern in wanted))
