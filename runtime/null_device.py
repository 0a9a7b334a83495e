"""The figures of a device made of arithmetic, and what a run on it takes: time, memory, energy, digits.

The time of one run with `callers` requests in flight (asymptotic bounds of closed queueing networks, Lazowska et al. 1984, ch. 5):

    node     = max(flops / (flops_per_s * efficiency * speed), bytes / bytes_per_s)
    compute  = (sum of node * product of choice factors) * amdahl(threads) * (1 + stream_overhead * (streams - 1)) + nodes * launch_s
    copies   = copied bytes / copy_bytes_per_s + copied tensors * copy_s, those for nodes that are left to the host among them
    interval = max((compute + copies) / min(callers, streams), compute * threads / cores)
    last_s   = interval * callers
    amdahl(t) = serial + (1 - serial) / t + thread_overhead * (t - 1)
    joules   = interval * idle_w + compute * threads * busy_w

With `real_time` a run also lasts that long. Its thread sleeps, first while it has the device for itself (compute * threads / cores), then
for the rest of what one run takes; `streams` runs of one executable are in flight at most. Several executables on one device share it, so
what copies, stages and callers come to together shows on the clock, and is what the formula says.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aivmm.errors import Unsupported, UsageError
from aivmm.runtime.config import Setting
from aivmm.runtime.null_work import Work
from aivmm.runtime.target import DeviceKind


@dataclass(frozen=True, slots=True, kw_only=True)
class NullDevice:
    """The figures of one made-up device. The module's docstring has the formula they enter."""

    name: str = "CPU"
    kind: DeviceKind = "cpu"
    flops_per_s: float = 20e9  # of one thread, in fp32
    bytes_per_s: float = 20e9
    memory_bytes: int = 8 * 10**9
    launch_s: float = 1e-6  # for each node
    copy_bytes_per_s: float = math.inf  # inputs and outputs cross at this rate; infinite where the host's memory is shared
    copy_s: float = 0.0  # for each tensor that crosses
    pinned_speed: float = 1.0  # how many times as fast copies from and to page-locked memory are
    peer_bytes_per_s: float | None = None  # to and from other such devices; None: those copies go through the host
    keeps_tensors: bool = False  # tensors between stages, and those that callers leave there, stay: they do not cross
    efficiency: Mapping[str, float] = field(default_factory=dict)  # op type -> share of flops_per_s that it reaches; 1 unless named
    op_types: frozenset[str] | None = None  # those it can run; None is all
    left: frozenset[str] = frozenset()  # op types that it leaves to the host: all that such a node reads and writes is copied
    speed: Mapping[str, float] = field(default_factory=lambda: {"fp32": 1.0})  # precision -> how many times flops_per_s
    cores: int = 4
    serial: float = 0.1  # the part of the work that threads do not speed up
    thread_overhead: float = 0.02  # of the work, for each thread after the first
    max_streams: int = 4
    stream_overhead: float = 0.02
    choices: Mapping[str, Mapping[Setting, float]] = field(
        default_factory=dict
    )  # further knobs: setting -> factor on time, the default first
    promising: Mapping[str, Setting] = field(default_factory=dict, repr=False)  # choices where a search looks first; no time hangs on it
    noise: float = 0.0  # sigma of the log-normal factor on each run's time
    idle_w: float = 5.0  # drawn whatever it does
    busy_w: float = 5.0  # drawn beside that by each thread that computes
    real_time: bool = False  # a run takes its time by the clock on the wall, too: for what runs several things at once

    def __post_init__(self) -> None:
        peer = () if self.peer_bytes_per_s is None else (self.peer_bytes_per_s,)
        rates = (self.flops_per_s, self.bytes_per_s, self.copy_bytes_per_s, self.pinned_speed, *peer)
        positive = (*rates, self.memory_bytes, self.cores, self.max_streams)
        factors = (*self.efficiency.values(), *self.speed.values(), *(each for knob in self.choices.values() for each in knob.values()))
        rest = (self.launch_s, self.copy_s, self.serial, self.thread_overhead, self.stream_overhead, self.noise, self.idle_w, self.busy_w)
        if not all(each > 0 for each in (*positive, *factors)) or not all(0 <= each < math.inf for each in rest) or self.serial > 1:
            raise UsageError(f"no device can be made of {self}", advice="rates and factors are positive, costs are not negative")
        if next(iter(self.speed), "") != "fp32" or {"threads", "streams"} & set(self.choices):
            raise UsageError(f"null:{self.name} needs fp32 as its first speed, and other names than threads and streams for its choices")


DEFAULT_DEVICES = (
    NullDevice(speed={"fp32": 1.0, "bf16": 1.5}),
    NullDevice(
        name="GPU.0",
        kind="gpu",
        flops_per_s=2e12,
        bytes_per_s=400e9,
        memory_bytes=2 * 10**9,
        launch_s=4e-6,
        copy_bytes_per_s=8e9,
        copy_s=10e-6,
        pinned_speed=3.0,
        keeps_tensors=True,
        efficiency={"LSTM": 0.01, "GRU": 0.01, "RNN": 0.01, "Gather": 0.1},
        left=frozenset({"Det", "NonZero"}),
        speed={"fp32": 1.0, "f16": 2.0},
        cores=1,
        choices={"layout": {"nchw": 1.0, "nhwc": 0.9}},
        idle_w=10.0,
        busy_w=60.0,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A config as the formula takes it."""

    threads: int
    streams: int
    precision: str
    chosen: Mapping[str, Setting]

    def as_settings(self) -> dict[str, Setting]:
        """Return it as a runtime reads its settings back."""
        return {"threads": self.threads, "streams": self.streams, "precision": self.precision, **self.chosen}


def compute_s(work: Work, device: NullDevice, setup: Setup) -> float:
    """Return the seconds that the nodes take, without copies and without neighbours."""
    rate = device.flops_per_s * device.speed[setup.precision]
    nodes_s: float = sum(
        max(flops / (rate * device.efficiency.get(op, 1.0)), moved / device.bytes_per_s) for op, flops, moved in work.nodes
    )
    nodes_s *= math.prod([device.choices[name][value] for name, value in setup.chosen.items()], start=1.0)
    amdahl = device.serial + (1 - device.serial) / setup.threads + device.thread_overhead * (setup.threads - 1)
    return nodes_s * amdahl * (1 + device.stream_overhead * (setup.streams - 1)) + len(work.nodes) * device.launch_s


def interval_s(work: Work, device: NullDevice, setup: Setup, callers: int) -> float:
    """Return the seconds between two completed runs when `callers` requests are kept in flight; for one caller that is the latency."""
    computes_s, copies_s = parts_s(work, device, setup)
    return max((computes_s + copies_s) / min(callers, setup.streams), computes_s * setup.threads / device.cores)


def parts_s(work: Work, device: NullDevice, setup: Setup) -> tuple[float, float]:
    """Return the seconds of computing and of copying of one run that is alone."""
    copies_s = work.copied_bytes / device.copy_bytes_per_s + work.copied_tensors * device.copy_s
    copies_s += sum(stray_s(moved, device) for op, _, moved in work.nodes if op in device.left)
    return compute_s(work, device, setup), copies_s


def stray_s(moved: float, device: NullDevice) -> float:
    """Return what a node left to the host costs: a copy there and one back, of all that it reads and writes."""
    return moved / device.copy_bytes_per_s + 2 * device.copy_s


class FakeClock:
    """Seconds since it was made, moved by hand. Thread-safe."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        """Return the simulated time in seconds."""
        with self._lock:
            return self._now_s

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        with self._lock:
            self._now_s += seconds


class Meter:
    """Joules and simulated seconds of everything that ran on null devices in this process: what a counter in hardware is to the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._joules = self._seconds = 0.0

    def add(self, joules: float, seconds: float) -> None:
        """Count one run."""
        with self._lock:
            self._joules += joules
            self._seconds += seconds

    def read(self) -> tuple[float, float]:
        """Return joules and simulated seconds so far."""
        with self._lock:
            return self._joules, self._seconds


METER = Meter()


class Memory:
    """How much of each device's memory is taken. Thread-safe."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}
        # Re-entrant: a forgotten executable may be collected, and free its part, while another takes some in the same thread.
        self._lock = threading.RLock()

    def used(self, device: NullDevice) -> int:
        """Return the bytes that are taken on `device`."""
        with self._lock:
            return self._taken.get(device.name, 0)

    def take(self, name: str, needed: int, device: NullDevice) -> None:
        """Take `needed` bytes for the model `name`; raises Unsupported where there are not so many."""
        with self._lock:
            left = device.memory_bytes - self.used(device)
            if needed > left:
                raise Unsupported(
                    f"{name} needs {needed} bytes, null:{device.name} has {left}", advice="use fewer streams or a smaller batch"
                )
            self._taken[device.name] = self.used(device) + needed

    def free(self, device: NullDevice, held: int) -> None:
        """Give back what was taken."""
        with self._lock:
            self._taken[device.name] -= held


def rounded(array: Any, precision: str) -> Any:
    """Return a float32 output with the digits that `precision` leaves, so that an accuracy guard has something to see."""
    array = np.asarray(array)
    if array.dtype != np.float32 or precision not in ("f16", "bf16"):
        return array
    with np.errstate(over="ignore"):
        if precision == "f16":
            return array.astype(np.float16).astype(np.float32)
        return (np.ascontiguousarray(array).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).reshape(array.shape)
