"""Races: candidates measured in turn, in random order, round after round, until the order is clear or the time is up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from aivmm.errors import AivmmError
from aivmm.probes.client import Worker, WorkerDied
from aivmm.probes.compare import Comparison, compare
from aivmm.probes.machine import measuring, wait_until_quiet
from aivmm.probes.records import Samples

_BLOCK_CALLS = 8
_BLOCK_LEAST_S, _BLOCK_MOST_S = 0.02, 0.15
_SEVERAL_BLOCK_S = 0.12  # with several callers one block gives one duration, so it must hold many calls
_SLOW_S = 0.02  # one such call settles the caches
_VERY_SLOW_S = 0.2  # one such call is a block
_RUN_LIMIT_S = 120.0
_HOPELESS = 1.10  # dropped when even the lower end of its interval is this far behind the leader


@dataclass(slots=True)
class Contestant:
    """Something loaded in a worker under `name`, and what the race has seen of it. `batch` samples go through at each call."""

    name: str
    worker: Worker
    batch: int = 1
    callers: int = 1
    expected_s: float = 0.01  # a first guess of one call, for the size of a block
    keep: bool = False  # never dropped: a reference or a baseline
    durations: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    warmup: list[float] = field(default_factory=list)
    memory_bytes: int = 0
    dropped: str = ""  # why it left the race early
    failed: WorkerDied | None = None
    lost: bool = False  # failed through no fault of its own: another contestant took its worker down
    generation: int = 0

    def __post_init__(self) -> None:
        self.generation = self.worker.generation

    @property
    def racing(self) -> bool:
        """True while it takes part."""
        return not self.dropped and self.failed is None

    def samples(self) -> Samples | None:
        """Return what was measured, or None when nothing was."""
        if not self.durations:
            return None
        return Samples(timed_s=tuple(self.durations), rounds=tuple(self.rounds), warmup_s=tuple(self.warmup))

    def block(self, number: int, *, warmup: bool = False) -> None:
        """Time one block and keep its durations under the round `number`."""
        if self.worker.generation != self.generation or self.worker.pid == 0:
            self.failed = WorkerDied("lost with its worker, which died during another candidate")
            self.lost = True
            return
        seconds = block_s(self.expected_s, self.callers)
        try:
            settle = 1 if self.expected_s > _SLOW_S else 2
            least = 1 if self.expected_s > _VERY_SLOW_S else 2
            answer = self.worker.call("timed", limit_s=_RUN_LIMIT_S + seconds, name=self.name, seconds=seconds, settle=settle, least=least)
        except WorkerDied as died:
            self.failed = died
            return
        except AivmmError as error:  # out of memory at run time, say: it costs this contestant and not the race
            self.failed = WorkerDied(str(error))
            return
        self.memory_bytes = max(self.memory_bytes, answer["memory_bytes"])
        self.expected_s = min(answer["durations"])
        if warmup:
            self.warmup.extend(answer["durations"])
        else:
            self.durations.extend(answer["durations"])
            self.rounds.extend([number] * len(answer["durations"]))


def block_s(expected_s: float, callers: int) -> float:
    """Return how long one block of calls that take `expected_s` each should be timed."""
    if callers > 1:
        return max(_SEVERAL_BLOCK_S, 3 * expected_s)
    return min(_BLOCK_MOST_S, max(_BLOCK_LEAST_S, _BLOCK_CALLS * expected_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceState:
    """What a progress display may show after each round."""

    round: int
    leader: Contestant | None
    racing: int
    elapsed_s: float


def versus(a: Contestant, b: Contestant, *, confidence: float = 0.95) -> Comparison:
    """Compare the time per sample of two contestants of one race."""
    mine, theirs = a.samples(), b.samples()
    assert mine and theirs
    return compare(mine, theirs, scale=b.batch / a.batch, confidence=confidence)


def per_sample_s(contestant: Contestant) -> float:
    """Return the median seconds per sample."""
    samples = contestant.samples()
    assert samples
    return samples.median_s / contestant.batch


def leader_of(contestants: Sequence[Contestant]) -> Contestant | None:
    """Return the one with the least median time per sample, or None when none has been measured."""
    measured = [each for each in contestants if each.durations and each.failed is None]
    return min(measured, key=per_sample_s, default=None)


def race(
    contestants: Sequence[Contestant],
    *,
    budget_s: float,
    least_rounds: int = 8,
    most_rounds: int = 60,
    seed: int = 0,
    first_round: int = 0,
    warmup: bool = True,
    tell: Callable[[RaceState], None] | None = None,
    enough: Callable[[int], bool] | None = None,
) -> int:
    """Run rounds until the race is decided, `most_rounds` are done, or `budget_s` is over after at least `least_rounds`.

    Returns the next round's number.

    Before each block the previous worker must have gone quiet, since spinning threads slow their neighbours; the first calls of a block
    are not timed, and one round before the first is not counted. Hopeless contestants leave early unless `keep`. `enough(rounds)`
    replaces the rule that ends the race when each remaining comparison with the leader is decided.
    """
    order = random.Random(seed)
    started = time.perf_counter()
    waited = 0.0
    number = first_round
    before: Contestant | None = None
    for count in range(-1 if warmup else 0, most_rounds):
        spent = time.perf_counter() - started - waited
        # A budget that is over ends the race, but not before there is something to compare, unless it is over by far.
        if (count >= least_rounds and spent > budget_s) or (count >= 3 and spent > 1.3 * budget_s + 1):
            break
        with measuring() as lock_wait:
            waited += lock_wait
            for each in order.sample(list(contestants), len(contestants)):
                if not each.racing:
                    continue
                if before is not None and before is not each and before.worker.pid > 0:
                    wait_until_quiet(before.worker.pid)
                each.block(number, warmup=count < 0)
                before = each
        if count < 0:
            continue
        number += 1
        _drop_hopeless(contestants, count + 1)
        if tell:
            racing = sum(each.racing for each in contestants)
            tell(RaceState(round=count + 1, leader=leader_of(contestants), racing=racing, elapsed_s=time.perf_counter() - started))
        if count + 1 >= least_rounds and (enough(count + 1) if enough else _decided(contestants)):
            break
    return number


def _drop_hopeless(contestants: Sequence[Contestant], rounds: int) -> None:
    leader = leader_of(contestants)
    if leader is None or rounds < 5:
        return
    for each in contestants:
        if (
            each.racing
            and not each.keep
            and each is not leader
            and each.durations
            and versus(each, leader, confidence=0.99).low > _HOPELESS
        ):
            each.dropped = f"hopeless: {versus(each, leader).ratio:.2f} times the leader's time"


def _decided(contestants: Sequence[Contestant]) -> bool:
    """True when each contestant's interval against the leader is narrower than ±1.5 %, or its verdict is clear."""
    leader = leader_of(contestants)
    if leader is None:
        return True
    for each in contestants:
        if each is leader or not each.racing or not each.durations:
            continue
        found = versus(each, leader)
        if found.verdict == "ambiguous" and found.high - found.low > 0.03:
            return False
    return True
