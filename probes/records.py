"""The record types of measuring: what was probed, under which conditions, and how it came out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from aivmm.runtime.config import Config, Setting

Source = Literal["measured", "interpolated", "modelled"]
ProbeKind = Literal["model", "segment", "operator", "transfer"]
_REPLICAS = re.compile(r"(.+)~x(\d{1,4})")
_HANDOVER = re.compile(r"(?:(\d+) B|any size) from (.+)@[0-9a-f]+\.[0-9a-f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeKey:
    """What makes two measurements the same measurement.

    `subject` is a structure hash, or a content hash where values decide the time; `environment` is the fingerprint of the target alone.
    """

    kind: ProbeKind
    subject: str
    target: str
    environment: str
    config: Config  # with its precision
    batch: int = 1
    callers: int = 1  # requests kept in flight; 1 is the latency scenario

    @property
    def replicas(self) -> int:
        """How many times the subject was compiled, to share those requests out; see `in_replicas`."""
        return replicas_of(self.subject)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Raw durations of one step, in order, and the round of the race each was taken in. Every summary is a function of this."""

    timed_s: tuple[float, ...]
    rounds: tuple[int, ...] = ()  # as long as timed_s, or empty when nothing was interleaved
    warmup_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        # The sum tells NaN and infinity: a look at each one by one takes longer than all else that reading a probe does.
        if not self.timed_s or not (min(self.timed_s) > 0 and (math.isfinite(sum(self.timed_s)) or all(map(math.isfinite, self.timed_s)))):
            raise ValueError("timed_s needs positive finite durations")
        if self.rounds and len(self.rounds) != len(self.timed_s):
            raise ValueError(f"{len(self.rounds)} rounds for {len(self.timed_s)} durations")

    def quantile_s(self, q: float) -> float:
        """Return the q-quantile in seconds, by the nearest-rank method."""
        ordered = sorted(self.timed_s)
        return ordered[min(len(ordered) - 1, max(0, math.ceil(q * len(ordered)) - 1))]

    @property
    def median_s(self) -> float:
        """The median, in seconds."""
        ordered = sorted(self.timed_s)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """A reason to doubt a number, and what to do about it.

    Advice that another tuning helps ends with "tune again": what has to be measured anew for it, who gives it knows (`tuner.disturbed`).
    """

    code: str  # "spread", "few-samples", "machine-busy", "never-settled", ...
    message: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A probe that gave numbers.

    `metrics` is an open table whose names carry the unit: compile_s, first_inference_s, peak_memory_bytes, relative_l2, cosine, ...
    `race` names the interleaved run the samples come from: pair two outcomes of one race round by round.
    """

    key: ProbeKey
    samples: Samples
    metrics: Mapping[str, float] = field(default_factory=dict)
    cautions: tuple[Caution, ...] = ()
    effective_config: Mapping[str, Setting] = field(default_factory=dict)
    placement: Mapping[str, int] = field(default_factory=dict)  # device -> nodes
    race: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A probe the target will not take: knowledge, with the runtime's own words."""

    key: ProbeKey
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A probe that crashed, hung, gave wrong numbers or ran out of memory: a report, not tried again in this environment unless asked."""

    key: ProbeKey
    reason: str
    output: str = ""  # the last lines the worker printed


Outcome = Measured | Refused | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferPoint:
    """What handing over tensors of one size took.

    `samples` are of both stages in sequence; `source_s` and `destination_s` are medians of the stages alone. `cost_s` is what the sequence
    takes beyond the two: a small difference of large times, so it may be negative within the noise.
    """

    size_bytes: int
    samples: Samples
    source_s: float
    destination_s: float
    cost_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One ordered pair of targets, each in its environment and config, measured in place at some sizes; or why that could not be done.

    What was measured together belongs together: the pair measured again is another `Transfer`. The fixed and the proportional cost are
    functions of the points (`aivmm.probes.transfers.fit_of`).
    """

    source: str
    source_environment: str  # fingerprints: an upgrade on either side makes another pair
    destination: str
    destination_environment: str
    source_config: Config = field(default_factory=Config)
    destination_config: Config = field(default_factory=Config)
    points: tuple[TransferPoint, ...] = ()  # by size, each once
    state: Literal["measured", "refused", "failed"] = "measured"
    reason: str = ""  # why there are no points
    output: str = ""  # the last lines of a worker that died
    cautions: tuple[Caution, ...] = ()

    def __post_init__(self) -> None:
        sizes = [point.size_bytes for point in self.points]
        if sizes != sorted(set(sizes)) or any(size < 1 for size in sizes):
            raise ValueError(f"points need sizes above zero, each once and in order, not {sizes}")
        if bool(sizes) != (self.state == "measured"):
            raise ValueError(f"{self.state} with {len(sizes)} points")

    def key(self, size_bytes: int = 0) -> ProbeKey:
        """Return what the probe of one size is known by; size 0 is that of a pair which gave no numbers."""
        what = f"{size_bytes} B" if size_bytes else "any size"
        return ProbeKey(
            kind="transfer",
            subject=f"{what} from {self.source}@{self.source_environment}.{self.source_config.digest()}",
            target=self.destination,
            environment=self.destination_environment,
            config=self.destination_config,
        )

    def keys(self) -> tuple[ProbeKey, ...]:
        """Return the keys of its probes: one for each point, or the one that says why there are none."""
        return tuple(self.key(point.size_bytes) for point in self.points) or (self.key(),)


def in_replicas(subject: str, replicas: int) -> str:
    """Return the subject of a probe of `replicas` copies of `subject`, compiled each for itself, that take requests in turn."""
    return subject if replicas == 1 else f"{subject}~x{replicas}"


def replicas_of(subject: str) -> int:
    """Return the replicas that `in_replicas` wrote; 1 where it wrote none."""
    found = _REPLICAS.fullmatch(subject)
    return int(found[2]) if found else 1


def handover_of(key: ProbeKey) -> tuple[int, str] | None:
    """Return (bytes, source target) of a transfer's probe, as `Transfer.key` wrote them; bytes are 0 where the pair gave no numbers."""
    found = _HANDOVER.fullmatch(key.subject) if key.kind == "transfer" else None
    return (int(found[1] or 0), found[2]) if found else None
