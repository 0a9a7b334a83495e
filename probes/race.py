"""Races: candidates measured in turn, in random order, round after round, until the order is clear or the time is up."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from aivmm.errors import AivmmError
from aivmm.probes.client import Worker, WorkerDied, WorkerLost, run_limit_s
from aivmm.probes.compare import Apart, By, Comparison, compare, observed_apart, paired_logs, rate_s
from aivmm.probes.machine import BackgroundLoad, freeze, is_busy, measuring, thaw, wait_until_quiet
from aivmm.probes.records import Caution, Samples
from aivmm.probes.timer import OUTSPIN_S, WINDOW_S
from aivmm.runtime.config import Config
from aivmm.runtime.cpu import usable_cores
from aivmm.runtime.target import Target

# Short blocks, many rounds: neighbours in time are what cancels, and handing over takes a millisecond since the others are frozen. Longer
# blocks make a round no surer (the same spread at 1.5, 4 and 10 ms: what differs is the core's speed from one moment to the next, 0029).
_BLOCK_CALLS = 3
_BLOCK_LEAST_S, _BLOCK_MOST_S = 0.003, 0.15
_WINDOWS_S = 4 * WINDOW_S  # of several callers, and of one whose rate counts: a block is so many windows, and a mean of each is a duration
_SLOW_S = 0.02  # one such call settles the caches
_VERY_SLOW_S = 0.2  # one such call is a block
_BUSY_LEAST = 4  # durations to a block on a busy machine, so that one of them is likely to have run through
_WARM_S = 0.5  # at most so long until the first calls no longer become faster
_HOPELESS = 1.10  # dropped when it is shown to be this far behind the leader
_FAR = ((2, 10.0), (3, 3.0))  # kept, and in each of so many rounds or more so many times behind: it rests
_HOPELESS_P = 0.05  # five rounds of five reach it: what is dropped for nothing costs one candidate of a search
_TIGHT = 0.03  # an interval this wide (±1.5 %) is decided enough: more rounds would be spent on what nobody feels
_KNOWN_EACH = 4  # rounds between two looks at how well ratios are known
_LOOKS = 4 / 3  # rounds between two looks at the result grow by this much
_PEEK = 0.1  # and each look may be wrong this much more rarely than the verdict, since there are several


@dataclass(slots=True)
class Contestant:
    """Something loaded in a worker under `name`, and what the race has seen of it. `batch` samples go through at each call.

    `others` are further workers in which the same is loaded, under the same name or under those in `other_names` (then they may be this
    very worker). They take turns, round % copies, so that the race sees what loading it again, or in another process, would make of it.
    """

    name: str
    worker: Worker
    batch: int = 1
    callers: int = 1
    expected_s: float = 0.01  # a first guess of one call, for the size of a block
    keep: bool = False  # never dropped: a reference or a baseline
    durations: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    warmup: list[float] = field(default_factory=list)
    took_s: float = 0.0  # of the race that it is in, or was in last
    memory_bytes: int = 0
    device_memory_bytes: int = 0  # the most it was seen to hold of its device's own memory; 0 where nothing tells
    dropped: str = ""  # why it left the race early
    rests: bool = False  # kept, and so far behind that what is known of it is enough: it takes no more turns
    failed: WorkerDied | None = None
    refused: bool = False  # failed, and its runtime said why: out of memory, say
    lost: bool = False  # failed through no fault of its own: another contestant took its worker down
    generation: int = 0
    others: tuple[Worker, ...] = ()
    other_names: tuple[str, ...] = ()  # as long as `others`, or empty
    repeat: int = 1  # steps to one duration
    rate: bool = False  # what it answers in a second counts, as it does of several callers anyhow: durations are means of windows
    single: bool = False  # it runs on the thread that calls it and on no other
    core: int | None = None  # when it is single: the core that its last block ran on, or -1
    cautions: tuple[Caution, ...] = ()  # what the race found doubtful at its end
    busy: bool = False  # other processes kept the machine busy during the race
    _generations: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.generation = self.worker.generation
        self._generations = tuple(each.generation for each in self.others)

    @property
    def windows(self) -> bool:
        """True where its durations are of windows: seconds from one answer to the next."""
        return self.rate or self.callers > 1

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers that hold it."""
        return (self.worker, *self.others)

    @property
    def copies(self) -> int:
        """In how many processes it runs."""
        return 1 + len(self.others)

    @property
    def racing(self) -> bool:
        """True while it takes part."""
        return not self.dropped and self.failed is None

    def samples(self) -> Samples | None:
        """Return what was measured, or None when nothing was."""
        if not self.durations:
            return None
        return Samples(timed_s=tuple(self.durations), rounds=tuple(self.rounds), warmup_s=tuple(self.warmup))

    @property
    def loads(self) -> tuple[tuple[Worker, str], ...]:
        """Each worker with the name under which it is loaded there."""
        return tuple(zip(self.workers, (self.name, *(self.other_names or (self.name,) * len(self.others))), strict=True))

    def worker_in(self, number: int) -> Worker:
        """Return the worker whose turn it is in the round `number`."""
        return self.workers[number % self.copies]

    def block(self, number: int, *, warmup: bool = False, outspin: bool = False, core: int = -1) -> None:
        """Time one block and keep its durations under the round `number`; to warm up, call until it no longer becomes faster first.

        `outspin`: another load of the same process ran before. `core`: where one that is single shall run; -1 leaves it where it is.
        """
        worker, name = self.loads[number % self.copies]
        if worker.generation != (self.generation, *self._generations)[number % self.copies] or worker.pid == 0:
            self.failed = WorkerDied("lost with its worker, which died during another candidate")
            self.lost = True
            return
        seconds = block_s(self.expected_s, self.callers, rate=self.rate)
        settle = 1 if self.expected_s > _SLOW_S or self.repeat > 1 else 2
        least = 1 if self.expected_s > _VERY_SLOW_S else _BUSY_LEAST if self.busy and self.callers == 1 else 2
        more: dict[str, float | int] = {"steady_s": _WARM_S} if warmup else {"outspin_s": OUTSPIN_S} if outspin else {}
        if self.repeat > 1:
            more["repeat"] = self.repeat
        if self.rate:
            more["window"] = True
        elif self.single and self.callers == 1:
            more["core"] = core
        limit_s = run_limit_s() + seconds
        try:
            answer = worker.call("timed", limit_s=limit_s, name=name, seconds=seconds, settle=settle, least=least, **more)
        except WorkerDied as died:
            self.failed, self.lost = died, isinstance(died, WorkerLost)
            return
        except AivmmError as error:  # out of memory at run time, say: it costs this contestant, and neither the race nor the worker
            self.failed, self.refused = WorkerDied(str(error)), True
            return
        self.memory_bytes = max(self.memory_bytes, answer["memory_bytes"])
        self.device_memory_bytes = max(self.device_memory_bytes, answer.get("device_memory_bytes") or 0)
        if "core" in more:
            self.core = answer["core"]
        self.expected_s = min(answer["durations"])
        if warmup:
            self.warmup.extend((*answer.get("warmup", ()), *answer["durations"]))
        else:
            self.durations.extend(answer["durations"])
            self.rounds.extend([number] * len(answer["durations"]))


def runs_single(targets: Iterable[Target], configs: Iterable[Config]) -> bool:
    """Say whether what is compiled so runs on the thread that calls it and on no other."""
    names = ("intra_op_num_threads", "INFERENCE_NUM_THREADS")
    return all(target.device.kind == "cpu" for target in targets) and all(1 in map(config.get, names) for config in configs)


def block_s(expected_s: float, callers: int, *, rate: bool = False) -> float:
    """Return how long one block of calls that take `expected_s` each should be timed; `rate` where only their mean counts."""
    if callers > 1 or rate:
        return max(_WINDOWS_S, 3 * expected_s)
    return min(_BLOCK_MOST_S, max(_BLOCK_LEAST_S, _BLOCK_CALLS * expected_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceState:
    """What a progress display may show after each round."""

    round: int
    leader: Contestant | None
    racing: int
    elapsed_s: float


def versus(a: Contestant, b: Contestant, *, confidence: float = 0.95, field: Sequence[Contestant] = ()) -> Comparison:
    """Compare the time per sample of two contestants of one race.

    Unless they are the same loaded thing the interval takes in how much loading it again changes: as the copies of the two show it,
    together with those of the other contestants in `field`, or else as a prior says.
    """
    mine, theirs = a.samples(), b.samples()
    assert mine and theirs
    return compare(
        mine,
        theirs,
        scale=b.batch / a.batch,
        confidence=confidence,
        copies=(a.copies, b.copies),
        apart=apart_of(a, b, field=field),
        by=by_of(a, b),
    )


def by_of(a: Contestant, b: Contestant) -> By:
    """Return what a round of one race stands for the two by: least durations where other processes kept the machine busy."""
    if a.windows and b.windows:
        return "window" if a.busy or b.busy else "mean"
    return "least" if a.busy or b.busy else "median"


def apart_of(a: Contestant, b: Contestant, *, field: Sequence[Contestant] = ()) -> Apart | None:
    """Return how much the loads of one race differ; None when `a` and `b` are the same ones.

    What is loaded twice in one process differs for as long as it lives too, by where its memory and threads came to lie: 8 % were seen.
    """
    if a.loads == b.loads:
        return None
    copies = min(a.copies, b.copies)
    full = min(len(set(a.rounds)), len(set(b.rounds)))
    # Those that left early share too few rounds with the others.
    alike = [each for each in field if each not in (a, b) and each.copies == copies and len(set(each.rounds)) >= full]
    runs = [each.samples() for each in (a, b, *alike)]
    return observed_apart([each for each in runs if each is not None], copies if a.copies == b.copies else 1, by=by_of(a, b))


def _within(a: Contestant, b: Contestant, confidence: float) -> Comparison:
    """Compare by the noise of rounds alone: it is all that more rounds could make smaller."""
    mine, theirs = a.samples(), b.samples()
    assert mine and theirs
    return compare(mine, theirs, scale=b.batch / a.batch, confidence=confidence, by=by_of(a, b))


def per_sample_s(contestant: Contestant) -> float:
    """Return the median seconds per sample; of windows those from one answered sample to the next."""
    samples = contestant.samples()
    assert samples
    return (rate_s(samples) if contestant.windows else samples.median_s) / contestant.batch


def leader_of(contestants: Sequence[Contestant]) -> Contestant | None:
    """Return the one with the least time per sample, see `per_sample_s`, or None when none has been measured."""
    measured = [each for each in contestants if each.durations and each.failed is None]
    return min(measured, key=per_sample_s, default=None)


def race(
    contestants: Sequence[Contestant],
    *,
    budget_s: float,
    least_rounds: int = 8,
    most_rounds: int = 200,
    seed: int = 0,
    first_round: int = 0,
    warmup: bool = True,
    confidence: float = 0.95,
    tell: Callable[[RaceState], None] | None = None,
    tire: Callable[[int], None] | None = None,
    enough: Callable[[int], bool] | None = None,
    stop: Callable[[], bool] | None = None,
) -> int:
    """Run rounds until the race is decided, `most_rounds` are done, or `budget_s` is over after at least `least_rounds`.

    Returns the next round's number.

    Only the worker whose block it is runs: the others are frozen, or waited for until they are quiet, since spinning threads slow their
    neighbours. The first calls of a block are not timed; one round before the first is for warming up and is not counted. The order is
    random, and each second round has the one before it backwards, so that a drift within rounds cancels. Hopeless contestants leave early
    unless `keep`; `tire(rounds)` may let some of those rest. `enough(rounds)` replaces the rule that ends the race when each remaining
    comparison with the leader is decided at `confidence`. Those that are not when the race ends carry the caution `never-settled`. `stop()`
    ends it after three rounds.
    """
    order = random.Random(seed)
    started = time.perf_counter()
    waited = 0.0
    number = first_round
    look = least_rounds
    turns = _Turns(contestants)
    background = _Background(contestants)
    mirrored: list[Contestant] = []
    for each in contestants:
        each.took_s = 0.0
    try:
        for count in range(-1 if warmup else 0, most_rounds):
            # What rests has had its share: the others are not to go short for it.
            rested = sum(each.took_s for each in contestants if each.rests)
            spent = time.perf_counter() - started - waited - rested
            # A budget that is over ends the race, but not before there is something to compare, unless it is over by far.
            if (count >= least_rounds and spent > budget_s) or (count >= 3 and spent > 1.3 * budget_s + 1):
                break
            if count >= 3 and stop is not None and stop():
                break
            with measuring() as lock_wait:
                waited += lock_wait
                if count < 0:
                    turns.warm_up(order, number)
                    continue
                turns.new_round()
                mirrored = mirrored[::-1] if count % 2 else order.sample(list(contestants), len(contestants))
                for each in mirrored:
                    turns.take(each, number)
            number += 1
            background.look(count + 1)
            _drop_hopeless(contestants, count + 1)
            if tire:
                tire(count + 1)
            if tell:
                racing = sum(each.racing for each in contestants)
                elapsed = time.perf_counter() - started
                tell(RaceState(round=count + 1, leader=leader_of(contestants), racing=racing, elapsed_s=elapsed))
            if enough:
                if count + 1 >= least_rounds and enough(count + 1):
                    break
            elif count + 1 >= look:
                if not undecided(contestants, 1 - _PEEK * (1 - confidence)):
                    break
                look = max(look + 1, round(look * _LOOKS))
    finally:
        turns.end()
    for each in undecided(contestants, confidence):
        each.cautions = (_NEVER_SETTLED,)
    return number


def known_well(contestants: Sequence[Contestant]) -> Callable[[int], bool]:
    """Return what ends a race (`enough`) once it is known how each of those still in it compares with the first of them, to ±1.5 %.

    A verdict is soon clear where one is much faster, while by how much is not: what is to be predicted from it takes more rounds.
    """

    def enough(rounds: int) -> bool:
        first, *others = contestants
        if rounds % _KNOWN_EACH or not first.durations:
            return False
        found = (_within(each, first, 0.95) for each in others if each.racing and not each.rests and each.durations)
        return all(math.log(each.high / each.low) <= _TIGHT for each in found)

    return enough


def far_behind(who: Sequence[Contestant], field: Sequence[Contestant]) -> Callable[[int], None]:
    """Return what lets those of `who` rest (`tire`) that took three times as long as the fastest of `field` or more in every round so far.

    Ten times, where there were two rounds only. A race has its budget: what is slow beyond doubt would take the time in which those that
    are close are told apart.
    """

    def tire(rounds: int) -> None:
        leader = leader_of(field)
        if rounds < _FAR[0][0] or leader is None:
            return
        for each in who:
            if each is leader or not each.racing or each.rests or not each.durations:
                continue
            mine, theirs = each.samples(), leader.samples()
            assert mine and theirs
            behind = paired_logs(mine, theirs, scale=leader.batch / each.batch, by=by_of(each, leader))
            each.rests = any(behind.size >= least and float(behind.min()) > math.log(times) for least, times in _FAR)

    return tire


class _Background:
    """Sees to it that the contestants know whether other processes keep the machine busy."""

    def __init__(self, contestants: Sequence[Contestant]) -> None:
        self._contestants = contestants
        self._load = BackgroundLoad(self._pids())
        self._next = 3

    def _pids(self) -> list[int]:
        return list({worker.pid for each in self._contestants for worker in each.workers if worker.pid > 0})

    def look(self, rounds: int) -> None:
        """Look again after the third round and whenever there are a third more: it takes a while."""
        pids = self._pids()
        if rounds < self._next or not pids:
            return
        self._next = max(rounds + 1, round(rounds * _LOOKS))
        busy = is_busy(self._load.read(pids), usable_cores())
        for each in self._contestants:
            each.busy = busy


class _Turns:
    """Sees to it that one worker runs at a time."""

    def __init__(self, contestants: Sequence[Contestant]) -> None:
        self._contestants = contestants
        self._last: tuple[Worker, str] | None = None  # the worker, and what is loaded in it under which name
        self._ran: dict[Worker, tuple[Worker, str]] = {}  # what ran last in each worker
        self._frozen: set[int] = set()
        self._core = -1  # where the first of this round ran that runs on one thread; the others follow it, since cores differ

    def new_round(self) -> None:
        """Begin a round."""
        self._core = -1

    def warm_up(self, order: random.Random, number: int) -> None:
        """Warm up each copy of each contestant."""
        turns = [(each, number + copy) for each in self._contestants for copy in range(each.copies)]
        for each, turn in order.sample(turns, len(turns)):
            self.take(each, turn, warmup=True)

    def take(self, contestant: Contestant, number: int, *, warmup: bool = False) -> None:
        """Time one block of a contestant that still takes part."""
        if not contestant.racing or contestant.rests:
            return
        load = worker, _ = contestant.loads[number % contestant.copies]
        if self._last is not None and self._last[0] is not worker:
            pid = self._last[0].pid
            if freeze(pid):
                self._frozen.add(pid)
            elif pid > 0:
                wait_until_quiet(pid)
        # Threads of one process cannot be stopped apart, and what was frozen in the middle of spinning spins on when it is thawed. To wait
        # until they rest would put the next one's to sleep as well, and where they wake up is a lottery: it runs beside them until they do.
        outspin = self._ran.get(worker, load) != load
        if worker.pid in self._frozen:
            thaw(worker.pid)
            self._frozen.discard(worker.pid)
        self._last = self._ran[worker] = load
        began = time.perf_counter()
        contestant.block(number, warmup=warmup, outspin=outspin, core=self._core)
        contestant.took_s += time.perf_counter() - began
        if contestant.core is not None:
            self._core = contestant.core

    def end(self) -> None:
        """Let all go on."""
        for pid in self._frozen:
            thaw(pid)
        self._frozen.clear()


_NEVER_SETTLED = Caution(
    code="never-settled",
    message="the race ended before it was clear how this compares with the fastest",
    advice="raise --budget, or close other programs",
)


def _drop_hopeless(contestants: Sequence[Contestant], rounds: int) -> None:
    """Drop who is behind the leader by more than a tenth, by Wilcoxon's signed ranks of the rounds (as Optuna's WilcoxonPruner does)."""
    leader = leader_of(contestants)
    if leader is None or rounds < 5:
        return
    from aivmm.probes import wilcoxon  # here: see there

    for each in contestants:
        if not each.racing or each.keep or each is leader or not each.durations:
            continue
        mine, theirs = each.samples(), leader.samples()
        assert mine and theirs
        behind = paired_logs(mine, theirs, scale=leader.batch / each.batch, by=by_of(each, leader)) - np.log(_HOPELESS)
        if behind.size >= 5 and np.median(behind) > 0 and wilcoxon.greater(behind) < _HOPELESS_P:
            each.dropped = f"hopeless: {_within(each, leader, 0.95).ratio:.2f} times the leader's time"


def undecided(contestants: Sequence[Contestant], confidence: float = 0.95) -> list[Contestant]:
    """Return whose verdict against the leader is open and whose interval is wider than ±1.5 %, of those that still take turns."""
    leader = leader_of(contestants)
    if leader is None:
        return []
    found = []
    for each in contestants:
        if each is leader or not each.racing or each.rests or not each.durations:
            continue
        against = _within(each, leader, confidence)
        if against.verdict == "ambiguous" and against.high - against.low > _TIGHT:
            found.append(each)
    return found
