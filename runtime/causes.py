"""Why calls have become slow, as far as this machine counts it: what others took, what its own threads waited, what was withheld.

A slowdown of a second that nothing on this machine has to do with is the host's, or the clock's: on virtual machines such come many times
an hour, and nobody can do anything about them. One that another process makes is there to stay, or to be stopped. Latencies alone do not
tell the two apart; the processor's accounts do.

What is compared are amounts: how much more was taken than is usual since calls became slow, against what calls lost by then. Who takes
turns on a core with a call takes what it loses, and it waits for as long, which Linux counts. Who slows it down from another core, by its
memory or its cache, makes it some times as slow for as long as he works, and so takes more than it loses. And what is usual varies.
Looking takes some 40 µs: so it is done where there is a suspicion, and else once in thousands of calls.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from aivmm.errors import Unsupported
from aivmm.runtime.cpu import throttled_s, throttling_files
from aivmm.runtime.nvml import card_state, card_users, is_nvidia, is_started
from aivmm.runtime.target import Device

CauseName = Literal["other processes", "this process", "cpu quota", "card", "none seen"]

_ENOUGH = 0.5  # of what calls lost: what they waited, or where that is not counted, what others took
_ELSEWHERE = 1.5  # of what calls lost: what was taken by who does not share their cores
_LEAST = 0.05  # of a core: what comes and goes on any machine
_VARIES = 0.25  # of what is usual
_RARE_CALLS, _RARE_S, _LONGEST_S = 4096, 5.0, 30.0  # between two looks at what is usual: so many calls, or so long
_CLOCK_CALLS = 256  # between two readings of the clock for that
_FRESH_CALLS, _FRESH_S = 1334, 10.0  # between two suspicions that are looked into: with the other looks, one in a thousand calls
_OFTEN = 0.05  # of that: where calls take longer for their CPU time, which a host's moods do not make them
_AT_ONCE = 64  # looks for that which there may be in a row: after these, one for each `_FRESH_CALLS` or `_FRESH_S`
_FORGOTTEN = 0.5  # of what is known of the usual, each time when as much again is known
_SHORT_S = 0.5  # how long after a look the next one comes, to see how much waits and quotas vary in a short time
_GLIMPSE_S, _GLIMPSES = 1.0, 512  # for what others took in a time that short, and for how many what they took at most is usual
_BURST_S = 10.0  # and no longer than this
_MOST_THREADS = 64  # whose waits are read, at 4 µs each; of more they are not counted
_TICK_S = 0.1  # by which accounts of cores and the clock may differ
_SAME = 0.9  # of the slowdown: so much of it in CPU time is all of it


class Counted(NamedTuple):
    """What was counted up to some moment, or from one to another: seconds, of all cores together. What nobody counts here stays 0."""

    seconds: float  # on the clock
    own: float = 0.0  # CPU time of this process
    others: float = 0.0  # and of all others
    waited: float = 0.0  # by threads of this process that could have run, for a core
    withheld: float = 0.0  # by a CPU quota
    stolen: float = 0.0  # by the host, as far as it tells
    calls: float = 0.0
    busy: float = 0.0  # what these calls took

    def since(self, before: Counted) -> Counted:
        """Return what was counted after `before`."""
        return Counted(*(max(0.0, now - then) for now, then in zip(self, before, strict=True)))

    def plus(self, more: Counted, times: float = 1.0) -> Counted:
        """Return what was counted in both, or so many times as much of the other."""
        return Counted(*(each + times * other for each, other in zip(self, more, strict=True)))


@dataclass(frozen=True, slots=True)
class Cause:
    """What was seen to take the time, as a name for programs, and in words with figures."""

    name: CauseName
    words: str


class Unseen(NamedTuple):
    """What is said where no cause is seen, and whether it may be the host's, which passes as it came: calls need more CPU time."""

    cause: Cause
    may_pass: bool


class Contended(NamedTuple):
    """Who kept calls from cores, if that is seen to be enough, and for how many seconds threads of ours waited while others had them."""

    cause: Cause | None
    kept_s: float


class Machine:
    """What the operating system counts, and who computes on the cards among `devices`. Thread-safe: all paces of an engine ask one."""

    def __init__(self, devices: Iterable[Device] = ()) -> None:
        self.sees_waits = False  # whether it was counted at the last look how long threads wait for a core
        self._cards = {each.uid: None for each in devices if is_nvidia(each)}
        self._lock = threading.Lock()
        self._sees_others = False
        self._waits_ns: dict[str, int] | None = None  # of each thread, at the last look
        self._stops_s: dict[str, float] = {}  # by each file of a quota, when it was read last
        self._waited_s = self._withheld_s = 0.0  # added up from look to look, since threads come and go

    @cached_property
    def cores(self) -> int:
        """The host's cores. Asked for late: to count them takes as long as to make all else of an engine's watch."""
        return os.cpu_count() or 1

    def now_s(self) -> float:
        """Return the time on the clock by which looks are apart."""
        return time.monotonic()

    def own_s(self) -> float:
        """Return the CPU time of this process so far: `counted` tells it, too, and costs a hundred times as much."""
        return time.process_time()

    def others_s(self) -> float | None:
        """Return the CPU time of all other processes so far, None where it cannot be seen: a part of `counted`, in 6 µs."""
        busy_s = _busy_and_stolen_s()[0]
        return None if busy_s is None else busy_s - self.own_s()

    def counted(self) -> Counted | None:
        """Return what was counted so far, calls apart; None where that cannot be read just now, and could be before."""
        with self._lock:
            own = self.own_s()
            busy, stolen = _busy_and_stolen_s()
            if busy is None and self._sees_others:
                return None
            self._sees_others = busy is not None
            self._add_waits()
            self._add_stops()
            return Counted(self.now_s(), own, 0.0 if busy is None else busy - own, self._waited_s, self._withheld_s, stolen)

    def _add_waits(self) -> None:
        """Add what each thread has waited since the last look: who has ended since adds nothing, and takes nothing away."""
        now, before = _waits_ns(), self._waits_ns
        self.sees_waits, self._waits_ns = now is not None, now
        if now is not None and before is not None:
            grown = (waited - (then if (then := before.get(thread, 0)) <= waited else 0) for thread, waited in now.items())
            self._waited_s += sum(grown) / 1e9

    def _add_stops(self) -> None:
        """Add for how long the quota stopped that one of our groups that was stopped the most since the last look."""
        read = {each: throttled_s(each) for each in self._throttling}
        now = {each: seconds for each, seconds in read.items() if seconds is not None}
        self._withheld_s += max((max(0.0, seconds - self._stops_s.get(each, seconds)) for each, seconds in now.items()), default=0.0)
        self._stops_s |= now

    def on_cards(self) -> frozenset[int]:
        """Return the processes that compute on the cards, by the host's ids; none where the driver's library is not in use already."""
        found: set[int] = set()
        for each in self._cards if is_started() else ():
            try:
                found |= card_users(each).keys()
            except Unsupported:
                continue
        return frozenset(found)

    def slowed_cards(self) -> str:
        """Say what slows a card down just now, in its driver's words; nothing where that is nothing, or not told."""
        for each in self._cards if is_started() else ():
            try:
                reasons = card_state(each).slowed_by
            except Unsupported:
                continue
            if reasons:
                return ", ".join(reasons)
        return ""

    @cached_property
    def _throttling(self) -> tuple[str, ...]:
        return throttling_files()


class Witness:
    """Knows what is usual while calls are, and says what was not when they are slow. Used by one thread at a time."""

    def __init__(self, machine: Machine, *, callers: int = 1) -> None:
        """Watch for calls of which as many as there are `callers` run side by side."""
        self._machine = machine
        self._callers = callers
        self._since: Counted | None = None  # the last look, those at causes apart
        self._kept = Counted(0.0)  # what came since the usual was taken, as far as calls were not slow
        self._usual: Counted | None = None
        self._shares: deque[float] = deque(maxlen=_GLIMPSES)  # cores that others took for a second or so, while calls were not slow
        self._glimpsed: tuple[float, float] | None = None  # the clock, and what others had taken, at the last glimpse
        self._suspected: Counted | None = None  # the last look that was for a suspicion
        self._marked: Counted | None = None  # the last one that was for a mark
        self._allowed = float(_AT_ONCE)  # looks at who keeps calls from cores
        self._allowed_at = 0, self._machine.now_s()  # calls, and the clock, when they were counted
        self._doubted = False  # what came since the last look is not usual: calls were slow, or there were none
        self._again = False  # the last look is to have another one soon, to see how much comes in a short time
        self._at_home: frozenset[int] = frozenset()  # processes that compute on the cards
        self._slowed_before: frozenset[str] = frozenset()  # why cards are slow where calls are not
        self.calls = 0  # how many there were
        self.busy_ns = 0  # and what they took: counted by who sees them
        self._ask_at = 0  # calls, when the clock is read next

    def begin(self) -> None:
        """Look, before the first calls."""
        self._since, self._doubted = self._look(), False

    def usual(self) -> None:
        """Take all that came until now for usual, calls that were slow apart; what is long ago counts less and less."""
        self._calm()
        self._settle()

    def quiet(self) -> None:
        """Look now and then at what is usual, while calls are."""
        if self.calls >= self._ask_at:
            self._glimpse()
        if self._doubted:  # and what comes from now on is usual again
            self._calm()
            self._again = True
        if self.calls < self._ask_at:
            return
        self._ask_at = self.calls + _CLOCK_CALLS
        if self._since is None:
            self.begin()
            return
        calls, seconds = self.calls - self._since.calls, self._machine.now_s() - self._since.seconds
        if (self._again and seconds >= _SHORT_S) or seconds >= _LONGEST_S or (calls >= _RARE_CALLS and seconds >= _RARE_S):
            self._calm()
            self._again = not self._again

    def stopped(self) -> None:
        """Take note that no calls came for a while: what was counted meanwhile says nothing of calls."""
        self._suspected, self._doubted, self._glimpsed = None, True, None

    def _glimpse(self) -> None:
        """Keep what others took since the last glimpse: bursts that leave calls as fast as they are show that they do."""
        now_s, then = self._machine.now_s(), self._glimpsed
        if then is not None and now_s - then[0] < _GLIMPSE_S:
            return
        others_s = self._machine.others_s()
        self._glimpsed = None if others_s is None else (now_s, others_s)
        if then is not None and others_s is not None and 0.0 <= others_s - then[1] <= self._machine.cores * (now_s - then[0]) + _TICK_S:
            self._shares.append((others_s - then[1]) / (now_s - then[0]))

    def suspect(self, *, surely: bool = False) -> bool:
        """Look, since calls may be slow from now on; not where a suspicion a moment ago came to nothing. Return whether that was done."""
        self._glimpsed = None
        then = self._suspected
        if not surely and then is not None and self._is_fresh(then):
            return False
        now = self._look()
        self._take(now)
        self._since, self._again = now, False  # where it failed, nothing is known of what comes now
        self._suspected = now or then
        return now is not None

    def mark(self) -> Counted | None:
        """Return what is counted by now, to ask later what came since (`contended`); None where a mark that came to nothing is fresh, or
        there were too many looks of late."""
        then = self._marked
        if (then is not None and self._is_fresh(then, _OFTEN)) or not self._may_look():
            return None
        self._marked = self._look() or then
        return self._marked if self._marked is not then else None

    def contended(self, calls: int, busy_ns: int, usual_ns: float, *, since: Counted) -> Contended | None:
        """Return who kept calls from cores since a `mark`: other processes or a quota; see `cause` for what is asked of how many calls.

        None where that is not known: nothing can be read, or there were too many looks of late.
        """
        if not self._may_look():
            return None
        now, self._doubted = self._look(), True
        if now is None or self._is_absurd(spent := now.since(since)):
            return None
        found = self._kept_waiting(_Lost.of(calls, busy_ns, usual_ns, spent, self._callers), spent, self._more(spent, usual_ns))
        more = self._more(spent, busy_ns / calls)  # whatever calls take where all is well
        return Contended(None if found is None or found.name == "this process" else found, max(0.0, min(more.waited, more.others)))

    def _may_look(self) -> bool:
        """Take one of the looks that are allowed, if there is one left."""
        (calls, seconds), now_s = self._allowed_at, self._machine.now_s()
        self._allowed_at = self.calls, now_s
        self._allowed = min(_AT_ONCE, self._allowed + max((self.calls - calls) / _FRESH_CALLS, (now_s - seconds) / _FRESH_S))
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True

    def cause(self, calls: int, busy_ns: int, usual_ns: float) -> Cause | None:
        """Return what took the time of so many slow calls since the suspicion, which take `usual_ns` where all is well, if that is seen."""
        now, self._doubted = self._look(), True
        if now is None or self._since is None:
            self._since = self._since or now
            return None
        spent = now.since(self._since)
        if self._is_absurd(spent):
            return None
        lost, more = _Lost.of(calls, busy_ns, usual_ns, spent, self._callers), self._more(spent, usual_ns)
        if found := self._kept_waiting(lost, spent, more):
            return found
        enough = max(_ELSEWHERE * lost.seconds, lost.least) if self._machine.sees_waits else lost.enough
        # Of long times the mean says little of short ones: what others took at most a while ago, and calls were not slow, is usual, too.
        slower = max(1.0, busy_ns / max(calls * usual_ns, 1e-9))
        others = min(more.others, _beyond(spent.others, self._burst(spent.seconds) * slower))
        if others >= enough and others >= more.own:
            return Cause("other processes", f"other processes took {self._others(spent)}")
        if more.own >= enough:
            return Cause("this process", f"other work of this process took {_share(more.own, spent)} of {_all_cores()} meanwhile")
        return None if self._usual is None else self._of_cards()

    def _kept_waiting(self, lost: _Lost, spent: Counted, more: Counted) -> Cause | None:
        """Return who had the cores that calls waited for, or what quota kept them from those, where that is enough of what was lost."""
        # A quota stops each core that has something to do, and all that time is added up.
        stopped = max(1.0, (spent.own + spent.withheld) / max(spent.seconds, 1e-9))
        if more.withheld / stopped >= lost.enough:
            return Cause("cpu quota", f"the CPU quota stopped this process for {_share(spent.withheld / stopped, spent)} s of each second")
        if more.waited < lost.enough:
            return None
        waited = f"threads of this process waited for cores, {_share(spent.waited, spent)} s in each second"
        # A machine that was full before has no room for more of others; what is more of our own has to be enough to be the cause.
        if spent.others >= lost.enough and more.own <= max(more.others, lost.enough):
            return Cause("other processes", f"{waited}, and other processes took {self._others(spent)}")
        return Cause("this process", f"{waited}, that others of its threads had")

    def _of_cards(self) -> Cause | None:
        if self._machine.on_cards() - self._at_home:
            return Cause("card", "another process began to compute on the card")
        slowed = self._machine.slowed_cards()
        return Cause("card", f"the card slows down ({slowed})") if _reasons(slowed) - self._slowed_before else None

    def unseen(self) -> Unseen:
        """Say of calls that have been slow for long that nothing here is seen to be why, and what is seen beside."""
        now = self._look() or self._since or Counted(0.0)
        spent, usual = now.since(self._since or now), self._usual
        if slowed := self._machine.slowed_cards():
            return Unseen(Cause("card", f"the card slows down ({slowed})"), may_pass=False)
        said = "nothing on this machine is seen to take the time"
        if spent.stolen >= max(_LEAST * spent.seconds, 1e-9):
            words = f"{said}, and the host took {_share(spent.stolen, spent)} of {_all_cores()} away"
            return Unseen(Cause("none seen", words), may_pass=True)
        if usual is None or not (usual.calls and usual.own and spent.calls):
            words = f"{said} (the host, the clock, the temperature, or a plan from elsewhere)"
            return Unseen(Cause("none seen", words), may_pass=True)
        if spent.waited >= _VARIES * spent.seconds:
            waited = f"{_share(spent.waited, spent)} s in each second ({_share(usual.waited, usual)} before)"
            words = f"{said} that did not before; threads of this process wait for cores, {waited}"
            return Unseen(Cause("none seen", words), may_pass=False)
        ratio = (spent.own / spent.calls) / (usual.own / usual.calls)
        may_pass = ratio >= (spent.busy / spent.calls) / (usual.busy / usual.calls) * _SAME
        else_ = "(the host, the clock or the temperature)" if may_pass else "and wait otherwise (a device, a file, a lock)"
        words = f"{said}; calls need {ratio:.2g} times the CPU time{'' if may_pass else ','} {else_}"
        return Unseen(Cause("none seen", words), may_pass)

    def _look(self) -> Counted | None:
        counted = self._machine.counted()
        return None if counted is None else counted._replace(calls=self.calls, busy=self.busy_ns / 1e9)

    def _calm(self) -> None:
        """Look while calls are as usual. A look that fails is none: the last one stays."""
        now = self._look()
        if now is None:
            return
        self._take(now)
        self._since, self._doubted = now, False
        self._at_home, self._slowed_before = self._machine.on_cards(), _reasons(self._machine.slowed_cards())

    def _take(self, now: Counted | None) -> None:
        """Keep what came since the last look, unless it is not usual."""
        if now is None or self._since is None or self._doubted:
            return
        spent = now.since(self._since)
        if self._is_absurd(spent):
            return
        self._kept = self._kept.plus(spent)
        if self._kept.seconds >= _LONGEST_S or (self._kept.calls >= _RARE_CALLS and self._kept.seconds >= _RARE_S):
            self._settle()

    def _settle(self) -> None:
        if self._kept.calls:
            self._usual, self._kept = self._kept.plus(self._usual or Counted(0.0), _FORGOTTEN), Counted(0.0)

    def _is_fresh(self, then: Counted, times: float = 1.0) -> bool:
        return self.calls - then.calls < _FRESH_CALLS * times and self._machine.now_s() - then.seconds < _FRESH_S * times

    def _is_absurd(self, spent: Counted) -> bool:
        """Return whether others took more than there is, as where a look saw but a part."""
        return spent.others > self._machine.cores * spent.seconds + _TICK_S

    def _more(self, spent: Counted, usual_ns: float) -> Counted:
        """Return how much more than is usual was taken; nothing where that is within what the usual varies by."""
        usual = self._usual
        if usual is None or usual.seconds <= 0 or usual.busy <= 0:  # from the beginning: a plan is proven where nobody else is
            return spent._replace(own=0.0)
        # Where all is slow, others need longer for what they always do.
        slower = max(1.0, spent.busy / max(spent.calls * usual_ns / 1e9, 1e-9))
        share = spent.seconds / usual.seconds * slower

        # A wait is a part of its call, so it is held against those of as many calls; where all is slow, so is what threads do beside.
        waits = _beyond(spent.waited, usual.waited / max(usual.own, 1e-9) * spent.own) > 0
        return Counted(
            seconds=spent.seconds,
            # Threads that spin for as long as a call lasts take as much of each second of calls, however long those are.
            own=_beyond(spent.own, usual.own / usual.busy * spent.busy),
            others=_beyond(spent.others, usual.others * share),
            waited=spent.waited - usual.waited / usual.calls * spent.calls if waits else 0.0,
            withheld=_beyond(spent.withheld, usual.withheld * share),
        )

    def _burst(self, seconds: float) -> float:
        """Return what others took at most, lately, in so long a time in which calls were not slow."""
        return max(self._shares, default=0.0) * min(max(seconds, _GLIMPSE_S), _BURST_S)

    def _others(self, spent: Counted) -> str:
        """Say how many cores others kept busy, and how many they did before."""
        before = "" if self._usual is None else f" ({_share(self._usual.others, self._usual)} before)"
        return f"{_share(spent.others, spent)} of {_all_cores()} meanwhile{before}"


class _Lost(NamedTuple):
    """What slow calls lost, and how much of it is enough to be their cause. In seconds on the clock."""

    seconds: float
    enough: float
    least: float

    @classmethod
    def of(cls, calls: int, busy_ns: int, usual_ns: float, spent: Counted, callers: int) -> _Lost:
        usual_s = calls * usual_ns / 1e9 / callers
        lost_s = max(0.0, busy_ns / 1e9 / callers - usual_s)
        least = max(_LEAST * spent.seconds, 1e-9)
        return cls(lost_s, max(_ENOUGH * lost_s, least), least)


def _beyond(now: float, expected: float) -> float:
    return now - expected if now >= (1 + _VARIES) * expected else 0.0


def _share(seconds: float, spent: Counted) -> str:
    return f"{max(0.0, seconds / max(spent.seconds, 1e-9)):.2f}"


def _reasons(slowed: str) -> frozenset[str]:
    return frozenset(slowed.split(", ")) - {""}


def _all_cores() -> str:
    count = os.cpu_count() or 1
    return f"{count} core" + ("s" if count > 1 else "")


def _busy_and_stolen_s() -> tuple[float | None, float]:
    """Return the CPU time of all processes, None where it cannot be seen, and what the host took."""
    if sys.platform == "linux":
        try:
            fields = [int(each) / _TICKS for each in _read("/proc/stat").split(b"\n", 1)[0].split()[1:9]]
            user, nice, system, _, _, irq, softirq, stolen = fields
        except (OSError, ValueError):  # an old kernel, or one that shows nothing
            return None, 0.0
        return user + nice + system + irq + softirq, stolen
    import psutil  # here: 13 ms, and nobody needs it to load a plan

    times = psutil.cpu_times()
    return float(times.user + times.system), 0.0


_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _waits_ns() -> dict[str, int] | None:
    """Return for how long each thread of this process that could run waited for a core; None where that is not counted or they are many."""
    waits, ran = {}, 0
    try:
        threads = os.listdir("/proc/self/task")  # noqa: PTH208 - a moment ago there were calls, and there will be
        for each in threads if len(threads) <= _MOST_THREADS else ():
            try:
                fields = _read(f"/proc/self/task/{each}/schedstat").split()
            except (FileNotFoundError, ProcessLookupError):  # it ended
                continue
            ran, waits[each] = ran + int(fields[0]), int(fields[1])
    except (OSError, ValueError, IndexError):
        return None
    return waits if ran else None  # a kernel that is told not to count says 0


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
