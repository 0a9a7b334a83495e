"""The conditions of a measurement: clocks, heat, power supply and quotas, before and after, and what they mean for its numbers.

`read` looks, `cautions` judges: the judgement is a pure function of two snapshots. Of a snapshot, all may be absent, with the reason.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

import psutil

from aivmm.errors import Unsupported
from aivmm.probes.machine import on_battery
from aivmm.probes.records import Caution
from aivmm.probes.watch import control_groups
from aivmm.runtime.cpu import cgroup_quota
from aivmm.runtime.nvml import CardState, card_state, card_users
from aivmm.runtime.target import Target

T = TypeVar("T")
_FELL = 0.90  # slower than this against before is a clock that fell, not noise: repeated readings agree within 2 to 3 %
_CAPPED = 0.90
_BUSY = 0.15  # the share of all cores that others may keep busy
_LOST = 0.02  # the share of a card's time for which its clocks may be held down
_WORK = 5_000  # additions in one timed spin: a fraction of a millisecond, so that some spins of many are not interrupted
_SPINS = 40
_LOOK_EVERY_S = 0.1  # NVML refreshes its readings no oftener


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Processes that are none of ours and compute on a card, and the bytes of its memory that they hold, as far as they are told."""

    uid: str
    processes: int
    held_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """The machine at one moment. None, or nothing, where the system does not tell: `absent` has the reason by field name."""

    at_s: float  # of time.monotonic
    speed: float | None = None  # how often a core did a fixed piece of work a second: its clock, seen by what it gets done
    cpu_mhz: float | None = None
    capped_mhz: float | None = None  # the most that the power profile allows
    most_mhz: float | None = None  # the most that the processor can do
    thermal_events: int | None = None  # counts since boot
    battery: bool = False
    quota_cores: float | None = None  # None: no quota
    cores: int = 1  # those that this process may run on, quota or not
    periods: int | None = None  # of the quota, that had something to run; counts
    throttled: int | None = None  # those of them in which it ran out
    cards: tuple[CardState, ...] = ()
    sharing: tuple[Sharing, ...] = ()  # others' processes on those cards
    absent: Mapping[str, str] = field(default_factory=dict)

    def metrics(self, when: str) -> dict[str, float]:
        """Return the numbers by name for the open table of metrics; `when` is "before" or "after"."""
        found = {"cpu_mhz": self.cpu_mhz, "cpu_speed": self.speed}
        for card in self.cards:
            told = {"sm_mhz": card.sm_mhz, "temperature_c": card.temperature_c, "power_w": card.power_w}
            found |= {f"{name}[{card.uid}]": value for name, value in told.items()}
            found |= {_slowed_name(card.uid, reason): 1.0 for reason in card.slowed_by}
        return {f"{name}_{when}": float(value) for name, value in found.items() if value is not None}


def read(targets: Iterable[Target] = (), *, root: Path = Path("/")) -> Conditions:
    """Look at the machine, and at the cards of `targets`. Keeps one core busy for about 10 ms; measure nothing meanwhile.

    `root` is where the system's own files lie.
    """
    absent: dict[str, str] = {}
    targets = list(targets)

    def ask(name: str, reader: Callable[[], float | int]) -> float | int | None:
        try:
            return reader()
        except (OSError, ValueError) as error:
            absent[name] = _why(error)
            return None

    speed = core_speed()  # first: a clock rises and falls within milliseconds, so that of the files is one after work, not an idle one
    cpufreq = root / "sys/devices/system/cpu/cpufreq"
    clock = ask("cpu_mhz", lambda: _clock_mhz(root, cpufreq))
    capped = ask("capped_mhz", lambda: _most_khz(cpufreq, "scaling_max_freq") / 1e3)
    most = ask("most_mhz", lambda: _most_khz(cpufreq, "cpuinfo_max_freq") / 1e3)
    events = ask("thermal_events", lambda: _thermal_events(root))
    periods, throttled = _quota_use(root, absent)
    uids = nvidia_uids(targets)
    return Conditions(
        at_s=time.monotonic(),
        speed=speed,
        cpu_mhz=clock,
        capped_mhz=capped,
        most_mhz=most,
        thermal_events=None if events is None else int(events),
        battery=on_battery(),
        quota_cores=cgroup_quota(root / "sys/fs/cgroup", root / "proc/self/cgroup"),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1),
        periods=periods,
        throttled=throttled,
        cards=_cards(uids, absent),
        sharing=tuple(each for uid in uids if (each := _sharing(uid, absent)) is not None),
        absent=absent,
    )


def cautions(before: Conditions, after: Conditions, *, load_cores: float = 0.0) -> tuple[Caution, ...]:
    """Return the reasons to doubt what was measured between two looks, while others kept `load_cores` cores busy."""
    found = [*_clock_cautions(before, after, busy=load_cores > _BUSY * after.cores), *_supply_cautions(before, after, load_cores)]
    for card in after.cards:
        earlier = next((each for each in before.cards if each.uid == card.uid), None)
        found += _card_cautions(earlier, card, after.at_s - before.at_s)
    shared = {each.uid: each for each in (*before.sharing, *after.sharing)}
    found += map(_shared, shared.values())
    by_code: dict[tuple[str, str], Caution] = {(each.code, each.message): each for each in found}
    return tuple(by_code.values())


def core_speed() -> float:
    """Return how many pieces of fixed work a second one core does: the best of several spins, which others rarely all disturb.

    Unlike the clock that the system reports it exists everywhere, it is of a core at work and not of an idle one, and it sees what virtual
    machines hide.
    """
    with _on_one_core():
        return 1 / min(_spin_s() for _ in range(_SPINS))


def _spin_s() -> float:
    started = time.perf_counter()
    total = 0
    for number in range(_WORK):
        total += number
    return time.perf_counter() - started


@contextmanager
def _on_one_core() -> Iterator[None]:
    """Keep this thread on the same core each time: those of a hybrid processor are not alike. Linux only."""
    if sys.platform != "linux":
        yield
        return
    allowed = os.sched_getaffinity(0)  # of this thread alone
    try:
        os.sched_setaffinity(0, {min(allowed)})
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _clock_cautions(before: Conditions, after: Conditions, *, busy: bool) -> Iterable[Caution]:
    # Whoever else works on the other half of a core slows this half to 60 % at an unchanged clock; that is the load's own caution.
    if not busy and before.speed and after.speed and after.speed < _FELL * before.speed:
        clocks = f" ({before.cpu_mhz:.0f} MHz before, {after.cpu_mhz:.0f} MHz after)" if before.cpu_mhz and after.cpu_mhz else ""
        same = bool(before.cpu_mhz and after.cpu_mhz and after.cpu_mhz > _FELL * before.cpu_mhz)
        others = "whoever shares the host of a virtual machine may slow it down: tune again in a quieter hour"
        yield Caution(
            code="clock-fell",
            message=f"at the end a core did the same work {1 - after.speed / before.speed:.0%} slower than at the beginning{clocks}",
            advice=others if same else "let the machine cool down, choose its performance power profile, and tune again",
        )
    if after.capped_mhz and after.most_mhz and after.capped_mhz < _CAPPED * after.most_mhz:
        yield Caution(
            code="clock-capped",
            message=f"the power profile caps the CPU at {after.capped_mhz:.0f} of {after.most_mhz:.0f} MHz",
            advice="choose the performance power profile, unless production runs like this too",
        )
    grew = _growth(before.thermal_events, after.thermal_events)
    if grew:
        yield Caution(
            code="thermal",
            message=f"the CPU was too hot and slowed itself down {grew} time{'s' if grew > 1 else ''}",
            advice="improve the cooling or let it cool down, and tune again",
        )


def _supply_cautions(before: Conditions, after: Conditions, load_cores: float) -> Iterable[Caution]:
    if load_cores > _BUSY * after.cores:
        yield Caution(
            code="machine-busy",
            message=f"other processes kept {load_cores:.1f} of {after.cores} cores busy",
            advice="close them and tune again",
        )
    if before.battery or after.battery:
        yield Caution(code="on-battery", message="the machine ran on battery", advice="plug it in and tune again")
    if after.quota_cores is not None and after.quota_cores < after.cores:
        yield Caution(
            code="quota-limited",
            message=f"a container's quota allows {after.quota_cores:g} of {after.cores} cores",
            advice="give it whole cores (docker --cpuset-cpus) instead of a quota, unless production runs like this too",
        )
    stopped = _growth(before.throttled, after.throttled)
    if stopped:
        periods = _growth(before.periods, after.periods)
        yield Caution(
            code="throttled",
            message=f"the container used up its CPU quota and was stopped in {stopped} of {max(stopped, periods)} periods",
            advice="raise the quota, or let plans use fewer threads than it has cores",
        )


def _card_cautions(before: CardState | None, after: CardState, seconds: float) -> Iterable[Caution]:
    earlier = dict(before.lost_s) if before else {}
    for cause, lost in after.lost_s:
        share = (lost - earlier[cause]) / max(seconds, 1e-3) if cause in earlier else 0.0
        if share > _LOST:
            thermal = cause == "thermal"
            yield Caution(
                code="thermal" if thermal else "throttled",
                message=f"the GPU's clocks were held down by its {cause} limit for {min(1.0, share):.0%} of the time",
                advice="let it cool down, and tune again" if thermal else "raise its power limit, or take it as it is",
            )
    if after.slowed_by and not any(lost > earlier.get(cause, lost) for cause, lost in after.lost_s):
        yield Caution(
            code="thermal" if any("thermal" in each for each in after.slowed_by) else "throttled",
            message=f"the GPU was slowed down ({', '.join(after.slowed_by)})",
            advice="let it cool down and check its power supply, and tune again",
        )


def _shared(sharing: Sharing) -> Caution:
    count = sharing.processes
    others = f"{count} other process{'es' if count > 1 else ''}"
    return Caution(
        code="card-shared",
        message=f"{others} used the GPU too, and held {sharing.held_bytes / 1e9:.1f} GB of its memory",
        advice="stop what else runs on the card (nvidia-smi lists it), and tune again",
    )


class CardWatch:
    """The cards while they are measured: `look` between two rounds of a race, when looking disturbs nobody."""

    def __init__(self, targets: Iterable[Target]) -> None:
        self._uids = nvidia_uids(targets)
        self._seen: dict[str, list[CardState]] = {}
        self._next_s = 0.0

    def look(self) -> None:
        """Look at each card, unless it was looked at a moment ago."""
        now = time.monotonic()
        if now < self._next_s:
            return
        self._next_s = now + _LOOK_EVERY_S
        for uid in self._uids:
            with suppress(Unsupported):  # `read` says why, once
                self.take(card_state(uid))

    def take(self, state: CardState) -> None:
        """Take in how a card was at one moment. One at rest, while others had their turn, says nothing of the clock that it works at."""
        if not state.idle:
            self._seen.setdefault(state.uid, []).append(state)

    def beside(self, tell: Callable[[T], None] | None) -> Callable[[T], None]:
        """Return what looks at the cards, and then tells what it is told."""

        def both(told: T) -> None:
            self.look()
            if tell is not None:
                tell(told)

        return both

    def metrics(self) -> dict[str, float]:
        """Return the median clock, the highest temperature and the median power of each card, by name as `Conditions.metrics` does.

        What slowed it down is there as the share of the looks that saw it.
        """
        found: dict[str, float] = {}
        for uid, states in self._seen.items():
            for name, values, of in (
                ("sm_mhz", [each.sm_mhz for each in states], median),
                ("temperature_c", [each.temperature_c for each in states], max),
                ("power_w", [each.power_w for each in states], median),
            ):
                known = [float(each) for each in values if each is not None]
                if known:
                    found[f"{name}[{uid}]_during"] = of(known)
            for reason in {reason for each in states for reason in each.slowed_by}:
                found[f"{_slowed_name(uid, reason)}_during"] = sum(reason in each.slowed_by for each in states) / len(states)
        return found

    def cautions(self) -> tuple[Caution, ...]:
        """Return the reasons to doubt what was measured meanwhile: a clock that moved, and what a card was slowed down by."""
        found: dict[tuple[str, str], Caution] = {}
        for states in self._seen.values():
            clocks = [each.sm_mhz for each in states if each.sm_mhz]
            for caution in (*_moved(clocks), *_slowed(sorted({reason for each in states for reason in each.slowed_by}))):
                found[caution.code, caution.message] = caution
        return tuple(found.values())


def _slowed_name(uid: str, reason: str) -> str:
    return f"slowed[{uid}: {reason}]"


def _moved(clocks: Sequence[int]) -> Iterable[Caution]:
    if len(clocks) > 1 and min(clocks) < _FELL * max(clocks):
        yield Caution(
            code="gpu-clock-moved",
            message=f"the GPU's clock was between {min(clocks)} and {max(clocks)} MHz while it was measured",
            advice="lock it (nvidia-smi --lock-gpu-clocks), or let the card cool down, and tune again",
        )


def _slowed(reasons: Sequence[str]) -> Iterable[Caution]:
    if reasons:
        yield Caution(
            code="thermal" if any("thermal" in each for each in reasons) else "throttled",
            message=f"the GPU was slowed down while it was measured ({', '.join(reasons)})",
            advice="let it cool down and check its power supply, and tune again",
        )


def _growth(before: int | None, after: int | None) -> int:
    """Return how much a counter grew; 0 when it is absent or was set back."""
    return 0 if before is None or after is None else max(0, after - before)


def _clock_mhz(root: Path, cpufreq: Path) -> float:
    """Return the highest clock of any core now: the one that has just worked."""
    try:
        return _most_khz(cpufreq, "scaling_cur_freq") / 1e3
    except (OSError, ValueError):
        lines = (root / "proc/cpuinfo").read_text().splitlines()
        return max(float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz"))


def _most_khz(folder: Path, name: str) -> float:
    values = [float(each.read_text()) for each in folder.glob(f"policy*/{name}")]
    if not values:
        raise OSError(f"there is no {folder}/policy*/{name}")
    return max(values)


def _thermal_events(root: Path) -> int:
    """Return how often a core or a package slowed itself down for heat since boot."""
    cpus = root / "sys/devices/system/cpu"
    cores = [int(each.read_text()) for each in cpus.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    packages: dict[str, int] = {}  # each core of a package tells the package's count
    for each in cpus.glob("cpu[0-9]*/thermal_throttle/package_throttle_count"):
        package = each.parent.parent / "topology/physical_package_id"
        packages[package.read_text().strip() if package.exists() else ""] = int(each.read_text())
    if not cores and not packages:
        raise OSError(f"there is no {cpus}/cpu*/thermal_throttle: only Intel processors outside virtual machines have it")
    return sum(cores) + sum(packages.values())


def _quota_use(root: Path, absent: dict[str, str]) -> tuple[int | None, int | None]:
    """Return the periods, and those in which the quota ran out, of the control group that was stopped most often."""
    found: list[tuple[int, int]] = []
    for folder in control_groups("cpu", root / "sys/fs/cgroup", root / "proc/self/cgroup"):
        try:
            fields = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
            found.append((int(fields["nr_throttled"]), int(fields["nr_periods"])))
        except (OSError, ValueError, KeyError):
            continue
    if not found:
        absent["throttled"] = "no control group of this process counts periods in a cpu.stat"
        return None, None
    throttled, periods = max(found)
    return periods, throttled


def _sharing(uid: str, absent: dict[str, str]) -> Sharing | None:
    """Return who else is on a card: all but this process, those that it started, and those that started it."""
    try:
        users = card_users(uid)
    except Unsupported as error:
        absent[f"sharing[{uid}]"] = error.message
        return None
    here = psutil.Process()
    ours = {here.pid, *(each.pid for each in here.children(recursive=True)), *(each.pid for each in here.parents())}
    others = {pid: held for pid, held in users.items() if pid not in ours}
    if others and not any(map(psutil.pid_exists, others)):
        absent[f"sharing[{uid}]"] = "NVML names processes by ids of a container's host, which mean nothing here"
        return None
    return Sharing(uid=uid, processes=len(others), held_bytes=sum(held or 0 for held in others.values())) if others else None


def _cards(uids: Iterable[str], absent: dict[str, str]) -> tuple[CardState, ...]:
    """Return the state of each card, once."""
    found: dict[str, CardState] = {}
    for uid in uids:
        try:
            found[uid] = card_state(uid)
        except Unsupported as error:
            absent[f"cards[{uid}]"] = error.message
    return tuple(found.values())


def nvidia_uids(targets: Iterable[Target]) -> Sequence[str]:
    """Return the NVML ids of the NVIDIA cards among the targets, each once."""
    uids = (each.device.uid for each in targets if each.device.kind == "gpu")
    return list(dict.fromkeys(uid for uid in uids if uid.startswith(("GPU-", "MIG-"))))


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, PermissionError):
        return f"{error.filename} may not be read"
    return str(error) if not isinstance(error, OSError) or error.filename is None else f"{error.filename}: {error.strerror}"
